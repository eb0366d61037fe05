"""reasoning-gym's scorers, except those that would evaluate model text."""

import contextlib
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from flowrl.rewards import expression
from flowrl.rewards.answer import answer_text

# Scorers of reasoning-gym 0.1.25 that pass model text to eval, or to sympy's parse_expr, which is
# eval underneath: a response can run any code in them. None is ever called.
EVALUATES_MODEL_TEXT = {
    "binary_matrix": "eval of an answer that is not the expected string",
    "countdown": "sympy parse_expr of the answer",
    "intermediate_integration": "sympy parse_expr of the answer",
    "n_queens": "eval of an answer that is not one of the valid boards",
    "polynomial_multiplication": "sympy parse_expr of the answer",
    "puzzle24": "sympy parse_expr of the answer",
    "simple_integration": "sympy parse_expr of the answer",
    "spiral_matrix": "eval of an answer that is not the expected string",
    "string_insertion": "eval of an answer that is not the expected string",
}

# These evaluate a field of their own data set, never the answer; the field is checked first, since
# it may come from a file. (path into the entry, what it may hold)
EVALUATES_ENTRY = {
    "bitwise_arithmetic": (("metadata", "problem"), re.compile(r"[-+*<>()0-9a-fA-Fx \n]{1,4000}")),
    "number_sorting": (("answer",), re.compile(r"[-+0-9.eE,'\"\[\] ]*")),
}

EVALUATORS = {"eval", "exec", "compile", "parse_expr", "sympify"}


def _is_expected(answer: str, entry: dict) -> float:
    return float(answer == entry["answer"].strip())


def _is_expected_in_any_case(answer: str, entry: dict) -> float:
    return float(answer.lower() == entry["answer"].strip().lower())


def _is_valid_board(answer: str, entry: dict) -> float:
    return float(answer in entry["metadata"]["valid_answers"])


def _makes_target(answer: str, entry: dict) -> float:
    metadata = entry["metadata"]
    truth = {"target": metadata["target"], "numbers": metadata["numbers"]}
    return expression.compute_score("countdown", answer, truth)


def _makes_24(answer: str, entry: dict) -> float:
    truth = {"target": 24, "numbers": entry["metadata"]["numbers"]}
    return expression.compute_score("puzzle24", answer, truth)


# Used in place of the package's: for those of EVALUATES_MODEL_TEXT that need no evaluation, and for
# three that accept wrong answers. game_of_life_halting takes any text, since bool("False") is true;
# letter_jumble and spell_backward add up fractions, which reach 1 with words or letters to spare.
OWN_SCORERS: dict[str, Callable[[str, dict], float]] = {
    "binary_matrix": _is_expected,
    "countdown": _makes_target,
    "game_of_life_halting": _is_expected_in_any_case,
    "letter_jumble": _is_expected_in_any_case,
    "n_queens": _is_valid_board,
    "puzzle24": _makes_24,
    "spell_backward": _is_expected_in_any_case,
    "spiral_matrix": _is_expected,
    "string_insertion": _is_expected,
}


def warm_up() -> None:
    """Imports the package (one to two seconds), so that no request pays for it."""
    import reasoning_gym  # noqa: F401


def find_scorer(dataset: str, options: dict | None = None) -> Callable[[str, dict], float]:
    """The function (answer, entry) -> score of a reasoning-gym data set with these options.

    Raises ValueError for an unknown name and for a scorer that would evaluate model text and has no
    substitute here. A task that calls this when it is built finds out before training starts.
    """
    if dataset in OWN_SCORERS:
        return OWN_SCORERS[dataset]
    if dataset in EVALUATES_MODEL_TEXT:
        raise ValueError(
            f"reasoning-gym's scorer of {dataset!r} runs model text as code "
            f"({EVALUATES_MODEL_TEXT[dataset]}); choose another data set or write a reward "
            "function of your own"
        )
    return _package_scorer(dataset, json.dumps(options or {}, sort_keys=True))


@functools.cache
def _package_scorer(dataset: str, options_json: str) -> Callable[[str, dict], float]:
    # Kept, because some data sets read a word list or build a table when they are made.
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS:
        raise ValueError(f"reasoning-gym has no data set {dataset!r}; it has {sorted(DATASETS)}")
    scorer = DATASETS[dataset][0].score_answer
    # A release newer than the list above may have another one.
    found = EVALUATORS & set(scorer.__code__.co_names)
    if found and dataset not in EVALUATES_ENTRY:
        raise ValueError(
            f"reasoning-gym's scorer of {dataset!r} uses {sorted(found)}, and model text may reach "
            "it; choose another data set"
        )
    return reasoning_gym.create_dataset(dataset, **json.loads(options_json)).score_answer


def _check_entry(dataset: str, entry: dict) -> None:
    path, allowed = EVALUATES_ENTRY[dataset]
    value: Any = entry
    for key in path:
        value = value[key]
    if allowed.fullmatch(value) is None:
        raise ValueError(f"entry of {dataset!r}: {value[:200]!r} is not what this data set writes")


def _score(scorer: Callable[[str, dict], float], answer: str, entry: dict) -> float:
    with contextlib.redirect_stdout(None):  # some print a line about each wrong answer
        try:
            return float(scorer(answer, entry))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            # Some raise on text that they cannot read, a wrong answer. But if they raise on the
            # data set's own answer too, the entry is at fault, and the error passes.
            scorer(entry["answer"], entry)
            return 0.0


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, float]:
    """1.0 if the data set's own score of the answer reaches the threshold, else 0.0.

    extra_info: "dataset", its name; "entry", the generated item or its JSON; optional "options" of
    the data set and "threshold". The threshold is 1.0 because many data sets give 0.01 to 0.1 for
    any answer at all. For members of `composite` the name is taken from the entry. The answer is
    that of `answer_text`.

    Returns score and gym_score, the score before the threshold.
    Raises ValueError if extra_info lacks a key or the data set is refused (see `find_scorer`).
    """
    info = extra_info or {}
    if "dataset" not in info or "entry" not in info:
        raise ValueError(
            f"extra_info has the keys {sorted(info)}; the reward 'gym' needs 'dataset' and 'entry'"
        )
    entry = json.loads(info["entry"]) if isinstance(info["entry"], str) else info["entry"]
    dataset, options = info["dataset"], info.get("options")
    if dataset == "composite":
        dataset, options = entry["metadata"]["source_dataset"], None
    scorer = find_scorer(dataset, options)
    if dataset in EVALUATES_ENTRY:
        _check_entry(dataset, entry)
    gym_score = _score(scorer, answer_text(solution_str, info), entry)
    threshold = info.get("threshold")
    is_right = gym_score >= (1.0 if threshold is None else threshold)
    return {"score": float(is_right), "gym_score": gym_score}
