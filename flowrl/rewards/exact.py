"""Equality of strings."""

from typing import Any

from flowrl.rewards.answer import first_part


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> float:
    """1.0 if the stripped response equals the stripped ground truth, else 0.0.

    `extra_info` may limit it to its first line (see `first_part`). Case and inner spaces matter; no
    tag is looked for.
    """
    return float(first_part(solution_str, extra_info) == str(ground_truth).strip())
