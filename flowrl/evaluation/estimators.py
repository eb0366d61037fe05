"""What n samples of a prompt say about k samples of it: pass@k and maj@k, without bias.

Both are means over all subsets of k of the n samples, so that no sample is favoured and maj@k of a
small k uses all n. They are computed exactly, not by drawing subsets.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb

import numpy as np

# comb(1024, 512) is the largest that a float64 holds with room for a sum.
MAX_SAMPLES = 1024


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the n samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), as the product 1 - prod_{i = n-c+1 .. n} (1 - k / i), which neither
    overflows nor cancels. Source: Chen et al. (arXiv 2107.03374), Eq. 1.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    _check(num_samples, k)
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}: give 0 to num_samples = {num_samples}")
    if num_samples - num_correct < k:
        return 1.0
    product = 1.0
    for i in range(num_samples - num_correct + 1, num_samples + 1):
        product *= 1 - k / i
    return 1 - product


def majority_at_k(
    class_sizes: Sequence[int], class_scores: Sequence[float], num_samples: int, k: int
) -> float:
    """Expected score of the majority answer among k of the n samples, ties broken by a fair draw.

    Samples are grouped into classes of equivalent answers: `class_sizes` [m], and `class_scores`
    [m], the share of each class that is correct. Samples outside every class have no answer: they
    can be drawn but do not vote, and if nobody votes the score is 0.

    sum_j score_j sum_t C(c_j, t) sum_s W_jt(k - t, s) / (s + 1) / C(n, k)

    where t is the winner's count and W_jt(u, s) the number of ways to draw u of the other samples
    such that no other class has more than t and s of them have exactly t: the coefficients of a
    product of one polynomial a class. All terms are positive, so nothing cancels. Classes of one
    size and score are counted once, and classes smaller than t draw freely, as the silent do: of
    1024 samples, all different, that takes a second and not an hour.

    Raises ValueError unless 1 <= k <= n <= 1024 and the classes fit into n.
    """
    _check(num_samples, k)
    if num_samples > MAX_SAMPLES:
        raise ValueError(f"num_samples is {num_samples}: at most {MAX_SAMPLES} can be counted")
    if len(class_sizes) != len(class_scores) or min(class_sizes, default=1) < 1:
        raise ValueError(f"class_sizes is {list(class_sizes)}: give one size and score a class")
    num_silent = num_samples - sum(class_sizes)
    if num_silent < 0:
        raise ValueError(f"class_sizes is {list(class_sizes)}: more than {num_samples} samples")
    total = 0.0
    alike = Counter(zip(class_sizes, class_scores, strict=True))
    for (size, score), num_alike in alike.items():
        if score == 0:
            continue
        others = list(class_sizes)
        others.remove(size)
        for top in range(1, min(size, k) + 1):
            if num_silent + sum(min(c, top) for c in others) < k - top:
                continue  # the others cannot be so few
            ways = _ways(others, num_silent, top, k - top)
            shares = ways / np.arange(1, len(ways) + 1)
            total += num_alike * score * comb(size, top) * float(shares.sum())
    return total / comb(num_samples, k)


def _ways(others: Sequence[int], num_silent: int, top: int, rest: int) -> np.ndarray:
    """Ways to draw `rest` samples, no class above `top`, by the number of classes that reach it."""
    if top == 1:  # whoever votes reaches it
        ways = np.zeros(rest + 1)
        ways[0] = 1.0
        for size in others:
            ways[1:] += size * ways[:-1]
        return ways * [float(comb(num_silent, rest - voting)) for voting in range(rest + 1)]
    num_free = num_silent + sum(size for size in others if size < top)
    ways = np.zeros((rest + 1, rest // top + 1))
    drawn = min(num_free, rest)
    ways[: drawn + 1, 0] = [comb(num_free, u) for u in range(drawn + 1)]
    for size in others:
        if size < top:
            continue
        grown = np.zeros_like(ways)
        for u in range(min(size, top - 1, rest) + 1):
            grown[u:] += comb(size, u) * ways[: rest + 1 - u]
        if top <= rest:
            grown[top:, 1:] += comb(size, top) * ways[: rest + 1 - top, :-1]
        ways = grown
    return ways[rest]


def _check(num_samples: int, k: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}: give 1 to num_samples = {num_samples}")
