"""Few-shot prompts over an enumerable space of questions, with splits disjoint by construction.

A space is a list of questions grouped into classes; questions of a class (3+5 and 5+3) always stay
together. The classes are permuted once and for all and cut into examples | val | train:
`min(64, classes // 8)` classes serve only as worked examples, `val_fraction` of the others are
val, the rest is train. `seed` and `count` decide which questions of a split come and in which
order, never to which split a question belongs or which examples it shows.
"""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from flowrl.tasks.options import check_int, check_val_fraction
from flowrl.tasks.permutation import fixed_permutation
from flowrl.tasks.prompts import Prompt, shorten

# Changing it would move questions between the splits of published runs.
_SPLIT_LABEL = "flowrl/split/1"
_MAX_EXAMPLE_CLASSES = 64
_MAX_SHOTS = 64

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Question:
    """The values of a template's fields; `c` is the answer."""

    a: int | str
    b: int | str
    c: int | str


@dataclass(frozen=True)
class Space:
    """Every question of a task: `question(i)` for i < len(class_of), class_of int64 [questions]."""

    class_of: np.ndarray
    question: Callable[[int], Question]


@dataclass(frozen=True)
class FewShotOptions:
    """How questions are shown and split; every few-shot task has these options.

    template: one line of the prompt, with {a}, {b} and last {c}, the answer. The question ends
        right before {c}. None: the task's own.
    style: "completion", one user message of `num_shots` lines and the question, meant for raw
        text; "chat", a user and an assistant message per example.
    """

    num_shots: int = 3
    style: Literal["completion", "chat"] = "completion"
    template: str | None = None
    val_fraction: float = 0.2

    def __post_init__(self) -> None:
        check_int("num_shots", self.num_shots, 0, _MAX_SHOTS)
        if self.style not in ("completion", "chat"):
            raise ValueError(f"style is {shorten(self.style)}: give 'completion' or 'chat'")
        if self.template is not None:
            check_template(self.template)
        check_val_fraction(self.val_fraction)


def check_template(template: object) -> None:
    """Raise ValueError unless `template` shows a, b and last c."""
    remedy = "write {a} and {b} once each and then {c}, e.g. '{a}*{b}={c}\\n'"
    if not isinstance(template, str):
        raise ValueError(f"template is {shorten(template)}: {remedy}")
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template is {shorten(template)}, {error}: {remedy}") from error
    # Bare names only: str.format would also follow attributes and indices.
    names = [name for name, _, _ in fields]
    if sorted(map(str, names)) != ["a", "b", "c"] or names[-1] != "c":
        raise ValueError(f"template is {shorten(template)}, with fields {names}: {remedy}")
    if any(specification or conversion for _, specification, conversion in fields):
        raise ValueError(f"template is {shorten(template)}, with a format specification: {remedy}")


def render(template: str, question: Question) -> tuple[str, str]:
    """The text before and the text after the answer."""
    asked, _, tail = template.format(a=question.a, b=question.b, c="\0").partition("\0")
    return asked, tail


def split_space(class_of: np.ndarray, val_fraction: float) -> dict[str, np.ndarray]:
    """Indices of the questions of "examples", "val" and "train": disjoint, together all."""
    num_classes = int(class_of.max()) + 1
    rank = np.empty(num_classes, dtype=np.int64)
    rank[fixed_permutation(num_classes, _SPLIT_LABEL)] = np.arange(num_classes)
    num_examples = min(_MAX_EXAMPLE_CLASSES, num_classes // 8)
    num_val = round(val_fraction * (num_classes - num_examples))
    section = np.searchsorted([num_examples, num_examples + num_val], rank, side="right")[class_of]
    return {
        name: np.flatnonzero(section == i) for i, name in enumerate(("examples", "val", "train"))
    }


def few_shot_prompts(
    task: str,
    space: Space,
    split: Split,
    options: FewShotOptions,
    template: str,
    *,
    count: int | None,
    seed: int,
) -> list[Prompt]:
    """At most `count` prompts of a split (all if None), in the order that `seed` says."""
    sections = split_space(space.class_of, options.val_fraction)
    examples, members = sections["examples"], sections[split]
    if len(members) == 0:
        raise ValueError(
            f"{split} split of {task!r} is empty with val_fraction {options.val_fraction}: "
            "change it, or widen the task"
        )
    if options.num_shots > len(examples):
        raise ValueError(
            f"num_shots is {options.num_shots}, but {task!r} sets only {len(examples)} questions "
            "aside as examples: lower num_shots, or widen the task"
        )
    order = members[fixed_permutation(len(members), f"{task}/order/{seed}")[:count]]
    prompts = []
    for index in order.tolist():
        question = space.question(index)
        picks = fixed_permutation(len(examples), f"{task}/examples/{index}")[: options.num_shots]
        shots = [space.question(int(examples[pick])) for pick in picks]
        # "stop" ends an answer in completion style: a base model would go on with more lines.
        stop = render(template, question)[1] if options.style == "completion" else ""
        prompts.append(
            Prompt(
                data_source=task,
                messages=_messages(template, shots, question, options.style),
                ground_truth=str(question.c),
                ability="reasoning",
                extra_info={
                    "split": split,
                    "index": index,
                    "a": question.a,
                    "b": question.b,
                    "stop": stop,
                },
            )
        )
    return prompts


def _messages(
    template: str, shots: list[Question], question: Question, style: str
) -> list[dict[str, str]]:
    asked, _ = render(template, question)
    if style == "completion":
        lines = [template.format(a=shot.a, b=shot.b, c=shot.c) for shot in shots]
        return [{"role": "user", "content": "".join(lines) + asked}]
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": render(template, shot)[0].rstrip()})
        messages.append({"role": "assistant", "content": str(shot.c)})
    return [*messages, {"role": "user", "content": asked.rstrip()}]
