"""A task's options: a frozen dataclass a task, filled from the user's `data.task_options`."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from flowrl.tasks.prompts import did_you_mean, shorten

Options = TypeVar("Options")


def parse_options(
    options_class: type[Options], options: Mapping[str, Any] | None, task: str
) -> Options:
    """Build `options_class`, whose own checks judge the values.

    Raises ValueError for a key that the class does not have, with the nearest ones.
    """
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ValueError(f"options of task {task!r} are {shorten(options)}: give a mapping")
    known = [field.name for field in fields(options_class)]  # pyright: ignore[reportArgumentType]
    for key in options:
        if key not in known:
            raise ValueError(
                f"task {task!r} has no option {key!r}{did_you_mean(key, known)}"
                f"; options: {', '.join(known)}"
            )
    return options_class(**options)


def check_val_fraction(value: object) -> None:
    """Raise ValueError unless `value` is a share of the prompts that leaves some for training."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"val_fraction is {shorten(value)}: give a number from 0 to below 1")


def check_int(name: str, value: object, low: int, high: int) -> None:
    """Raise ValueError unless `value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} is {shorten(value)}: give a whole number from {low} to {high}")
