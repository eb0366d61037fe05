"""Any data set of the reasoning-gym package, split by a hash of the question's text.

The package generates questions in gym_worker.py, a process of its own: some of its generators
follow the order of Python sets or the global random state, so they repeat only under a fixed hash
seed, which cannot be set in a running interpreter.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.tasks.few_shot import Split
from flowrl.tasks.prompts import Prompt, did_you_mean, shorten

logger = logging.getLogger(__name__)

PREFIX = "reasoning_gym/"
WORKER = Path(__file__).with_name("gym_worker.py")
# The worker's limit. Of the data sets the slowest, sokoban, takes 0.8 s a draw on one core, and a
# val split takes five draws a question.
START_S, QUESTION_S = 600.0, 20.0


def load_gym(
    name: str, split: Split, *, count: int | None, seed: int, options: Mapping[str, Any] | None
) -> list[Prompt]:
    """`count` questions of data set `name`, fewer where it has no more distinct ones.

    A question is val if sha256(text) % 5 == 0 and train otherwise, so no text is in both, whatever
    the seeds. `options` are the fields of the data set's own configuration. `extra_info` is
    {"dataset": name, "entry": the entry as JSON gives it back, "options": options}, what the
    package's scorer needs.
    """
    task = PREFIX + name
    if count is None:
        raise ValueError(
            f"task {task!r} has no end: give count (data.train_max_samples, data.val_max_samples)"
        )
    options = dict(options or {})
    request = {"name": name, "split": split, "count": count, "seed": seed, "options": options}
    try:
        line = json.dumps(request)
    except TypeError as error:
        raise ValueError(f"options of task {task!r}: {error}; give plain values") from error
    answer = _run_worker(task, line, START_S + QUESTION_S * count)
    if "unknown" in answer:
        known = answer["known"]
        hint = did_you_mean(answer["unknown"], known) or f"; choose from {', '.join(known)}"
        raise ValueError(f"task {task!r}: unknown {answer['kind']} {answer['unknown']!r}{hint}")
    if "error" in answer:
        raise ValueError(f"task {task!r} with options {shorten(options)}: {answer['error']}")
    entries = answer["entries"]
    if len(entries) < count:
        logger.warning(
            "%s: only %d distinct %s questions in %d draws, %d were asked for",
            *(task, len(entries), split, answer["num_draws"], count),
        )
    return [
        Prompt(
            data_source=task,
            messages=[{"role": "user", "content": entry["question"]}],
            ground_truth=entry["answer"],
            ability="reasoning",
            extra_info={"dataset": name, "entry": entry, "options": options},
        )
        for entry in entries
    ]


def _run_worker(task: str, request: str, timeout_s: float) -> dict[str, Any]:
    # -P: otherwise the files beside the worker would shadow packages of the same names.
    # `env` sets the variable without this process reading its environment.
    command = ["env", "PYTHONHASHSEED=0", sys.executable, "-P", str(WORKER)]
    try:
        done = subprocess.run(
            command,
            input=request,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
            timeout=timeout_s,  # the worker is then killed
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"task {task!r}: reasoning-gym made no questions within {timeout_s:g} s: ask for "
            "easier ones with the options of the data set, or for fewer"
        ) from error
    if done.returncode != 0:
        last_line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(
            f"task {task!r}: reasoning-gym failed with exit status {done.returncode}: {last_line}"
        )
    return json.loads(done.stdout)
