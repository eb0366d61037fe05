"""The prompts of an evaluation, whatever they come from.

A task is a benchmark (flowrl/tasks/benchmarks.py), a parquet or jsonl file in veRL's schema, or any
task of flowrl.tasks with its held-out split, such as reasoning_gym/<name>.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from flowrl.evaluation.settings import EvalSettings
from flowrl.rewards.auto import route
from flowrl.tasks import TASKS, Prompt, load_prompts, read_prompt_files
from flowrl.tasks.benchmarks import BENCHMARKS, known_problems, load_benchmark
from flowrl.tasks.prompts import did_you_mean

FILE_SUFFIXES = (".parquet", ".jsonl")
# By the reward that training would choose: who grades the answers, the one that counts first.
# FlowRL trains with DAPO's rule and evaluates with math-verify. Other rewards are their own grader.
GRADERS = {
    "math_verify": ("math_verify", "dapo_math"),
    "dapo_math": ("math_verify", "dapo_math"),
}


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt with its place in the evaluation and who grades its answers."""

    task: str
    prompt_id: str
    graders: tuple[str, ...]
    prompt: Prompt

    @cached_property
    def hash(self) -> str:
        """16 hex digits of the messages: tells whether a response was made for this prompt."""
        return hashlib.sha256(json.dumps(self.prompt.messages).encode()).hexdigest()[:16]


def load_task(name: str, settings: EvalSettings) -> list[EvalPrompt]:
    """The prompts of one task, at most `settings.limit`, with ids that differ.

    Raises ValueError for an unknown task, missing data, and two rows of the same id.
    """
    if name in BENCHMARKS:
        if settings.data is None:
            raise ValueError(f"task {name!r} reads a local file: name its folder with --data")
        prompts = load_benchmark(
            name,
            Path(settings.data),
            count=settings.limit,
            seed=settings.seed,
            template=settings.template,
        )
        kind = {"math": "math_verify", "choice": "choice", "code": "code"}
        rewards = [kind[BENCHMARKS[name].kind]] * len(prompts)
    else:
        if name.endswith(FILE_SUFFIXES):
            prompts = read_prompt_files([name], count=settings.limit).prompts
        elif name in TASKS or "/" in name:
            if name.startswith("reasoning_gym/") and settings.limit is None:
                raise ValueError(f"task {name!r} has no end: give --limit")
            prompts = load_prompts(name, "val", count=settings.limit, seed=settings.seed)
        else:
            known = [*BENCHMARKS, *TASKS[1:]]
            raise ValueError(
                f"unknown task {name!r}{did_you_mean(name, known)}; tasks: {', '.join(known)}, or "
                "a .parquet or .jsonl file"
            )
        rewards = [route(p.data_source, p.extra_info) for p in prompts]
    loaded = [
        EvalPrompt(
            name,
            str(prompt.extra_info.get("id", index)) if name in BENCHMARKS else str(index),
            GRADERS.get(reward, (reward,)),
            prompt,
        )
        for index, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
    ]
    ids = [p.prompt_id for p in loaded]
    if len(set(ids)) < len(ids):
        repeated = next(i for i in ids if ids.count(i) > 1)
        raise ValueError(f"task {name!r} has two items with the id {repeated!r}: drop one")
    return loaded


def notes(name: str, prompts: Sequence[EvalPrompt], limit: int | None) -> str:
    """What is unusual about a task's prompts, for the report; "" for nothing."""
    if limit is not None:
        return f"the first {len(prompts)} items"
    if name not in BENCHMARKS:
        return ""
    return known_problems(name, [p.prompt for p in prompts])
