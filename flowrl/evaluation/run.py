"""An evaluation from the model to the tables; every stage leaves its file in one folder.

settings.json        what is generated, with the fingerprint of the model and its tokenizer
generations.jsonl    one line per response, written as they come
grades.jsonl         every grader's verdict on every response
disagreements.jsonl  the responses on which two graders disagree
judge.jsonl          what the judge said, if one was asked
results.json         every number of the tables, with its interval
pass_at_k.png
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flowrl.evaluation.engine import Servers, build_engine, context_length
from flowrl.evaluation.generations import (
    count_whole_batches,
    generate,
    plan_batches,
    read_generations,
)
from flowrl.evaluation.grade import (
    GradingSettings,
    grade_all,
    try_graders,
    write_disagreements,
    write_grades,
)
from flowrl.evaluation.judge import JudgeSettings, judge_all
from flowrl.evaluation.results import GroupResult, collect, summarise
from flowrl.evaluation.settings import GENERATIONS_FILE, EvalSettings, keep_settings
from flowrl.evaluation.show import PLOT_FILE, plot_pass_at_k
from flowrl.evaluation.tasks import EvalPrompt, load_task, notes
from flowrl.files import write_whole
from flowrl.policy.pretrained import load_tokenizer

RESULTS_FILE = "results.json"


def evaluate(
    folder: Path,
    settings: EvalSettings,
    model: Path,
    device: str,
    grading: GradingSettings,
    judge: JudgeSettings | None = None,
    servers: Servers | None = None,
) -> list[GroupResult]:
    """Generate what is missing in `folder`, grade everything and write the reports.

    model: the HF folder. Raises ValueError for whatever the settings ask that the data or the model
    cannot give, before the model is loaded.
    """
    tokenizer = load_tokenizer(str(model))
    tasks = [load_task(name, settings) for name in settings.tasks]
    batches = plan_batches(tasks, settings)
    try_graders([prompt for task in tasks for prompt in task], grading)
    folder.mkdir(parents=True, exist_ok=True)
    keep_settings(folder, settings)
    generate(
        folder / GENERATIONS_FILE,
        batches,
        lambda num_tokens: build_engine(settings, model, tokenizer, device, num_tokens, servers),
        tokenizer,
        settings,
        context_length(model),
    )
    return report(folder, settings, tasks, grading, judge)


def regrade(
    folder: Path,
    settings: EvalSettings,
    grading: GradingSettings,
    judge: JudgeSettings | None = None,
) -> list[GroupResult]:
    """Grade the generations of `folder` again, with today's graders and ground truths.

    Raises ValueError if generations are missing or belong to other prompts.
    """
    tasks = [load_task(name, settings) for name in settings.tasks]
    batches = plan_batches(tasks, settings)
    path = folder / GENERATIONS_FILE
    num_done, _ = count_whole_batches(path, batches, settings.fingerprint)
    if num_done < len(batches):
        raise ValueError(
            f"{folder} holds {num_done} of {len(batches)} batches: let `flowrl eval` finish it "
            "before --regrade"
        )
    return report(folder, settings, tasks, grading, judge)


def report(
    folder: Path,
    settings: EvalSettings,
    tasks: Sequence[Sequence[EvalPrompt]],
    grading: GradingSettings,
    judge: JudgeSettings | None,
) -> list[GroupResult]:
    """Grade the generations of `folder`, write its reports and return the results."""
    generations = read_generations(folder / GENERATIONS_FILE)
    prompts = [prompt for task in tasks for prompt in task]
    grades = grade_all(prompts, generations, grading)
    write_grades(folder, generations, grades)
    num_disagreements = write_disagreements(folder, prompts, generations, grades)
    answers = collect(prompts, generations)
    scores = {} if judge is None else judge_all(folder, answers, judge)
    groups = [
        group
        for task in tasks
        for group in summarise(
            task[0].task,
            notes(task[0].task, task, settings.limit),
            [a for a in answers if a.prompt.task == task[0].task],
            grades,
            {i: score for (name, i), score in scores.items() if name == task[0].task},
        )
    ]
    results = {
        "settings": asdict(settings),
        "judge": None if judge is None else judge.model,
        "num_disagreements": num_disagreements,
        "groups": [asdict(group) for group in groups],
    }
    write_whole(folder / RESULTS_FILE, json.dumps(results, indent=1))
    plot_pass_at_k(groups, folder / PLOT_FILE, settings.model)
    return groups
