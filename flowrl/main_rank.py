"""What the main rank does for all ranks: sampling and rewards. The others wait and receive.

Every rank runs the same loop on the same samples; what has side effects, or is not fixed by the
seed, happens once. An error on the main rank is raised on every rank. One in the middle of a
collective cannot be told to the others, which wait in it: it ends the main rank, and the watchdog
then ends them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from flowrl.rewards import RewardPool, RewardRequest, RewardResult
from flowrl.rollout import Response, RolloutEngine, SamplingParams

T = TypeVar("T")
SHARED_ERRORS = (ValueError, RuntimeError, OSError, ImportError)  # that on_main_rank hands on


class GatherError(Exception):
    """A rank failed in a collective. None of SHARED_ERRORS: the others receive no broadcast now."""


def is_main_rank() -> bool:
    return dist.get_rank() == 0


def on_main_rank(compute: Callable[[], T]) -> T:
    """Run `compute` on the main rank and return its result, or raise its error, on every rank."""
    result: list[object] = [None, None]
    if is_main_rank():
        try:
            result[0] = compute()
        except SHARED_ERRORS as error:
            result[1] = error
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        assert isinstance(result[1], BaseException)
        raise result[1]
    return result[0]  # pyright: ignore[reportReturnType]


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Pass on tensors that all ranks gather; an error of the gathering becomes a GatherError."""
    try:
        yield from tensors
    except SHARED_ERRORS as error:
        raise GatherError(
            f"rank {dist.get_rank()} failed while all ranks gathered tensors: "
            f"{type(error).__name__}: {error}"
        ) from error


class MainRankEngine:
    """A rollout engine that lives on the main rank alone; `engine` is None on the others."""

    def __init__(self, engine: RolloutEngine | None) -> None:
        self.engine = engine
        self.weight_version = 0

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        """Sample on the main rank; every rank receives the responses."""

        def sample() -> list[list[Response]]:
            assert self.engine is not None
            return self.engine.generate(prompts, params, seed)

        return on_main_rank(sample)

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        """Start on the main rank; what is returned waits there and gives every rank the result."""
        waits: list[Callable[[], list[list[Response]]]] = []  # the main rank's

        def start() -> None:
            assert self.engine is not None
            waits.append(self.engine.begin(prompts, params, seed))

        on_main_rank(start)
        return lambda: on_main_rank(lambda: waits[0]())

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Hand gathered weights to the engine; every rank takes part in gathering each of them.

        Raises GatherError, on that rank alone, where the gathering itself fails.
        """
        weights = gathered(named_weights)

        def take() -> None:
            assert self.engine is not None
            try:
                self.engine.publish(weights, version)
            finally:  # an engine that gives up early must not leave the others in a collective
                deque(weights, maxlen=0)

        if self.engine is None:
            deque(weights, maxlen=0)
        on_main_rank(take)
        self.weight_version = version

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()


class MainRankRewards:
    """Reward workers of the main rank; `pool` is None on the others."""

    def __init__(self, pool: RewardPool | None) -> None:
        self.pool = pool

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        """Score on the main rank; every rank receives the results."""

        def score() -> list[RewardResult]:
            assert self.pool is not None
            return self.pool.score(requests)

        return on_main_rank(score)

    def metrics(self) -> dict[str, float]:
        """The pool's failure counts."""

        def metrics() -> dict[str, float]:
            assert self.pool is not None
            return self.pool.metrics()

        return on_main_rank(metrics)

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
