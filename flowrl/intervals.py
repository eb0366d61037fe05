"""Accuracies with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 4000


@dataclass(frozen=True)
class Accuracy:
    """A mean accuracy over prompts and its 95 % bootstrap interval, each in [0, 1]."""

    mean: float
    low: float
    high: float


def bootstrap_interval(per_prompt: Sequence[float], seed: int = 0) -> Accuracy:
    """Mean of `per_prompt` [P] and its 95 % percentile bootstrap interval over prompts.

    Prompts are resampled, not responses: responses to one prompt are not independent.
    """
    values = np.asarray(per_prompt, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return Accuracy(float(values.mean()), float(low), float(high))
