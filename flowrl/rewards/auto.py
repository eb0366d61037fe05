"""One reward for files of mixed origin: chosen per row by its data_source, as veRL does."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

from flowrl.rewards import code, dapo_math, exact, expression, gym, math_verify, numeric
from flowrl.rewards.sandbox.client import open_sandbox

# The functions a row may name itself, in extra_info["reward"] or as its data_source.
BY_NAME: dict[str, Callable[..., Any]] = {
    "exact": exact.compute_score,
    "numeric": numeric.compute_score,
    "expression": expression.compute_score,
    "dapo_math": dapo_math.compute_score,
    "math_verify": math_verify.compute_score,
    "gym": gym.compute_score,
    "code": code.compute_score,
}

BY_SOURCE: dict[str, str] = {
    "math": "dapo_math",
    "math_dapo": "dapo_math",
    "math_dapo_reasoning": "dapo_math",
    "openai/gsm8k": "numeric",
    "lighteval/MATH": "math_verify",
    "DigitalLearningGmbH/MATH-lighteval": "math_verify",
    "HuggingFaceH4/MATH-500": "math_verify",
    "Maxwell-Jia/AIME_2024": "math_verify",
    "yentinglin/aime_2025": "math_verify",
    "zwhe99/amc23": "math_verify",
    "math-ai/minervamath": "math_verify",
    "math-ai/olympiadbench": "math_verify",
    "sums": "expression",
    "countdown": "expression",
    "addition": "numeric",
    "multiplication": "numeric",
    "letter_count": "numeric",
    "taco": "code",
    "BAAI/TACO": "code",
    "apps": "code",
    "codeparrot/apps": "code",
    "codecontests": "code",
    "deepmind/code_contests": "code",
    "codeforces": "code",
    "primeintellect": "code",
    "livecodebench": "code",
    "livecodebench/code_generation_lite": "code",
    "humaneval": "code",
    "humanevalplus": "code",
    "evalplus/humanevalplus": "code",
    "openai/openai_humaneval": "code",
    "mbpp": "code",
    "mbppplus": "code",
    "evalplus/mbppplus": "code",
    "google-research-datasets/mbpp": "code",
}

BY_PREFIX: dict[str, str] = {
    "aime": "dapo_math",
    "numina_": "math_verify",
    "reasoning_gym/": "gym",
}


def warm_up() -> None:
    """Starts what rows may need and this machine has: optional packages, and the sandbox."""
    for package, reward in (("math_verify", math_verify), ("reasoning_gym", gym)):
        if importlib.util.find_spec(package) is not None:
            reward.warm_up()
    with contextlib.suppress(ValueError):  # no sandbox works: rows of programs will say so
        code.warm_up()


def check_rows(rows: Iterable[tuple[str, dict | None]]) -> None:
    """Raises ValueError if a row (data_source, extra_info) has no reward that works here."""
    levels = {
        code.read_options(extra_info).isolation
        for data_source, extra_info in rows
        if route(data_source, extra_info) == "code"
    }
    for level in levels:
        open_sandbox(level).close()


def route(data_source: str, extra_info: dict | None) -> str:
    """The name of the reward for a row: extra_info["reward"], else by data_source.

    Raises ValueError for a name or a source that is in no table.
    """
    named = (extra_info or {}).get("reward")
    if named:
        if named not in BY_NAME:
            raise ValueError(f"extra_info['reward'] is {named!r}; choose one of {sorted(BY_NAME)}")
        return named
    if data_source in BY_NAME:
        return data_source
    if data_source in BY_SOURCE:
        return BY_SOURCE[data_source]
    for prefix, name in BY_PREFIX.items():
        if data_source.startswith(prefix):
            return name
    raise ValueError(
        f"no reward is known for data_source {data_source!r}; set reward.function to one of "
        f"{sorted(BY_NAME)} or to path/to/file.py:function, or give the rows extra_info['reward']"
    )


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> Any:
    """The score by the reward that `route` finds; see there for the tables and the error."""
    return BY_NAME[route(data_source, extra_info)](
        data_source, solution_str, ground_truth, extra_info
    )
