"""What a task hands to the trainer, and the two messages that every task's errors share."""

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True)
class Prompt:
    """One question and what its reward needs to judge an answer.

    The fields are the columns of veRL's data schema under the same names, except `messages`
    (column `prompt`), `ground_truth` and `style` (inside column `reward_model`).
    """

    data_source: str
    messages: list[dict[str, str]]
    ground_truth: Any
    ability: str = ""
    style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a set of files and how many rows they came from."""

    prompts: list[Prompt]
    num_rows: int
    num_duplicates: int


def shorten(value: object) -> str:
    """The repr of `value`, cut to about a line however large the value is."""
    return _SHORT.repr(value)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`"; did you mean 'x' or 'y'?"` for a misspelt name, or "" when nothing is near."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
