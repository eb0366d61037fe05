"""Ends a job of many ranks soon after one of them failed, and says which, in what step, and how.

Collectives alone say neither: where a peer is gone they see a closed connection, or wait until
their own time-out. Here a thread of every rank sends a sign of life with the place where the rank
computes. The first rank listens to all others and they to the first, so n ranks cost n reads a
second. The thread needs no collective, so a rank may wait for another as long as that is alive:
how long is the process group's time-out.
"""

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

MAX_INTERVAL_S = 1.0
ROLL_CALL_INTERVALS = 3  # after which a rank that gave no sign counts as silent
NUM_PLACES = 8  # ranks whose place is told when all are alive
ENDED = "nothing: it has ended"
VERDICT = "verdict"
TRANSPARENT = (__name__, "flowrl.megatron.cpu")  # modules whose functions say nothing of the place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life; `number` grows."""

    number: int
    step: int
    place: str
    process: str

    def __str__(self) -> str:
        return f"step {self.step} in {self.place} ({self.process})"


class Watchdog:
    """Watches the ranks of the default process group; every rank makes one.

    A rank that is silent for half of `timeout_s` ends all, before the collectives that wait for it
    reach a time-out of `timeout_s`. `num_steps`, set by the owner, counts finished steps.
    """

    def __init__(self, timeout_s: float) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self.num_steps: Callable[[], int] = lambda: 0
        self.limit_s = timeout_s / 2
        self.interval_s = min(MAX_INTERVAL_S, self.limit_s / 10)
        self._main_thread = threading.get_ident()
        self._process = f"{socket.gethostname()}, pid {os.getpid()}"
        # A connection of its own: while one call waits for the store, others queue behind it.
        default = dist.distributed_c10d._get_default_store()
        own = default.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self._store = dist.distributed_c10d.PrefixStore("flowrl_watchdog", own)
        self._number = 0
        self._is_closing = threading.Event()
        if self.rank == 0:
            self._store.set(VERDICT, "")
        self._send(self._place())
        dist.barrier()  # every key exists, else reading one would wait
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_: object) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Stop watching. An error is told to the other ranks, which then end too."""
        if self._is_closing.is_set():
            return
        self._is_closing.set()
        self._thread.join()
        try:
            self._send(ENDED)
            if error is not None:
                self._fail(error)
        except dist.DistError as lost:
            logger.error("rank %d: the ranks' store does not answer: %s", self.rank, lost)

    def _fail(self, error: BaseException) -> None:
        step = self.num_steps() + 1
        cause = f"rank {self.rank} failed in step {step}: {type(error).__name__}: {error}"
        logger.error("%s", cause)
        verdict = self._store.compare_set(VERDICT, "", cause).decode()
        if verdict != cause:  # another rank was first, and finds out who is missing
            logger.error("rank %d ends, since %s", self.rank, verdict)
            return
        # torchrun sends SIGTERM when it notices a dead rank, and waits 30 s before it kills.
        earlier = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        before = self._read(range(self.num_ranks))
        time.sleep(ROLL_CALL_INTERVALS * self.interval_s)
        after = self._read(range(self.num_ranks))
        signal.signal(signal.SIGTERM, earlier)
        others = [rank for rank, sign in after.items() if sign.place != ENDED]
        silent = [rank for rank in others if after[rank] == before[rank]]
        for rank in silent:
            logger.error("rank %d is silent, last seen at %s", rank, after[rank])
        if not silent:
            for rank in others[:NUM_PLACES]:
                logger.error("rank %d is alive, at %s", rank, after[rank])

    def _watch(self) -> None:
        watched = list(range(1, self.num_ranks)) if self.rank == 0 else [0]
        last = dict.fromkeys(watched, Sign(-1, 0, "", ""))
        heard = dict.fromkeys(watched, time.monotonic())
        num_left = ROLL_CALL_INTERVALS  # signs after a verdict, which its author still counts
        while not self._is_closing.wait(self.interval_s):
            try:
                self._send(self._place())
                verdict = self._store.get(VERDICT).decode()
                signs = self._read(watched)
            except dist.DistError as error:
                self._end(f"rank {self.rank}: the ranks' store does not answer: {error}")
                return
            now = time.monotonic()
            for rank, sign in signs.items():
                if sign != last[rank] or sign.place == ENDED:
                    last[rank], heard[rank] = sign, now
            silent = [rank for rank in watched if now - heard[rank] > self.limit_s]
            if silent and not verdict:
                verdict = "; ".join(
                    f"rank {rank} is silent for {now - heard[rank]:.1f} s, last seen at "
                    f"{last[rank]}: it was stopped or killed, or its machine is gone"
                    for rank in silent
                )
                verdict = self._store.compare_set(VERDICT, "", verdict).decode()
            num_left -= bool(verdict)
            if num_left < 0:
                self._end(f"rank {self.rank} ends, since {verdict}")
                return

    def _end(self, reason: str) -> None:
        """Leave without the main thread, which may wait for a rank that never comes."""
        if self._is_closing.is_set():
            return
        logger.error("%s", reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _send(self, place: str) -> None:
        self._number += 1
        sign = (self._number, self.num_steps() + 1, place, self._process)
        self._store.set(f"sign/{self.rank}", json.dumps(sign))

    def _read(self, ranks: range | list[int]) -> dict[int, Sign]:
        values = self._store.multi_get([f"sign/{rank}" for rank in ranks])
        return {rank: Sign(*json.loads(value)) for rank, value in zip(ranks, values, strict=True)}

    def _place(self) -> str:
        """The functions of flowrl that the main thread is in, such as training_step > save."""
        frame: FrameType | None = sys._current_frames().get(self._main_thread)
        names = []
        while frame is not None:
            module = frame.f_globals["__name__"]
            if module.startswith("flowrl.") and module not in TRANSPARENT:
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        return " > ".join(reversed(names[:5])) or "no function of flowrl"
