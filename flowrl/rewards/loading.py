"""From a name in the configuration to a reward function."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from flowrl.rewards.builtin import REWARDS

ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")


def check_reward_name(function: str) -> None:
    """Raises ValueError for what can be seen to be wrong without importing the user's code."""
    place, separator, name = function.rpartition(":")
    if not separator:
        if function in REWARDS:
            return
        near = get_close_matches(function, REWARDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"unknown reward {function!r}; {hint}choose one of {sorted(REWARDS)} or give "
            "path/to/file.py:function or module:function"
        )
    if not place or not name.isidentifier():
        raise ValueError(
            f"reward {function!r} is not of the form path/to/file.py:function or module:function"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(
            f"reward {function!r}: there is no file {place!r} (searched from {Path.cwd()})"
        )


def load_reward(function: str) -> Callable[..., Any]:
    """The function named `built-in`, `path/to/file.py:function` or `module:function`.

    Imports the user's code, so it is called in a worker only. Raises ValueError if the function is
    missing or cannot take veRL's four keyword arguments; errors of the import itself pass through.
    """
    check_reward_name(function)
    if function in REWARDS:
        return REWARDS[function]
    place, _, name = function.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            f"reward {function!r}: no function {name!r} in {place!r}, which has "
            f"{_functions(module) or 'none'}"
        )
    if inspect.iscoroutinefunction(found):
        raise ValueError(f"reward {function!r} is async; give a plain function (it may run a loop)")
    signature = inspect.signature(found)
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise ValueError(
            f"reward {function!r} has the signature {signature}, but is called with the keywords "
            f"{', '.join(ARGUMENTS)}: {error}"
        ) from error
    return found


def _functions(module: ModuleType) -> list[str]:
    """Public functions that the module itself defines."""
    return sorted(
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    )


def _import_file(path: Path) -> ModuleType:
    name = f"flowrl_user_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    # Last, so that a file beside it can be imported but shadows nothing.
    sys.path.append(str(path.resolve().parent))
    spec.loader.exec_module(module)
    return module
