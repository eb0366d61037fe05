"""Rewards: one function a file, run in worker processes by `RewardPool`."""

from typing import Protocol

from flowrl.rewards.builtin import REWARDS
from flowrl.rewards.normalize import group_normalize
from flowrl.rewards.pool import RewardPool, RewardRequest, RewardResult

__all__ = [
    "REWARDS",
    "RewardPool",
    "RewardRequest",
    "RewardResult",
    "RewardScorer",
    "group_normalize",
]


class RewardScorer(Protocol):
    """What the training loop asks of the rewards."""

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        """Score the requests, in their order."""
        ...

    def metrics(self) -> dict[str, float]:
        """Fractions of the last batch that failed, by metric name."""
        ...

    def close(self) -> None:
        """Stop the workers."""
        ...
