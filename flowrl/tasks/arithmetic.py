"""Addition and multiplication of two numbers with given digit counts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowrl.tasks.few_shot import FewShotOptions, Question, Space, Split, few_shot_prompts
from flowrl.tasks.options import parse_options
from flowrl.tasks.prompts import Prompt, shorten

TEMPLATES = {"addition": "{a}+{b}={c}\n", "multiplication": "{a}*{b}={c}\n"}

# The space is enumerated: 6 digits in all are 810,000 pairs.
_MAX_DIGITS = 6


@dataclass(frozen=True)
class ArithmeticOptions(FewShotOptions):
    """digits: of the first and the second number; d digits are 10^(d-1) .. 10^d - 1, so no 0."""

    digits: tuple[int, int] = (2, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        digits = self.digits
        if (
            not isinstance(digits, list | tuple)
            or len(digits) != 2
            or not all(isinstance(d, int) and not isinstance(d, bool) and d >= 1 for d in digits)
        ):
            raise ValueError(f"digits is {shorten(digits)}: give two counts of 1 or more, e.g. 2,1")
        if sum(digits) > _MAX_DIGITS:
            raise ValueError(
                f"digits is {shorten(digits)}, more than {_MAX_DIGITS} in all: "
                "lower them, or take reasoning_gym/chain_sum or reasoning_gym/products"
            )


def arithmetic_space(task: str, digits: tuple[int, int]) -> Space:
    """All ordered pairs of operands; (a, b) and (b, a) share a class.

    Both orders only occur when the digit counts are equal, for either operation.
    """
    lows = [10 ** (d - 1) for d in digits]
    firsts, seconds = (np.arange(low, 10 * low) for low in lows)
    a, b = np.repeat(firsts, len(seconds)), np.tile(seconds, len(firsts))
    _, class_of = np.unique(
        np.minimum(a, b) * 10 ** max(digits) + np.maximum(a, b), return_inverse=True
    )

    def question(index: int) -> Question:
        x, y = int(a[index]), int(b[index])
        return Question(x, y, x + y if task == "addition" else x * y)

    return Space(class_of, question)


def load_arithmetic(
    task: str, split: Split, *, count: int | None, seed: int, options: Mapping[str, Any] | None
) -> list[Prompt]:
    """Prompts of task "addition" or "multiplication"; the ground truth is the result's digits."""
    parsed = parse_options(ArithmeticOptions, options, task)
    space = arithmetic_space(task, (parsed.digits[0], parsed.digits[1]))
    template = parsed.template or TEMPLATES[task]
    return few_shot_prompts(task, space, split, parsed, template, count=count, seed=seed)
