"""Reward functions in worker processes that are killed when late, and whose failures are counted.

Thread pools and signal.alarm do not do: a thread cannot be killed, and an alarm off the main thread
raises, which a careless reward function turns into zeros.
"""

import logging
import os
import pickle
import queue
import sys
import threading
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from flowrl.rewards.loading import check_reward_name
from flowrl.rewards.process import WorkerDied, WorkerLate, WorkerProcess

logger = logging.getLogger(__name__)

FAILURES = ("timeout", "crash", "exception", "invalid")
# A function whose messages quote the response would otherwise log every one of them.
MAX_LOGGED_MESSAGES = 100


@dataclass(frozen=True)
class RewardRequest:
    """One response to score; ground_truth and extra_info hold anything that can be pickled."""

    data_source: str
    solution: str
    ground_truth: Any = None
    extra_info: dict[str, Any] | None = None


@dataclass(frozen=True)
class RewardResult:
    """A finite score; if `failure` is set, the pool's failure_score and the reason."""

    score: float
    failure: str | None = None  # one of FAILURES
    message: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class RewardPool:
    """Scores responses with one reward function in worker processes; a context manager.

    Args:
        function: a name in REWARDS, `path/to/file.py:function` or `module:function`.
        num_workers: processes.
        timeout_s: seconds that one request may take from its dispatch to a worker; then the worker
            and what it started (its process group) are killed.
        failure_score: the score of a request that failed.
        memory_limit_bytes: memory that one worker may write; 0 for no limit.

    `counts` has the number of "requests" and of each failure since the start. Scores do not depend
    on num_workers. Any thread may use the pool.

    Raises ValueError if an argument is out of range or a worker cannot start, with its reason: a
    missing file or function, an error in the user's import.
    """

    def __init__(
        self,
        function: str,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        failure_score: float = 0.0,
        memory_limit_bytes: int = 8 << 30,
    ) -> None:
        check_reward_name(function)
        if num_workers < 1:
            raise ValueError(f"num_workers is {num_workers}; at least one worker is needed")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; give a positive number of seconds")
        if memory_limit_bytes < 0:
            raise ValueError(f"memory_limit_bytes is {memory_limit_bytes}; 0 means no limit")
        self.counts: dict[str, int] = dict.fromkeys(("requests", *FAILURES), 0)
        self._timeout_s = timeout_s
        self._failure_score = failure_score
        self._last_batch: Counter[str] = Counter()
        self._last_reasons: Counter[str] = Counter()
        self._logged: set[tuple[str, str]] = set()
        self._lock = threading.Lock()
        hello = {
            "function": function,
            "memory_limit_bytes": memory_limit_bytes,
            "parent_pid": os.getpid(),
            "sys_path": sys.path,
        }
        # Linux ends a worker together with the thread that started it, so only threads that live as
        # long as the pool start any.
        self._executor = ThreadPoolExecutor(num_workers, thread_name_prefix="reward")
        workers = [WorkerProcess(hello) for _ in range(num_workers)]
        self._close = weakref.finalize(self, _close, self._executor, workers, os.getpid())
        self._idle: queue.SimpleQueue[WorkerProcess] = queue.SimpleQueue()
        try:
            for worker, _ in zip(
                workers, self._executor.map(WorkerProcess.start, workers), strict=True
            ):
                self._idle.put(worker)
        except RuntimeError as error:
            self.close()
            raise ValueError(f"reward function {function!r} cannot be used: {error}") from error

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        """One result per request, in order. Failures are counted and logged, never dropped.

        Raises ValueError if the pool is closed or a request cannot be pickled, RuntimeError if a
        worker that had to be replaced does not start again.
        """
        if not self._close.alive:
            raise ValueError("the reward pool is closed; score before leaving its `with` block")
        bodies = [_encode(index, request) for index, request in enumerate(requests)]
        futures = [
            self._executor.submit(
                _score_one, self._idle, body, self._timeout_s, self._failure_score
            )
            for body in bodies
        ]
        try:
            results = [future.result() for future in futures]
        finally:  # after an error or Ctrl-C the rest is not wanted; otherwise all are done
            for future in futures:
                future.cancel()
        self._count(results)
        return results

    def metrics(self) -> dict[str, float]:
        """Fractions of the last batch that failed: reward/timeout, crash, exception, invalid.

        With code rewards also reward/code/<reason>, for every reason that occurred.
        """
        num_requests = max(self._last_batch["requests"], 1)
        counts = {name: self._last_batch[name] for name in FAILURES}
        counts |= {f"code/{reason}": number for reason, number in self._last_reasons.items()}
        return {f"reward/{name}": number / num_requests for name, number in counts.items()}

    def close(self) -> None:
        """Ends the workers and everything in their process groups; a second call does nothing."""
        self._close()

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count(self, results: list[RewardResult]) -> None:
        batch = Counter(result.failure for result in results if result.failure is not None)
        reasons = Counter(str(r.extra["code_reason"]) for r in results if "code_reason" in r.extra)
        with self._lock:
            self._last_batch = Counter({**batch, "requests": len(results)})
            self._last_reasons = reasons
            for name, number in self._last_batch.items():
                self.counts[name] += number
            for result in results:
                if result.failure is not None:
                    self._log_once(result.failure, result.message)
        num_failed = sum(batch.values())
        if num_failed and num_failed == len(results):
            logger.error(
                "every one of %d rewards failed %s; each scored %g. First: %s",
                len(results),
                dict(batch),
                self._failure_score,
                results[0].message,
            )

    def _log_once(self, failure: str, message: str) -> None:
        if (failure, message) in self._logged or len(self._logged) > MAX_LOGGED_MESSAGES:
            return
        self._logged.add((failure, message))
        if len(self._logged) > MAX_LOGGED_MESSAGES:
            logger.warning(
                "%d different reward failures logged; further ones are only counted",
                MAX_LOGGED_MESSAGES,
            )
        else:
            logger.warning(
                "reward %s, scored %g: %s (further ones like it are only counted)",
                failure,
                self._failure_score,
                message,
            )


