"""pass@k, maj@k and the rating against enumeration and closed forms."""

import time
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from flowrl.evaluation.estimators import majority_at_k, pass_at_k
from flowrl.evaluation.rating import estimate_rating
from flowrl.intervals import bootstrap_interval


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int) -> None:
    for c in range(n + 1):
        is_correct = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(s) for s in combinations(is_correct, k)]
            assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(1000, 1, 100), (10**6, 3, 1000), (400, 200, 64)])
def test_pass_at_k_is_stable(n: int, c: int, k: int) -> None:
    exact = 1 - Fraction(comb(n - c, k), comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), rel=1e-10)


def test_pass_at_k_edges() -> None:
    assert pass_at_k(16, 0, 16) == 0.0
    assert pass_at_k(16, 1, 16) == 1.0
    assert pass_at_k(16, 4, 1) == 0.25
    for arguments in ((4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)):
        with pytest.raises(ValueError, match="give"):
            pass_at_k(*arguments)


def enumerated_majority(answers: list[str | None], scores: dict[str, float], k: int) -> float:
    """Mean over all subsets of k of the mean score of the most frequent answers."""
    total = Fraction(0)
    subsets = list(combinations(answers, k))
    for subset in subsets:
        votes = Counter(a for a in subset if a is not None)
        if votes:
            most = max(votes.values())
            winners = [Fraction(scores[a]) for a, number in votes.items() if number == most]
            total += sum(winners) / len(winners)
    return float(total / len(subsets))


@pytest.mark.parametrize(
    ("answers", "scores"),
    [
        ("aaab", {"a": 1, "b": 0}),
        ("aabb", {"a": 1, "b": 0}),
        ("abcdefgh", {"a": 1, **dict.fromkeys("bcdefgh", 0)}),
        ("aaabbbccd", {"a": 0, "b": 1, "c": 0, "d": 0}),
        ("aabbcc---", {"a": 0.5, "b": 1, "c": 0}),
        ("a--------", {"a": 1}),
        ("---", {}),
        ("aaaaabbbbcc-", {"a": 0.25, "b": 1, "c": 0.75}),
    ],
)
def test_majority_at_k_is_the_mean_over_all_subsets(answers: str, scores: dict) -> None:
    listed = [None if a == "-" else a for a in answers]
    sizes = Counter(a for a in listed if a is not None)
    for k in range(1, len(answers) + 1):
        found = majority_at_k(
            list(sizes.values()), [float(scores[a]) for a in sizes], len(answers), k
        )
        assert found == pytest.approx(enumerated_majority(listed, scores, k), abs=1e-12), k


def test_majority_at_k_of_all_samples() -> None:
    assert majority_at_k([3, 2], [1.0, 0.0], 5, 5) == 1.0
    assert majority_at_k([2, 3], [1.0, 0.0], 5, 5) == 0.0
    assert majority_at_k([2, 2, 2], [1.0, 0.0, 0.0], 6, 6) == pytest.approx(1 / 3)
    assert majority_at_k([2, 1], [1.0, 0.0], 64, 64) == 1.0  # 61 have no answer and do not vote


@pytest.mark.parametrize("n", [64, 1024])
def test_majority_at_k_of_many_samples_is_a_share(n: int) -> None:
    sizes = [n // 2, n // 4, n - n // 2 - n // 4]
    values = [majority_at_k(sizes, [1.0, 0.0, 0.0], n, k) for k in (1, 2, 8)]
    assert values[0] == pytest.approx(0.5, rel=1e-12)
    assert values[1] == pytest.approx(0.5, rel=1e-12)  # two that differ are a tie
    assert 0.5 < values[2] < 1
    everyone = sum(majority_at_k(sizes, [float(i == j) for j in range(3)], n, 8) for i in range(3))
    assert everyone == pytest.approx(1.0, rel=1e-12)


def test_majority_at_k_of_many_classes_is_fast() -> None:
    """All 1024 different, one of them right: 1 / 1024 whatever k; then classes of every size."""
    started = time.process_time()
    for k in (1, 2, 512, 1023, 1024):
        value = majority_at_k([1] * 1024, [1.0, *[0.0] * 1023], 1024, k)
        assert value == pytest.approx(1 / 1024, rel=1e-10)
    sizes = [*range(1, 45), *[1] * 34]
    everyone = majority_at_k(sizes, [1.0] * len(sizes), 1024, 512)
    assert everyone == pytest.approx(1.0, rel=1e-10)
    assert time.process_time() - started < 60


def test_majority_at_k_refuses_impossible_counts() -> None:
    for arguments in (([3], [1.0], 2, 1), ([1], [1.0, 0.0], 2, 1), ([0], [1.0], 2, 1)):
        with pytest.raises(ValueError, match="class_sizes"):
            majority_at_k(*arguments)
    with pytest.raises(ValueError, match="at most 1024"):
        majority_at_k([1], [1.0], 1025, 1)


def test_rating_solves_its_equation() -> None:
    levels, rates = [800, 1200, 1600, 2400], [1.0, 0.75, 0.25, 0.0]
    found = estimate_rating(levels, rates)
    expected = sum(1 / (1 + 10 ** ((d - found.mean) / 400)) for d in levels)
    assert expected == pytest.approx(sum(rates), abs=1e-7)
    assert found.low < found.mean < found.high
    # Half of the problems of one level: the rating is that level.
    assert estimate_rating([1500] * 4, [1, 0, 1, 0]).mean == pytest.approx(1500)
    assert estimate_rating([1500], [10 / 11]).mean == pytest.approx(1900)


def test_rating_is_bounded_and_refuses_nonsense() -> None:
    assert estimate_rating([800, 900], [0, 0]).mean == pytest.approx(0, abs=1e-5)
    assert estimate_rating([800, 900], [1, 1]).mean == pytest.approx(4000, abs=1e-5)
    with pytest.raises(ValueError, match="one rate a problem"):
        estimate_rating([], [])
    with pytest.raises(ValueError, match="give shares"):
        estimate_rating([800], [1.5])


def test_rating_recovers_the_elo_model() -> None:
    generator = np.random.default_rng(3)
    levels = generator.uniform(800, 2600, 400)
    solved = generator.random(400) < 1 / (1 + 10 ** ((levels - 1700) / 400))
    found = estimate_rating(levels.tolist(), solved.astype(float).tolist())
    assert found.low < 1700 < found.high
    assert found.high - found.low < 200


@pytest.mark.parametrize("num_prompts", [1, 3, 700, 5000])
def test_intervals_are_those_of_all_draws_at_once(num_prompts: int) -> None:
    values = np.random.default_rng(5).random(num_prompts)
    draws = np.random.default_rng(0).integers(0, num_prompts, (4000, num_prompts))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    found = bootstrap_interval(values.tolist())
    assert (found.mean, found.low, found.high) == (values.mean(), low, high)


def test_intervals_need_little_memory_and_a_prompt() -> None:
    tracemalloc.start()
    bootstrap_interval([0.0, 1.0] * 10_000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 40 << 20  # 1.2 GB with all draws at once
    with pytest.raises(ValueError, match="no prompt to take a mean over"):
        bootstrap_interval([])
