"""Where prompts come from: files in veRL's schema, built-in tasks, reasoning-gym."""

from collections.abc import Mapping, Sequence
from typing import Any

from flowrl.tasks.arithmetic import TEMPLATES, load_arithmetic
from flowrl.tasks.few_shot import Split
from flowrl.tasks.files import read_prompt_files
from flowrl.tasks.gym import PREFIX, load_gym
from flowrl.tasks.letter_count import load_letter_count
from flowrl.tasks.options import check_int
from flowrl.tasks.prompts import Prompt, PromptSet, did_you_mean
from flowrl.tasks.sampler import PromptSampler
from flowrl.tasks.sums import load_sums, sums_answers
from flowrl.tasks.tokenization import TokenizedPrompt, tokenize_prompts

__all__ = [
    "TASKS",
    "Prompt",
    "PromptSampler",
    "PromptSet",
    "Split",
    "TokenizedPrompt",
    "load_prompts",
    "read_prompt_files",
    "sums_answers",
    "tokenize_prompts",
]

TASKS = ("files", *TEMPLATES, "letter_count", "sums", PREFIX + "<name>")


def load_prompts(
    task: str,
    split: Split,
    *,
    files: Sequence[str] = (),
    count: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Load at most `count` prompts of a task; the same arguments give the same ones everywhere.

    "files" reads `files` in their order, whatever split and seed. The other tasks have splits that
    are disjoint by construction: `seed` and `count` choose and order questions within a split. All
    of the split comes without `count`, except for reasoning_gym/<name>, which has no end.

    Raises ValueError for an unknown task or option, with the nearest names, and for bad data.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}: give 'train' or 'val'")
    if count is not None:
        check_int("count", count, 1, 2**31)
    check_int("seed", seed, 0, 2**63)
    if task == "files":
        return read_prompt_files(files, count=count, options=options).prompts
    if files:
        raise ValueError(f"task {task!r} reads no files, got {list(files)!r}: use task 'files'")
    if task in TEMPLATES:
        return load_arithmetic(task, split, count=count, seed=seed, options=options)
    if task == "letter_count":
        return load_letter_count(split, count=count, seed=seed, options=options)
    if task == "sums":
        return load_sums(split, count=count, seed=seed, options=options)
    if task.startswith(PREFIX):
        return load_gym(task.removeprefix(PREFIX), split, count=count, seed=seed, options=options)
    raise ValueError(f"unknown task {task!r}{did_you_mean(task, TASKS)}; tasks: {', '.join(TASKS)}")
