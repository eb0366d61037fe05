"""How different the responses to one prompt are, measured without a judge.

Words are runs of letters and digits or single other visible characters, in lower case, so "x+1" is
three words. All functions are pure and deterministic; they look at one prompt's responses.
"""

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence

WORD = re.compile(r"[^\W_]+|[^\w\s]|_")
MAX_ORDER = 4


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return WORD.findall(text.lower())


def solution_form(text: str) -> str:
    r"""What stays of a response without case, spacing, punctuation and LaTeX or Markdown markup.

    Letters, digits and the operators + - * / = < > ^ ! remain; the commands \left, \right, \text,
    \mathrm, \boxed and \[d,t]frac's prefix go, so "$\dfrac{1}{2}$." and "\frac 12" have one form.
    """
    text = re.sub(r"\\(left|right|text|mathrm|boxed|displaystyle)(?![a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\*\*(\S[^*]*)\*\*", r"\1", text)  # bold; 2**3 stays
    return re.sub(r"[^\w+\-*/=<>^!]|_", "", text.lower())


def num_distinct(items: Sequence[Hashable | None]) -> int:
    """The number of different items, None (no answer) not counted."""
    return len(set(items) - {None})


def answer_entropy(classes: Sequence[Hashable | None]) -> float:
    """Entropy in nats of the distribution of answers, -sum_a p_a log p_a; None has no answer.

    p_a is the share of the responses with an answer whose answer is a. 0 without any answer.
    exp of it is the effective number of answers (Hill number of order 1): 1 when all agree, m when
    m answers are equally frequent. It estimates the model's entropy from below: n responses cannot
    show more than log n.
    """
    counts = Counter(c for c in classes if c is not None)
    total = sum(counts.values())
    return sum(-c / total * math.log(c / total) for c in counts.values()) + 0.0


def distinct_n(texts: Sequence[str], order: int) -> float:
    """Different n-grams of words over all n-grams of all texts, in (0, 1]; 0 without any.

    Source: Li et al. (arXiv 1510.03055). n-grams do not reach over the end of a text.
    """
    if order < 1:
        raise ValueError(f"order is {order}: give 1 or more")
    counts: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        counts.update(_ngrams(words(text), order))
    total = sum(counts.values())
    return len(counts) / total if total else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others, in [0, 1]: 1 when all are the same.

    BLEU_i = min(1, exp(1 - r_i / c_i)) * (prod_{n = 1..4} p_n)^(1/4), where c_i is the number of
    words, r_i the length of the other text nearest to it (the shorter of two equally near) and
    p_n = (clipped matches + [n > 1]) / (n-grams + [n > 1]); a match is clipped at the most
    occurrences in one other text. A text without words has BLEU 1 if another has none either, else
    0. Source: Zhu et al. (arXiv 1802.01886) for self-BLEU, Papineni et al. (2002) for BLEU, Lin and
    Och (2004) for the added one, which keeps short texts from scoring 0.

    Raises ValueError for fewer than two texts.
    """
    if len(texts) < 2:
        raise ValueError(f"self_bleu got {len(texts)} texts: give two or more")
    sequences = [words(text) for text in texts]
    lengths = [len(sequence) for sequence in sequences]
    precisions = [_clipped_precisions(sequences, order) for order in range(1, MAX_ORDER + 1)]
    scores = []
    for i, length in enumerate(lengths):
        others = lengths[:i] + lengths[i + 1 :]
        if length == 0:
            scores.append(float(0 in others))
            continue
        nearest = min(others, key=lambda other: (abs(other - length), other))
        product = math.prod(by_text[i] for by_text in precisions)
        scores.append(min(1.0, math.exp(1 - nearest / length)) * product ** (1 / MAX_ORDER))
    return math.fsum(scores) / len(scores)


def _clipped_precisions(sequences: Sequence[Sequence[str]], order: int) -> list[float]:
    """p_order of every sequence against the others."""
    counts = [Counter(_ngrams(sequence, order)) for sequence in sequences]
    # The most occurrences in one text and in another: without text i the most is one of the two.
    first: dict[tuple[str, ...], tuple[int, int]] = {}
    second: dict[tuple[str, ...], int] = {}
    for i, count in enumerate(counts):
        for ngram, number in count.items():
            best, owner = first.get(ngram, (0, -1))
            if number > best:
                second[ngram] = best
                first[ngram] = (number, i)
            elif number > second[ngram]:
                second[ngram] = number
    added = int(order > 1)
    precisions = []
    for i, count in enumerate(counts):
        matches = sum(
            min(number, second[ngram] if first[ngram][1] == i else first[ngram][0])
            for ngram, number in count.items()
        )
        total = count.total() + added
        precisions.append((matches + added) / total if total else 0.0)
    return precisions


def _ngrams(sequence: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(sequence[i : i + order]) for i in range(len(sequence) - order + 1)]
