"""Rewards relative to their group: the r^ of FlowRL, GRPO's advantage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def group_normalize(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    unbiased: bool = True,
    epsilon: float = 1e-6,
) -> torch.Tensor:
    """Return (r - mean of its group) / (standard deviation of its group + epsilon).

    arXiv 2509.15207, Eq. 7. The paper names neither the kind of standard deviation nor an epsilon;
    the defaults are those of its code. A group of one keeps r / (1 + epsilon); a group of equal
    rewards gives 0, also with epsilon = 0.

    rewards: [B] floating point. group_ids: [B] integer, any values in any order.
    Computed in float64 on the CPU, returned with the dtype and device of rewards.
    Raises ValueError for wrong shapes or dtypes, a negative epsilon and a non-finite reward.
    """
    # Reward workers import this package in a process each, and torch costs seconds to import.
    import torch

    if rewards.ndim != 1 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards must be floating point of shape [B], "
            f"got {rewards.dtype} {list(rewards.shape)}"
        )
    is_integer = not (group_ids.is_floating_point() or group_ids.is_complex())
    if group_ids.shape != rewards.shape or not is_integer:
        raise ValueError(
            f"group_ids must be integers of shape {list(rewards.shape)}, "
            f"got {group_ids.dtype} {list(group_ids.shape)}"
        )
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"epsilon must be finite and >= 0, got {epsilon}")
    values = rewards.detach().to("cpu", torch.float64)
    bad = (~values.isfinite()).nonzero()
    if len(bad):
        index = int(bad[0])
        raise ValueError(
            f"rewards[{index}] is {values[index].item()}: a reward function must return a "
            "finite number"
        )

    _, group = torch.unique(group_ids.detach().cpu(), return_inverse=True)
    counts = torch.bincount(group).double()
    zeros = torch.zeros_like(counts)
    # Relative to the group's minimum, so that equal rewards have a deviation of exactly 0: the mean
    # of three times 0.1 is not 0.1, and with epsilon = 0 the difference would be divided by itself.
    lowest = zeros.scatter_reduce(0, group, values, "amin", include_self=False)[group]
    shifted = values - lowest
    deviation = shifted - (zeros.index_add(0, group, shifted) / counts)[group]
    squares = zeros.index_add(0, group, deviation.square())
    std = (squares / (counts - int(unbiased)).clamp(min=1)).sqrt()[group]
    normalized = torch.where(std > 0, deviation / (std + epsilon), 0.0)
    normalized = torch.where(counts[group] == 1, values / (1 + epsilon), normalized)
    return normalized.to(rewards.device, rewards.dtype)