def _encode(index: int, request: RewardRequest) -> bytes:
    arguments = {
        "data_source": request.data_source,
        "solution_str": request.solution,
        "ground_truth": request.ground_truth,
        "extra_info": request.extra_info,
    }
    try:
        return pickle.dumps(arguments, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise ValueError(
            f"request {index} ({request.data_source!r}) cannot be sent to a worker: {error}; keep "
            "plain data in ground_truth and extra_info"
        ) from error


def _score_one(
    idle: "queue.SimpleQueue[WorkerProcess]", body: bytes, timeout_s: float, failure_score: float
) -> RewardResult:
    # There are as many threads as workers, so one is always idle.
    worker = idle.get()
    try:
        if not worker.is_alive():
            worker.start()
        try:
            reply = worker.exchange(body, timeout_s)
        except WorkerLate:
            worker.kill()
            message = f"no score within timeout_s = {timeout_s:g} s"
            return RewardResult(failure_score, "timeout", message)
        except WorkerDied as death:
            worker.kill()
            return RewardResult(failure_score, "crash", str(death))
        if reply["is_last"]:
            worker.kill()
        if reply["failure"] is not None:
            return RewardResult(failure_score, reply["failure"], reply["message"])
        return RewardResult(reply["score"], None, "", reply["extra"])
    finally:
        idle.put(worker)


def _close(executor: ThreadPoolExecutor, workers: list[WorkerProcess], owner_pid: int) -> None:
    if os.getpid() != owner_pid:
        return  # a forked copy of the pool; the workers are its parent's
    for worker in workers:
        worker.is_closing = True
    executor.shutdown(wait=True, cancel_futures=True)
    for worker in workers:
        worker.kill()
