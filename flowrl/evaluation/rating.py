"""A Codeforces rating from solved and unsolved problems of known difficulty."""

from collections.abc import Sequence

import numpy as np

from flowrl.intervals import Accuracy, resamples

LOWEST, HIGHEST = 0.0, 4000.0
SCALE = 400.0
NUM_HALVINGS = 32  # to a millionth of a point


def estimate_rating(
    difficulties: Sequence[float], solve_rates: Sequence[float], seed: int = 0
) -> Accuracy:
    """The rating r whose expected number of solved problems is the observed one, with its interval.

    sum_i 1 / (1 + 10^((d_i - r) / 400)) = sum_i s_i

    difficulties: [P] ratings d_i of the problems; Codeforces rates a problem d when participants
    rated d solve it half of the time. solve_rates: [P] shares s_i of single attempts that passed.
    The left side grows with r, so r is unique; it is the maximum-likelihood rating of the Elo
    model. With nothing solved (everything solved) it is the bound 0 (4000). The interval is the
    95 % percentile bootstrap over problems. No contest, opponent or penalty enters, so this is not
    CodeElo's number (arXiv 2501.01257), which ranks the model in the standings of real contests.

    Raises ValueError for no problem or for rates outside [0, 1].
    """
    levels = np.asarray(difficulties, dtype=np.float64)
    rates = np.asarray(solve_rates, dtype=np.float64)
    if len(levels) == 0 or levels.shape != rates.shape:
        raise ValueError(f"{levels.size} difficulties, {rates.size} rates: give one rate a problem")
    if not ((rates >= 0) & (rates <= 1)).all():
        raise ValueError(f"solve_rates run from {rates.min()} to {rates.max()}: give shares")
    resampled = [
        _solve(levels[draws], rates[draws].sum(axis=1)) for draws in resamples(len(levels), seed)
    ]
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5])
    point = _solve(levels[None], rates.sum()[None])[0]
    return Accuracy(float(point), float(low), float(high))


def _solve(levels: np.ndarray, solved: np.ndarray) -> np.ndarray:
    """Ratings [R] for difficulties [R, P] and numbers of solved problems [R], by bisection."""
    # On the scale of odds, 1 / (1 + 10^((d - r) / 400)) is a quotient.
    difficulty = 10 ** (levels / SCALE)
    low, high = np.full(len(levels), LOWEST), np.full(len(levels), HIGHEST)
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        strength = 10 ** (middle[:, None] / SCALE)
        is_low = (strength / (strength + difficulty)).sum(axis=1) < solved
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return (low + high) / 2
