import json
import time
from fractions import Fraction

import pytest
from reasoning_gym.factory import DATASETS, create_dataset

from flowrl.rewards import REWARDS
from flowrl.rewards.dapo_math import normalize_answer
from flowrl.rewards.expression import evaluate
from flowrl.rewards.gym import (
    EVALUATES_ENTRY,
    EVALUATES_MODEL_TEXT,
    EVALUATORS,
    OWN_SCORERS,
    find_scorer,
)
from flowrl.rewards.numeric import last_number


def score(name: str, solution: str, ground_truth: object, extra_info: dict | None = None) -> float:
    """The score of a built-in, called with veRL's keywords."""
    returned = REWARDS[name](
        data_source="test",
        solution_str=solution,
        ground_truth=ground_truth,
        extra_info=extra_info,
    )
    return returned["score"] if isinstance(returned, dict) else returned


@pytest.mark.parametrize(
    ("solution", "truth", "extra_info", "expected"),
    [
        (" Paris\n", "Paris", None, 1.0),
        ("paris", "Paris", None, 0.0),
        ("12", 12, None, 1.0),
        ("12.0", 12, None, 0.0),
        ("Paris\nLondon", "Paris", None, 0.0),
        ("\nParis \nLondon", "Paris", {"first_line": True}, 1.0),
        ("Paris; London", "Paris", {"stop": ";"}, 1.0),
        ("<answer>Paris</answer>", "Paris", None, 0.0),
        ("", "Paris", None, 0.0),
    ],
)
def test_exact(solution, truth, extra_info, expected):
    assert score("exact", solution, truth, extra_info) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", Fraction(12)),
        ("12.0", Fraction(12)),
        ("The sum is 1,234.", Fraction(1234)),
        ("1,234,567.50", Fraction(2469135, 2)),
        ("1, 2, 3", Fraction(3)),
        ("1,23", Fraction(23)),
        ("12-5", Fraction(5)),
        ("12 - 5", Fraction(5)),
        ("x = -5", Fraction(-5)),
        ("x = \u22125", Fraction(-5)),
        ("(3)-5", Fraction(5)),
        ("+7", Fraction(7)),
        (".5", Fraction(1, 2)),
        ("-.5", Fraction(-1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1e3", Fraction(1000)),
        ("3/4", Fraction(3, 4)),
        ("6/3", None),
        ("7/1", None),
        ("1/0", None),
        ("12 or 13", Fraction(13)),
        ("50%", Fraction(50)),
        ("$12", Fraction(12)),
        ("x12", None),
        ("twelve", None),
        ("", None),
        ("\u0661\u0662", None),  # Arabic-Indic 12
        ("9" * 201, None),
        ("1e9999", Fraction(1)),  # no exponent has four digits, so this is 1 and some letters
    ],
)
def test_last_number(text, expected):
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("solution", "truth", "extra_info", "expected"),
    [
        ("7 + 5 = 12", "12", None, 1.0),
        ("12.0", 12, None, 1.0),
        ("0.1", 0.1, None, 1.0),
        ("0.3333", "1/3", None, 0.0),
        ("12 or 13", "12", None, 0.0),
        ("<answer>12</answer> (not 13)", "12", None, 1.0),
        ("12\n3+4=7", "12", {"stop": "\n"}, 1.0),
        ("12\n3+4=7", "12", {"stop": ""}, 0.0),
        ("no idea", "0", None, 0.0),
    ],
)
def test_numeric(solution, truth, extra_info, expected):
    assert score("numeric", solution, truth, extra_info) == expected


def test_numeric_refuses_a_ground_truth_that_is_no_number():
    with pytest.raises(ValueError, match="'twelve' is not a number"):
        score("numeric", "12", "twelve")


@pytest.mark.parametrize(
    ("text", "value", "integers"),
    [
        ("7", 7, [7]),
        ("1+2*3", 7, [1, 2, 3]),
        ("(1+2)*3", 9, [1, 2, 3]),
        ("8-3-2", 3, [8, 3, 2]),
        ("8/4/2", 1, [8, 4, 2]),
        ("1/3", Fraction(1, 3), [1, 3]),
        ("1/3*3", 1, [1, 3, 3]),
        ("8/(3-8/3)", 24, [8, 3, 8, 3]),
        ("-3+5", 2, [3, 5]),
        ("2*-3", -6, [2, 3]),
        ("3--2", 5, [3, 2]),
        ("-(1+2)*3", -9, [1, 2, 3]),
        (" 2 *\t( 3 ) ", 6, [2, 3]),
        ("(" * 32 + "1" + ")" * 32, 1, [1]),
        ("9" * 18, 999999999999999999, [999999999999999999]),
    ],
)
def test_evaluate(text, value, integers):
    assert evaluate(text)[:2] == (value, integers)


