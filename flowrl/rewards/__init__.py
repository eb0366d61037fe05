"""Rewards: one function a file, run in worker processes by `RewardPool`."""

from flowrl.rewards.builtin import REWARDS
from flowrl.rewards.normalize import group_normalize
from flowrl.rewards.pool import RewardPool, RewardRequest, RewardResult

__all__ = ["REWARDS", "RewardPool", "RewardRequest", "RewardResult", "group_normalize"]
