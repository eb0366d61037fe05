"""Accuracies with intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 4000
DRAWS_AT_ONCE = 1 << 20  # 8 MB


@dataclass(frozen=True)
class Accuracy:
    """A mean accuracy over prompts and its 95 % bootstrap interval, each in [0, 1]."""

    mean: float
    low: float
    high: float


def bootstrap_interval(per_prompt: Sequence[float], seed: int = 0) -> Accuracy:
    """Mean of `per_prompt` [P] and its 95 % percentile bootstrap interval over prompts.

    Prompts are resampled, not responses: responses to one prompt are not independent. Raises
    ValueError without a prompt.
    """
    values = np.asarray(per_prompt, dtype=np.float64)
    if len(values) == 0:
        raise ValueError("there is no prompt to take a mean over: give one value a prompt")
    means = [values[draws].mean(axis=1) for draws in resamples(len(values), seed)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Accuracy(float(values.mean()), float(low), float(high))


def resamples(num_prompts: int, seed: int) -> Iterator[np.ndarray]:
    """Indices [R, num_prompts] of prompts drawn with replacement, 4000 rows in all, some at a time.

    The draws do not depend on how many come at a time.
    """
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWS_AT_ONCE // num_prompts)
    for first in range(0, NUM_RESAMPLES, at_once):
        num_rows = min(at_once, NUM_RESAMPLES - first)
        yield generator.integers(0, num_prompts, (num_rows, num_prompts))