HOSTILE = {
    "power": "9**9**9",
    "caret": "9^9",
    "deep": "(" * 400 + "1" + ")" * 400,
    "one-too-deep": "(" * 33 + "1" + ")" * 33,
    "very-long": "1+" * 5_000_000 + "1",
    "division-by-zero": "1/0",
    "hidden-division-by-zero": "1/(2-2)",
    "unicode-digits": "\u0661+\u0662",
    "fullwidth-digits": "\uff11+\uff12",
    "superscript": "2\u00b2",
    "import": "__import__('os').system('true')",
    "call": "print(1)",
    "name": "a+b",
    "attribute": "(1).real",
    "huge-integer": "9" * 19,
    "million-digits": "9" * 1_000_000,
    "leading-zero": "01+2",
    "decimal": "1.5+1",
    "underscore": "1_0",
    "hex": "0x10",
    "floor-division": "7//2",
    "modulo": "7%2",
    "juxtaposition": "2(3)",
    "two-integers": "1 2",
    "unary-plus": "+3",
    "double-minus": "5---2",
    "open": "(1+2",
    "close": "1+2)",
    "dangling": "1+",
    "lone-minus": "-",
    "empty": "",
    "empty-parentheses": "()",
    "newline": "1\n+2",
    "null": "1\0+2",
    "lambda": "(lambda: 1)()",
    "comma": "1,2",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_evaluate_refuses(text):
    start = time.perf_counter()
    with pytest.raises(ValueError):
        evaluate(text)
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_expression_scores_hostile_text_zero(text):
    assert score("expression", text, {"target": 3, "numbers": [1, 2]}) == 0.0


def test_largest_expression_is_fast():
    text = "*".join(["9" * 18] * 52)  # 987 characters
    start = time.perf_counter()
    value, integers, _ = evaluate(text)
    assert time.perf_counter() - start < 1.0
    assert value == (10**18 - 1) ** 52
    assert len(integers) == 52


COUNTDOWN = {"target": 24, "numbers": [3, 3, 8, 8]}


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("8/(3-8/3)", COUNTDOWN, 1.0),
        ("8/(3-8/3) = 24", COUNTDOWN, 1.0),
        ("8/(3-8/3) = 25", COUNTDOWN, 0.0),
        ("8/(3-8/3) = 24 = 24", COUNTDOWN, 0.0),
        ("I think <answer> 8/(3-8/3) </answer> is it", COUNTDOWN, 1.0),
        ("<answer>1+1</answer><answer>8/(3-8/3)</answer>", COUNTDOWN, 1.0),
        ("I think 8/(3-8/3)", COUNTDOWN, 0.0),
        ("8*3", COUNTDOWN, 0.0),
        ("8*3+8-8", COUNTDOWN, 0.0),
        ("24", COUNTDOWN, 0.0),
        ("8*3", COUNTDOWN | {"use": "some"}, 1.0),
        ("8*3*8/8*3/3", COUNTDOWN | {"use": "some"}, 0.0),
        ("8/(3-8/3)", json.dumps(COUNTDOWN), 1.0),
        ("8/(3-8/3)", COUNTDOWN | {"operators": "+-*"}, 0.0),
        ("-3+27", {"target": 24, "numbers": [3, 27]}, 1.0),
        ("5+15", 20, 1.0),
        ("5+15", "20", 1.0),
        ("5+15", {"target": 20}, 1.0),
        ("5+15=20", 20, 1.0),
        ("20", 20, 0.0),
        ("0+20", 20, 0.0),
        ("-5+25", 20, 0.0),
        ("5+5+10", 20, 0.0),
        ("5+5+10", {"target": 20, "terms": 3}, 1.0),
        ("25-5", 20, 0.0),
        ("25-5", {"target": 20, "operators": "-"}, 1.0),
        ("05+15", 20, 0.0),
        ("6+15", 20, 0.0),
    ],
)
def test_expression(solution, truth, expected):
    assert score("expression", solution, truth) == expected


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ({"numbers": [1]}, "expected"),
        ({"target": "x"}, "expected"),
        (
            "abc",
            r"ground_truth 'abc' is neither a number nor JSON \(Expecting value.*the target alone",
        ),
        ({"target": 1, "use": "any"}, "choose 'all' or 'some'"),
        ({"target": 1, "numbers": [-2, 3]}, "0 or more"),
    ],
    ids=["no-target", "bad-target", "bad-json", "bad-use", "negative-number"],
)
def test_expression_refuses_a_malformed_ground_truth(truth, message):
    with pytest.raises(ValueError, match=message):
        score("expression", "1+1", truth)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("34", "34"),
        (" 34. ", "34"),
        ("$34$", "34"),
        ("$34$.", "34"),
        ("\\boxed{34}", "34"),
        ("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}"),
        ("x = 34", "34"),
        ("1,234", "1234"),
        ("1, 234", "1,234"),
        ("(1,2)", "(1,2)"),
        ("\\$12", "12"),
        ("12 dollars", "12"),
        ("12\\text{ cm}", "12"),
        ("12 square units", "12"),
        ("12 \\text{cm}^2", "12"),
        ("45^\\circ", "45"),
        ("45^{\\circ}", "45"),
        ("50\\%", "50"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("\\frac{1}2", "\\frac{1}{2}"),
        ("\\sqrt2", "\\sqrt{2}"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("\\sqrt[3]{2}", "\\sqrt[3]{2}"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("x^2+1", "x^2+1"),
        ("3m", "3m"),
        ("\\text{blue}", "blue"),
        ("blue team", "blueteam"),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("so it is\nAnswer: 34", "34", 1.0),
        ("Answer: $34$", "34", 1.0),
        ("answer : 34", "34", 1.0),
        ("Answer: 33\nAnswer: 34", "34", 1.0),
        ("Answer: 34\nAnswer: 33", "34", -1.0),
        ("Answer: 34 or 35", "34", -1.0),
        ("Answer: 0.5", "1/2", -1.0),
        ("34", "34", -1.0),
        ("\\boxed{34}", "34", -1.0),
        ("Answer:\n\n34", "34", 1.0),
        ("Answer:", "", -1.0),
        ("Answer: 34\n" + "x" * 300, "34", -1.0),
        ("x" * 5000 + "\nAnswer: 34", "34", 1.0),
        ("Answer: 34", 34, 1.0),
    ],
)
def test_dapo_math(solution, truth, expected):
    assert score("dapo_math", solution, truth) == expected


def test_dapo_math_reports_what_it_read():
    returned = REWARDS["dapo_math"]("math_dapo", "Answer: $1,000$", "1000", None)
    assert returned == {"score": 1.0, "acc": 1.0, "pred": "1000"}


@pytest.mark.parametrize(
    ("solution", "truth", "expected"),
    [
        ("The answer is \\boxed{\\frac{1}{2}}.", "0.5", 1.0),
        ("The answer is $\\frac{2}{4}$", "\\frac{1}{2}", 1.0),
        ("the final answer is 34", "34", 1.0),
        ("the final answer is 35", "34", 0.0),
        ("\\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        ("\\boxed{\\{1, 2\\}}", "\\boxed{\\{2, 1\\}}", 1.0),
        ("no idea", "34", 0.0),
        ("", "34", 0.0),
    ],
)
def test_math_verify(solution, truth, expected):
    assert score("math_verify", solution, truth) == expected


def test_math_verify_refuses_an_unreadable_ground_truth():
    with pytest.raises(ValueError, match="cannot be parsed"):
        score("math_verify", "34", "")


@pytest.mark.parametrize(
    "template",
    ["{}", "The answer is {}", "\\boxed{{{}}}", "${}$", "Answer: {}", "\\(1+{}\\)"],
)
def test_math_verify_runs_no_model_text(template, tmp_path):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    score("math_verify", template.format(code), "34")
    assert not marker.exists()


GYM_NAMES = ["chain_sum", "gcd", "word_sorting", "number_sorting", "bitwise_arithmetic"]


@pytest.mark.parametrize("dataset", [*GYM_NAMES, *OWN_SCORERS])
def test_gym_scores_the_generated_answer_one(dataset):
    for entry in create_dataset(dataset, size=5, seed=7):
        answer = entry["metadata"].get("valid_answers", [entry["answer"]])[0]
        info = {"dataset": dataset, "entry": entry}
        stored = {"dataset": dataset, "entry": json.dumps(entry)}
        assert score("gym", answer, None, info) == 1.0
        assert score("gym", f"So <answer>{answer}</answer>", None, stored) == 1.0
        assert score("gym", answer + "1", None, info) == 0.0
        assert score("gym", "", None, info) == 0.0


@pytest.mark.parametrize(
    ("dataset", "right", "wrong"),
    [
        ("game_of_life_halting", "False", "True"),
        ("spell_backward", "ekilxesnu", "ekilxesnu1"),
        ("letter_jumble", "one two three", "one two three four"),
        ("prime_factorization", "2 \u00d7 5", "2 \u00d7 5x"),
    ],
)
def test_gym_refuses_wrong_answers_that_the_package_accepts_or_dies_of(dataset, right, wrong):
    entry = {"question": "", "answer": right, "metadata": {}}
    info = {"dataset": dataset, "entry": entry}
    assert score("gym", right, None, info) == 1.0
    assert score("gym", wrong, None, info) == 0.0


def test_gym_reports_a_broken_entry():
    with pytest.raises(KeyError, match="metadata"):
        score("gym", "a", None, {"dataset": "n_queens", "entry": {"answer": "a"}})


def test_gym_threshold():
    entry = {"question": "", "answer": "ab", "metadata": {}}
    info = {"dataset": "letter_counting", "entry": entry}
    returned = REWARDS["gym"]("x", "abcd", None, info)
    assert returned == {"score": 0.0, "gym_score": 0.5}
    assert REWARDS["gym"]("x", "abcd", None, info | {"threshold": 0.5})["score"] == 1.0


def test_gym_takes_the_member_of_composite_from_the_entry():
    entry = {"answer": "5", "metadata": {"source_dataset": "gcd"}}
    assert score("gym", "5", None, {"dataset": "composite", "entry": entry}) == 1.0


@pytest.mark.parametrize("dataset", EVALUATES_MODEL_TEXT)
def test_gym_never_runs_model_text(dataset, tmp_path):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    entry = create_dataset(dataset, size=1, seed=3)[0]
    info = {"dataset": dataset, "entry": entry}
    if dataset in OWN_SCORERS:
        # The package's own scorer does run it: the test would notice.
        assert score("gym", code, None, info) == 0.0
        assert not marker.exists()
        create_dataset(dataset, size=1, seed=3).score_answer(code, entry)
        assert marker.exists()
    else:
        with pytest.raises(ValueError, match="runs model text as code"):
            score("gym", code, None, info)
        assert not marker.exists()


def test_every_scorer_that_names_an_evaluator_is_listed():
    for name, (dataset, _) in DATASETS.items():
        named = EVALUATORS & set(dataset.score_answer.__code__.co_names)
        listed = name in EVALUATES_MODEL_TEXT or name in EVALUATES_ENTRY
        assert listed or not named, f"{name}: {named}"


@pytest.mark.parametrize(
    ("dataset", "entry"),
    [
        ("bitwise_arithmetic", {"answer": "1", "metadata": {"problem": "__import__('os')"}}),
        ("number_sorting", {"answer": "__import__('os')", "metadata": {}}),
    ],
)
def test_gym_refuses_code_in_an_entry(dataset, entry):
    with pytest.raises(ValueError, match="not what this data set writes"):
        score("gym", "[1]", None, {"dataset": dataset, "entry": entry})


def test_gym_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="needs 'dataset' and 'entry'"):
        score("gym", "1", "1", {"dataset": "gcd"})
    with pytest.raises(ValueError, match="no data set 'chain_sums'"):
        find_scorer("chain_sums")


@pytest.mark.parametrize(
    ("data_source", "solution", "truth", "extra_info", "expected"),
    [
        ("math_dapo", "Answer: 34", "34", None, 1.0),
        ("math", "34", "34", None, -1.0),
        ("aime2024", "34", "34", None, -1.0),
        ("Maxwell-Jia/AIME_2024", "34", "34", None, 1.0),
        ("numina_olympiads", "\\boxed{0.5}", "1/2", None, 1.0),
        ("openai/gsm8k", "so #### 34", "34", None, 1.0),
        ("sums", "1+33", "34", None, 1.0),
        ("countdown", "2*17", {"target": 34, "numbers": [17, 2]}, None, 1.0),
        ("addition", "34\n1+1=2", "34", {"stop": "\n"}, 1.0),
        ("exact", "34.0", "34", None, 0.0),
        ("my/data", "34.0", "34", {"reward": "numeric"}, 1.0),
        ("math", "34.0", "34", {"reward": "numeric"}, 1.0),
        (
            "reasoning_gym/gcd",
            "34",
            None,
            {"dataset": "gcd", "entry": {"answer": "34", "metadata": {}}},
            1.0,
        ),
    ],
)
def test_auto_routes(data_source, solution, truth, extra_info, expected):
    returned = REWARDS["auto"](data_source, solution, truth, extra_info)
    assert (returned["score"] if isinstance(returned, dict) else returned) == expected


def test_auto_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'my/data'.*reward.function"):
        REWARDS["auto"]("my/data", "34", "34", None)
    with pytest.raises(ValueError, match="'nummeric'.*choose one of"):
        REWARDS["auto"]("my/data", "34", "34", {"reward": "nummeric"})
