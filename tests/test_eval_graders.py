r"""What the graders make of answers whose worth is known.

Each row: response, ground truth, whether a person would accept it, and the verdicts of math-verify
and of DAPO's rule. Where a verdict differs from the person's, the grader is known to be wrong: the
DAPO rule knows no algebra and only the last 300 characters, math-verify reads no bare words, takes
hedges and joins several boxes. A change of either verdict, also for the better, shows here.
"""

import pytest

from flowrl.evaluation.choice import last_letter
from flowrl.evaluation.grade import answer_of
from flowrl.rewards import RewardPool, RewardRequest, RewardResult

GRADE = "flowrl.evaluation.math_answers:grade"
CLASSIFY = "flowrl.evaluation.math_answers:classify"
COLUMN = r"\begin{pmatrix}%s\\%s\end{pmatrix}"
FAR = "\n" + 100 * "more "  # 500 characters

# fmt: off
PAIRS = [
    # whole numbers
    (r"Answer: \boxed{204}", "204", True, True, True),
    ("Answer: 204", "204", True, True, True),
    ("Answer: $204$", "204", True, True, True),
    ("Answer: 204.", "204", True, True, True),
    (r"The answer is \boxed{204}.", "204", True, True, False),
    ("204", "204", True, True, False),
    ("Answer: 0204", "204", True, True, False),
    ("Answer: 204.0", "204", True, True, False),
    ("Answer: 2.04e2", "204", True, False, False),
    (r"Answer: \boxed{1,234}", "1234", True, True, True),
    ("Answer: 1234", "1,234", True, True, True),
    ("Answer: -5", "-5", True, True, True),
    (r"Answer: \boxed{- 5}", "-5", True, True, True),
    ("Answer: 5", "-5", False, False, False),
    ("Answer: 205", "204", False, False, False),
    ("Answer: x = 204", "204", True, True, True),
    ("Answer: 204 or 205", "204", False, True, False),
    # fractions and decimals
    (r"Answer: \boxed{\frac{1}{2}}", r"\frac{1}{2}", True, True, True),
    (r"Answer: $\dfrac{1}{2}$", r"\frac{1}{2}", True, True, True),
    (r"Answer: \frac{1}{2}", r"\frac{1}{2}", True, True, True),
    (r"Answer: $\frac12$", r"\frac{1}{2}", True, True, True),
    ("Answer: 1/2", r"\frac{1}{2}", True, True, False),
    ("Answer: 0.5", r"\frac{1}{2}", True, True, False),
    (r"Answer: $\frac{2}{4}$", r"\frac{1}{2}", True, True, False),
    (r"Answer: $-\frac{1}{2}$", r"\frac{-1}{2}", True, True, False),
    (r"Answer: $1\frac{1}{2}$", r"\frac{3}{2}", True, True, False),
    (r"Answer: $\frac{3}{2}$", r"1\frac{1}{2}", True, True, False),
    ("Answer: 0.333", r"\frac{1}{3}", False, False, False),
    # roots, powers, constants, complex numbers
    (r"Answer: $2\sqrt{3}$", r"\sqrt{12}", True, True, False),
    (r"Answer: $\sqrt2$", r"\sqrt{2}", True, True, True),
    (r"Answer: $\frac{1}{\sqrt{2}}$", r"\frac{\sqrt{2}}{2}", True, True, False),
    (r"Answer: $\sqrt{2} + 1$", r"1+\sqrt{2}", True, True, False),
    (r"Answer: $2\pi$", r"2\pi", True, True, True),
    ("Answer: 6.2832", r"2\pi", False, False, False),
    (r"Answer: $2^{10}$", "1024", True, True, False),
    ("Answer: $3+2i$", "2i+3", True, True, False),
    ("Answer: $3-2i$", "3+2i", False, False, False),
    # sets, tuples, intervals
    (r"Answer: $\{1, 2\}$", r"\{1,2\}", True, True, True),
    (r"Answer: $\{2,1\}$", r"\{1,2\}", True, True, False),
    (r"Answer: $\boxed{1, 2}$", "1,2", True, True, True),
    (r"Answer: $\boxed{2, 1}$", "1,2", True, True, False),
    ("Answer: $(1, 2)$", "(1,2)", True, True, True),
    ("Answer: $(2, 1)$", "(1,2)", False, False, False),
    (r"Answer: $\left(1, 2\right)$", "(1,2)", True, True, True),
    ("Answer: $[1,2)$", "[1,2)", True, True, True),
    ("Answer: $(1,2]$", "[1,2)", False, False, False),
    (r"Answer: $(-\infty, 2)$", r"(-\infty,2)", True, True, True),
    ("Answer: $x < 2$", r"(-\infty,2)", True, False, False),
    (r"Answer: $(-\infty,1)\cup(2,\infty)$", r"(-\infty,1) \cup (2,\infty)", True, True, True),
    (r"Answer: $x \in [1,2]$", "[1,2]", True, True, False),
    (r"Answer: $1 \le x \le 2$", "[1,2]", True, False, False),
    # algebra
    ("Answer: $x^2+2x+1$", "(x+1)^2", True, True, False),
    ("Answer: $2x+1$", "1+2x", True, True, False),
    ("Answer: $y=2x+1$", "2x+1", True, True, True),
    ("Answer: $y = 2x+1$", "y=2x+1", True, True, True),
    ("Answer: $x(x+1)$", "x^2+x", True, True, False),
    ("Answer: $" + COLUMN % (1, 2) + "$", COLUMN % (" 1 ", " 2 "), True, True, False),
    ("Answer: $" + COLUMN % (2, 1) + "$", COLUMN % (1, 2), False, False, False),
    # units, percent, money, number bases
    (r"Answer: $12\text{ cm}$", "12", True, True, True),
    ("Answer: 12 cm", "12", True, True, True),
    (r"Answer: $12\text{ cm}^2$", "12", True, True, True),
    (r"Answer: $45^\circ$", "45", True, True, True),
    (r"Answer: $50\%$", "50", True, True, True),
    ("Answer: 50%", "0.5", True, True, False),
    (r"Answer: $\$12$", "12", True, True, True),
    ("Answer: 12 dollars", "12", True, True, True),
    ("Answer: $4210_5$", "4210_5", True, True, True),
    ("Answer: $4210_{5}$", "4210", False, True, False),
    # text
    (r"Answer: $\text{Evelyn}$", r"\text{Evelyn}", True, True, True),
    ("Answer: Evelyn", r"\text{Evelyn}", True, False, True),
    (r"Answer: $\text{Carla}$", r"\text{Evelyn}", False, False, False),
    (r"Answer: \boxed{B}", "B", True, True, True),
    (r"Answer: \boxed{(B)}", "B", True, True, False),
    (r"Answer: \boxed{C}", "B", False, False, False),
    (r"Answer: $11\text{ PM}$", "11 PM", True, False, True),
    # form
    ("", "204", False, False, False),
    ("I do not know.", "204", False, False, False),
    ("Answer: ", "204", False, False, False),
    (r"Answer: \boxed{}", "204", False, False, False),
    (r"\boxed{204", "204", False, False, False),
    ("Answer: **204**", "204", True, True, False),
    ("**Answer:** 204", "204", True, True, False),
    ("Answer: 204\nAnswer: 205", "204", False, False, False),
    (FAR + "Answer: 204", "204", True, True, True),
    ("Answer: 204" + FAR, "204", True, True, False),
    (r"First 7, then \boxed{9}, so 204.", "204", False, False, False),
    (r"\boxed{9} and then \boxed{204}", "204", True, False, False),
    (r"Answer: \boxed{204} \boxed{9}", "204", False, False, False),
    ("Answer: " + 400 * "9", "204", False, False, False),
]
# fmt: on


