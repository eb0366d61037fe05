"""One worker process as the parent sees it: start, exchange a message within a time, kill."""

import contextlib
import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from flowrl.rewards.worker import HEADER

ENVIRONMENT = ("env", "OMP_NUM_THREADS=1", "PYTHONHASHSEED=0")
WORKER = Path(__file__).with_name("worker.py")
# Imports of the user's file included; a cold network file system makes them slow.
START_TIMEOUT_S = 300.0
# How often the death of a worker is looked for while its pipe is silent. End of file does not tell:
# a process that the reward function forked keeps the pipe open.
TICK_S = 0.05
EXIT_GRACE_S = 1.0
MAX_REPLY_BYTES = 64 << 20
FAILURES_OF_FUNCTION = ("crash", "exception", "invalid")


class WorkerLate(Exception):
    """No reply in time."""


class WorkerDied(Exception):
    """The process ended, or sent what is no reply."""


class WorkerProcess:
    """A process that runs a reward function. One thread at a time may use it.

    `is_closing`, which any thread may set, makes a running exchange give up at once.
    """

    def __init__(self, hello: dict[str, Any]) -> None:
        self.is_closing = False
        self._hello = pickle.dumps(hello)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process anew and waits until the reward function is loaded.

        Raises RuntimeError with the reason if it is not.
        """
        self.kill()
        if self.is_closing:
            raise RuntimeError("the reward pool is being closed")
        # One BLAS thread each, since the workers are the parallelism, and one order of sets in all;
        # `env` sets the variables without this process reading its environment.
        # -P: its own folder, with modules named as others' packages, stays off the path.
        # -u: prints survive a kill. A session of its own: one signal reaches all that it starts,
        # and Ctrl-C in the terminal reaches only the parent.
        process = subprocess.Popen(
            [*ENVIRONMENT, sys.executable, "-P", "-u", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdin is not None and process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        self._process = process
        try:
            reply = json.loads(self._transfer(self._hello, START_TIMEOUT_S))
        except WorkerLate as error:
            self.kill()
            raise RuntimeError(f"not loaded within {START_TIMEOUT_S:g} s") from error
        except (WorkerDied, ValueError) as error:
            self.kill()
            raise RuntimeError(f"its process ended while loading it: {error}") from error
        if not reply["ready"]:
            self.kill()
            raise RuntimeError(reply["message"])

    def is_alive(self) -> bool:
        return self._process is not None and self._exit_status() is None

    def exchange(self, body: bytes, timeout_s: float) -> dict[str, Any]:
        """Sends a request, returns the checked reply. Raises WorkerLate or WorkerDied."""
        raw = self._transfer(body, timeout_s)
        try:
            reply = json.loads(raw)
            is_score = isinstance(reply["score"], float) and math.isfinite(reply["score"])
            is_sound = is_score if reply["failure"] is None else isinstance(reply["message"], str)
            is_sound = is_sound and isinstance(reply["extra"], dict)
            is_sound = is_sound and isinstance(reply["is_last"], bool)
            is_sound = is_sound and reply["failure"] in (None, *FAILURES_OF_FUNCTION)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise WorkerDied(f"the worker sent an unreadable reply: {error}") from error
        if not is_sound:
            raise WorkerDied(f"the worker sent an unreadable reply: {raw[:200]!r}")
        return reply

    def kill(self) -> None:
        """SIGKILL to the whole process group, then reaps; nothing if there is no process."""
        process, self._process = self._process, None
        if process is None:
            return
        # Before the leader is reaped, so that the group's number cannot be somebody else's.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()

    def _transfer(self, body: bytes, timeout_s: float) -> bytes:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + timeout_s
        self._send(process.stdin.fileno(), HEADER.pack(len(body)) + body, deadline)
        descriptor = process.stdout.fileno()
        (length,) = HEADER.unpack(self._receive(descriptor, HEADER.size, deadline))
        if length > MAX_REPLY_BYTES:
            raise WorkerDied(f"the worker announced a reply of {length} bytes")
        return self._receive(descriptor, length, deadline)

    def _send(self, descriptor: int, message: bytes, deadline: float) -> None:
        rest = memoryview(message)
        while rest:
            self._wait(descriptor, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BrokenPipeError:
                raise WorkerDied(self._death()) from None

    def _receive(self, descriptor: int, length: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < length:
            self._wait(descriptor, select.POLLIN, deadline)
            part = os.read(descriptor, min(length - len(parts), 1 << 20))
            if not part:
                raise WorkerDied(self._death())
            parts += part
        return bytes(parts)

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        """Returns when the descriptor is ready for the event (or broken)."""
        poll = select.poll()
        poll.register(descriptor, event)
        while True:
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise WorkerLate
            if poll.poll(1000 * min(remaining_s, TICK_S)):
                return
            if self.is_closing:
                raise WorkerDied("the reward pool was closed")
            if self._exit_status() is not None:
                raise WorkerDied(self._death())

    def _exit_status(self) -> Any:
        """How the process ended, or None while it runs; leaves it to be reaped by kill."""
        assert self._process is not None
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags)

    def _death(self) -> str:
        """How the process ended; its pipes close a moment before it does."""
        deadline = time.monotonic() + EXIT_GRACE_S
        while (status := self._exit_status()) is None:
            if time.monotonic() > deadline:
                return "the worker closed its pipes"
            time.sleep(0.001)
        if status.si_code == os.CLD_EXITED:
            return f"the worker exited with status {status.si_status}"
        return f"the worker was ended by {signal.Signals(status.si_status).name}"
