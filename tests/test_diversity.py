"""Diversity measures against values worked out by hand."""

import math

import pytest

from flowrl.diversity import (
    answer_entropy,
    distinct_n,
    num_distinct,
    self_bleu,
    solution_form,
    words,
)


def test_words_are_letters_and_digits_or_single_signs() -> None:
    assert words("So x_1 = 3.5,\n\\frac{A}") == [
        *("so", "x", "_", "1", "=", "3", ".", "5", ",", "\\", "frac", "{", "a", "}"),
    ]
    assert words(" \n") == []


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("3 + 5 = 8.", "3+5=8"),
        (r"$\dfrac{1}{2}$.", "frac12"),
        (r"\frac 12", "frac12"),
        (r"\left( x \right)", "x"),
        ("**Answer:** B", "answerb"),
        ("answer: (b)", "answerb"),
        ("5 + 3 = 8", "5+3=8"),
        ("", ""),
    ],
)
def test_solution_form(text: str, form: str) -> None:
    assert solution_form(text) == form


def test_num_distinct_ignores_no_answer() -> None:
    assert num_distinct(["a", "b", None, "a"]) == 2
    assert num_distinct([None]) == num_distinct([]) == 0


@pytest.mark.parametrize(
    ("classes", "effective"),
    [
        (["a"] * 5, 1.0),
        (["a", "b", "c", "d"], 4.0),
        (["a", "b", None, None], 2.0),
        ([None, None], 1.0),
        ([], 1.0),
        (["a", "a", "a", "b"], 4 / 3**0.75),
    ],
)
def test_effective_number_of_answers(classes: list, effective: float) -> None:
    entropy = answer_entropy(classes)
    assert entropy >= 0
    assert math.exp(entropy) == pytest.approx(effective, rel=1e-12)


def test_distinct_n() -> None:
    # a b a | a b: unigrams a b a a b, bigrams ab ba ab
    assert distinct_n(["a b a", "A b"], 1) == pytest.approx(2 / 5)
    assert distinct_n(["a b a", "A b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b a", "A b"], 3) == 1.0
    assert distinct_n(["a b"], 3) == distinct_n([], 1) == 0.0
    with pytest.raises(ValueError, match="order is 0"):
        distinct_n(["a"], 0)


def test_self_bleu_of_equal_and_of_foreign_texts() -> None:
    same = "one two three four five six"
    assert self_bleu([same] * 3) == pytest.approx(1.0, abs=1e-15)
    # Nothing in common: no unigram matches, so the product is 0.
    assert self_bleu(["one two three", "four five six"]) == 0.0


def test_self_bleu_by_hand() -> None:
    # Text 1 "a b c d" against "a b c e": 3/4 unigrams, (2+1)/(3+1), (1+1)/(2+1), (0+1)/(1+1),
    # lengths equal. The other one is the mirror image.
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert self_bleu(["a b c d", "a b c e"]) == pytest.approx(expected, rel=1e-12)


def test_self_bleu_clips_and_punishes_brevity() -> None:
    # "a a a a" against "a b": unigrams clipped to 1 of 4, (0+1)/(3+1), (0+1)/(2+1), (0+1)/(1+1).
    first = (1 / 4 * 1 / 4 * 1 / 3 * 1 / 2) ** 0.25
    # "a b" against "a a a a": 1/2, (0+1)/(1+1), (0+1)/(0+1), the same; brevity exp(1 - 4/2).
    second = math.exp(1 - 4 / 2) * (1 / 2 * 1 / 2) ** 0.25
    assert self_bleu(["a a a a", "a b"]) == pytest.approx((first + second) / 2, rel=1e-12)


def test_self_bleu_takes_the_most_occurrences_in_one_other_text() -> None:
    # Of "a a" the best other text for its unigrams is "a a b", which has both.
    texts = ["a a", "a a b", "a c"]
    # Clipped: 2/2, (1+1)/(1+1), 1, 1; nearest length 2 ("a c"), so no brevity.
    first = 1.0
    # "a a b": a twice in "a a", b nowhere: 2/3, (1+1)/(2+1), (0+1)/(1+1), 1; nearest length 2.
    second = (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25
    # "a c": 1/2, (0+1)/(1+1), 1, 1; nearest length 2.
    third = (1 / 2 * 1 / 2) ** 0.25
    assert self_bleu(texts) == pytest.approx((first + second + third) / 3, rel=1e-12)


def test_self_bleu_of_empty_texts_and_of_one() -> None:
    assert self_bleu(["", ""]) == 1.0
    assert self_bleu(["", "a b"]) == 0.0
    with pytest.raises(ValueError, match="got 1 texts"):
        self_bleu(["a"])