@pytest.fixture(scope="module")
def verdicts() -> dict[str, list[RewardResult]]:
    requests = [RewardRequest("test", response, truth) for response, truth, *_ in PAIRS]
    results = {}
    for function in (GRADE, "dapo_math"):
        with RewardPool(function, num_workers=1, timeout_s=30.0) as pool:
            results[function] = pool.score(requests)
    return results


@pytest.mark.parametrize(("function", "column"), [(GRADE, 3), ("dapo_math", 4)], ids=["mv", "dapo"])
def test_grader_gives_the_known_verdicts(
    verdicts: dict[str, list[RewardResult]], function: str, column: int
) -> None:
    assert len(PAIRS) >= 60
    for pair, result in zip(PAIRS, verdicts[function], strict=True):
        assert result.failure is None, pair
        assert (result.score >= 1) is pair[column], pair


def test_how_often_each_grader_is_wrong() -> None:
    """The figures of docs/evaluation.md: accepted though wrong, refused though right."""
    wrong = [
        (
            sum(bool(pair[column] and not pair[2]) for pair in PAIRS),
            sum(bool(pair[2] and not pair[column]) for pair in PAIRS),
        )
        for column in (3, 4)
    ]
    assert (len(PAIRS), wrong) == (89, [(2, 6), (0, 31)])


def test_extraction_is_reported(verdicts: dict[str, list[RewardResult]]) -> None:
    found = {
        pair[0]: (a.extra["pred"], b.extra["pred"])
        for pair, a, b in zip(PAIRS, verdicts[GRADE], verdicts["dapo_math"], strict=True)
    }
    assert found[r"Answer: $\dfrac{1}{2}$"] == (r"\frac{1}{2}", r"\frac{1}{2}")
    assert found["Answer: 204 or 205"] == ("204", "204or205")
    assert found[r"The answer is \boxed{204}."] == ("204", "")
    assert found["I do not know."] == ("", "")


def test_what_never_ends_is_a_time_out() -> None:
    with RewardPool(GRADE, num_workers=1, timeout_s=2.0) as pool:
        (result,) = pool.score([RewardRequest("test", "Answer: $9^{9^{9}}$", "204")])
    assert (result.score, result.failure) == (0.0, "timeout")


def test_equal_answers_share_a_class() -> None:
    answers = ["0.5", "7", r"\frac{1}{2}", "x+1", "1+x", "7.0", "blue", "red", "blue", "1/2"]
    with RewardPool(CLASSIFY, num_workers=1, timeout_s=30.0) as pool:
        (result,) = pool.score([RewardRequest("", "", None, {"answers": answers})])
    assert result.failure is None, result.message
    assert result.extra["classes"] == [0, 1, 0, 2, 2, 1, 3, 4, 3, 0]


@pytest.mark.parametrize(
    ("grader", "response", "pred", "answer"),
    [
        ("numeric", "so 3 + 4 = 7.0", None, "7"),
        ("numeric", "0", None, "0"),
        ("numeric", "none", None, None),
        ("gym", "I say <answer> a  b </answer>", None, "a b"),
        ("expression", " ", None, None),
        ("dapo_math", "Answer: 7", "7", "7"),
        ("dapo_math", "7", "", None),
        ("code", "print(1)", None, None),
        ("exact", "so <answer>a</answer>", None, "so <answer>a</answer>"),
    ],
)
def test_answer_by_grader(grader: str, response: str, pred: str | None, answer: str | None) -> None:
    extra = {} if pred is None else {"pred": pred}
    request = RewardRequest("test", response, "7", {})
    assert answer_of(grader, request, RewardResult(1.0, extra=extra)) == answer
    if grader == "dapo_math":
        assert answer_of(grader, request, RewardResult(0.0, "timeout")) is None


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"Answer: \boxed{B}", "B"),
        ("Answer: B", "B"),
        ("answer: (C).", "C"),
        ("**Answer:** D", "D"),
        ("**Answer**: **A**", "A"),
        ("The answer is C, since A fails.", "C"),
        (r"Answer: $\boxed{\text{D}}$", "D"),
        (r"so \boxed{A}", "A"),
        (r"\boxed{(B)}", "B"),
        ("Answer: A\nNo. Answer: D", "D"),
        ("Answer: A, so \\boxed{B}", "B"),
        (r"\boxed{\mathbf{B}}", "B"),
        (r"\boxed{\boldsymbol{C}}", "C"),
        (r"\boxed{\rm{B}}", "B"),
        (r"\boxed{{\bf D}}", "D"),
        (r"\boxed{(\text{B})}", "B"),
        (r"\boxed{\textbf{(B)}\ 25}", "B"),
        (r"\boxed{B: 25}", "B"),
        (r"\boxed{$B$}", "B"),
        (r"\boxed{\text{Option B}}", "B"),
        (r"Answer: \(B\)", "B"),
        (r"Answer: \[ \boxed{B} \]", "B"),
        ("Answer: option B", "B"),
        ("the answer is option C", "C"),
        ("The correct answer is: **(C)**", "C"),
        ("The answer is I think right", ""),
        ("Answer: E", ""),
        (r"\boxed{X}", ""),
        (r"\boxed{\alpha B}", ""),
        ("Answer: Barium", ""),
        ("Answer: b", ""),
        (r"\boxed{12}", ""),
        ("B", ""),
        ("", ""),
    ],
)
def test_letter_of_a_choice(response: str, letter: str) -> None:
    assert last_letter(response) == letter
