"""From the finished runs to a table, a JSON record and two pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from methods import METHODS
from pictures import draw_answers, draw_training

from flowrl.bench.measure import environment
from flowrl.files import write_whole

Record = dict[str, Any]  # what one run has written

# Wants success and diversity at once, so no method is tuned towards losing either.
TUNED_FOR = "distinct@16"
TRAINING_IMAGE, ANSWERS_IMAGE = "distribution_training.png", "distribution_answers.png"
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)
RIVAL = "grpo"  # whose runs are subtracted, seed by seed
COLUMNS = {
    "success": ("success", ".3f"),
    "effective_answers": ("effective right answers", ".1f"),
    "distinct@16": ("different right answers in 16 samples", ".2f"),
    "pass@4": ("pass@4", ".3f"),
    "kl_right": ("KL of right answers to the reference's", ".3f"),
    "kl_target": ("KL to own target", ".2f"),
}
# Student's t at 97.5 %, by the number of values.
T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}
MAX_SEEDS = max(T_QUANTILES)


class Interval(NamedTuple):
    """A mean over seeds and the half-width of its 95 % t interval; nan for a single seed."""

    mean: float
    half_width: float
    num_seeds: int

    def text(self, form: str) -> str:
        if math.isnan(self.half_width):
            return f"{self.mean:{form}}"
        return f"{self.mean:{form}} +- {self.half_width:{form.lstrip('+')}}"


def t_interval(values: Sequence[float]) -> Interval:
    """Mean +- t s / sqrt(n). Raises ValueError for no value, or more than the table of t holds."""
    num = len(values)
    if num == 1:
        return Interval(values[0], math.nan, 1)
    if num not in T_QUANTILES:
        raise ValueError(f"{num} seeds: give 1 to {MAX_SEEDS}")
    return Interval(mean(values), T_QUANTILES[num] * stdev(values) / math.sqrt(num), num)


def of_method(records: Sequence[Record], method: str) -> list[Record]:
    return [record for record in records if record["method"] == method]


def choose_rates(tuning: Sequence[Record]) -> dict[str, float]:
    """The learning rate of each method with the largest mean of TUNED_FOR at the end."""
    chosen = {}
    for method in dict.fromkeys(record["method"] for record in tuning):
        scores: dict[float, list[float]] = {}
        for record in of_method(tuning, method):
            scores.setdefault(record["lr"], []).append(record["curve"][-1][TUNED_FOR])
        chosen[method] = max(scores, key=lambda lr: mean(scores[lr]))
    return chosen


def at_success(curve: Sequence[dict[str, float]], level: float, name: str) -> float | None:
    """A measure when success first reaches `level`, interpolated linearly between measurements.

    None when it never does, or stood there from the start.
    """
    for before, after in zip(curve, curve[1:], strict=False):
        if before["success"] < level <= after["success"]:
            share = (level - before["success"]) / (after["success"] - before["success"])
            return before[name] + share * (after[name] - before[name])
    return None


def equal_success(
    records: Sequence[Record], name: str, rivals: Sequence[Record] | None = None
) -> dict[float, Interval | None]:
    """Per level the measure over the seeds; None where a seed does not reach the level.

    With `rivals` their measure is subtracted, seed by seed: a start policy that loses answers
    sooner does so under any method, and that is most of the spread between seeds.
    """
    levels: dict[float, Interval | None] = {}
    for level in LEVELS:
        values = [at_success(record["curve"], level, name) for record in records]
        if rivals is not None:
            of_seed = {record["seed"]: record["curve"] for record in rivals}
            others = [at_success(of_seed[record["seed"]], level, name) for record in records]
            values = [
                None if one is None or other is None else one - other
                for one, other in zip(values, others, strict=True)
            ]
        reached = [value for value in values if value is not None]
        levels[level] = t_interval(reached) if len(reached) == len(values) else None
    return levels


def level_texts(levels: dict[float, Interval | None]) -> dict[str, dict[str, float] | None]:
    """The same as JSON takes it."""
    return {
        f"{level:g}": None if interval is None else interval._asdict()
        for level, interval in levels.items()
    }


def mean_curve(records: Sequence[Record]) -> dict[str, list[float | None]]:
    """Every measure over training, meaned over seeds; None at steps that do not have it."""
    rows = list(zip(*(record["curve"] for record in records), strict=True))
    names = dict.fromkeys(name for row in rows for name in row[0])
    return {
        name: [mean(point[name] for point in row) if name in row[0] else None for row in rows]
        for name in names
    }


def intervals(rows: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Every measure over the seeds, of which each has a row."""
    return {
        name: t_interval([row[name] for row in rows])._asdict()
        for name in rows[0]
        if name != "step"
    }


def summary(records: Sequence[Record], method: str) -> dict[str, Any]:
    """All that is reported of one method."""
    own, rivals = of_method(records, method), of_method(records, RIVAL)
    first, last = ([record["curve"][place] for record in own] for place in (0, -1))
    targets = [record["target"] for record in own]
    return {
        "method": method,
        "label": METHODS[method].label,
        "overrides": METHODS[method].overrides,
        "lr": own[0]["lr"],
        "at_start": intervals(first),
        "at_end": intervals(last),
        "held_out_at_end": intervals([record["held_out"] for record in own]),
        "effective_answers_at_success": level_texts(equal_success(own, "effective_answers")),
        "minus_rival_at_success": level_texts(
            equal_success(own, "effective_answers", rivals) if rivals else {}
        ),
        "target": None if targets[0] is None else intervals(targets),
        "curve": mean_curve(own),
        "seeds": [{"seed": record["seed"], **record["curve"][-1]} for record in own],
        "shown": own[0]["shown"],
    }


def end_table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The state after training."""
    table = [["method", "lr", *(title for title, _ in COLUMNS.values())]]
    before = results[0]["at_start"]
    texts = [
        Interval(**before[name]).text(form)
        for name, (_, form) in COLUMNS.items()
        if name != "kl_target"
    ]
    table.append(["before training", "", *texts, ""])
    for result in results:
        cells = []
        for name, (_, form) in COLUMNS.items():
            if name not in result["at_end"]:
                cells.append("")
                continue
            cells.append(Interval(**result["at_end"][name]).text(form))
            if name == "kl_target":
                cells[-1] = f"{result['at_start'][name]['mean']:{form}} -> {cells[-1]}"
        table.append([result["label"], f"{result['lr']:g}", *cells])
    return table


def target_table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the policies with a target would measure if they were there."""
    names = [name for name in COLUMNS if name != "kl_target"]
    table = [["target of", *(COLUMNS[name][0] for name in names)]]
    for result in results:
        if result["target"] is not None:
            cells = [Interval(**result["target"][name]).text(COLUMNS[name][1]) for name in names]
            table.append([result["label"], *cells])
    return table


def equal_success_table(results: Sequence[dict[str, Any]], key: str, form: str) -> list[list[str]]:
    """A measure where success passes each level."""
    table = [["method", *(f"at {level:.0%}" for level in LEVELS)]]
    for result in results:
        cells = [
            "" if values is None else Interval(**values).text(form)
            for values in result[key].values()
        ]
        table.append([result["label"], *cells])
    return table


def tuning_table(tuning: Sequence[Record]) -> list[list[str]]:
    """The measure that chose the learning rates, and the success beside it."""
    rates = sorted({record["lr"] for record in tuning})
    table = [["method", *(f"lr {lr:g}" for lr in rates)]]
    for method in dict.fromkeys(record["method"] for record in tuning):
        cells = []
        for lr in rates:
            last = [r["curve"][-1] for r in of_method(tuning, method) if r["lr"] == lr]
            score, success = (mean(row[name] for row in last) for name in (TUNED_FOR, "success"))
            cells.append(f"{score:.2f} ({success:.3f})")
        table.append([METHODS[method].label, *cells])
    return table


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def page(facts: dict[str, Any], tuning: Sequence[Record], images: str) -> str:
    """All tables and both pictures, in Markdown."""
    results, made = facts["results"], facts["environment"]
    num_seeds = len(results[0]["seeds"])
    parts = [
        "# Distribution matching, measured",
        f"Written by run.py; README.md says what it means. Means over {num_seeds} seeds, "
        f"from {facts['num_starts']} start policies, after {facts['steps']} steps, "
        f"{facts['intervals']}; every number is computed from the probabilities of all answers to "
        f"the {len(facts['trained_on'])} training prompts.",
        markdown(end_table(results)),
        f"![success against diversity, and the distance to the target]({images}/{TRAINING_IMAGE})",
        f"![the answers to one prompt]({images}/{ANSWERS_IMAGE})",
        "## Where the targets lie",
        markdown(target_table(results)),
        "## Effective right answers at equal success",
        "Interpolated linearly in success between the measurements around its first crossing of "
        "the level; empty where a seed does not get there.",
        markdown(equal_success_table(results, "effective_answers_at_success", ".1f")),
    ]
    others = [result for result in results if result["method"] != RIVAL]
    if others and others[0]["minus_rival_at_success"]:
        parts += [
            f"The same minus {METHODS[RIVAL].label} from the same start policy, the mean of the "
            "differences:",
            markdown(equal_success_table(others, "minus_rival_at_success", "+.1f")),
        ]
    if tuning:
        parts += [
            "## Learning rates",
            f"Chosen by the {facts['rates_chosen_by']}: that number, and in brackets the success.",
            markdown(tuning_table(tuning)),
        ]
    parts.append(
        f"{made['device']}, torch {made['versions']['torch']}, commit {made['commit'][:7]}, "
        f"`{made['command']}`, {facts['elapsed_s'] / 60:.0f} core minutes."
    )
    return "\n\n".join(parts) + "\n"


def write_report(records: Sequence[Record], tuning: Sequence[Record], out: Path) -> None:
    """Print the page; write it with the record and the pictures to their places under `out`.

    Raises ValueError when runs of one seed did not start from the same policy.
    """
    starts = {(record["seed"], record["reference"]) for record in (*records, *tuning)}
    if len(starts) > len({seed for seed, _ in starts}):
        raise ValueError("runs of one seed started from several policies: give a new --folder")
    results = [
        summary(records, method) for method in dict.fromkeys(record["method"] for record in records)
    ]
    facts = {
        "environment": environment(torch.device("cpu")),
        "steps": records[0]["steps"],
        "trained_on": records[0]["trained_on"],
        "num_starts": len({record["reference"] for record in records}),
        "intervals": "with 95 % intervals (Student's t)",
        "rates_chosen_by": f"largest mean {TUNED_FOR} at the end, on seeds of their own",
        "elapsed_s": sum(record["elapsed_s"] for record in (*records, *tuning)),
        "tuning": [
            {key: record[key] for key in ("method", "lr", "seed")} | record["curve"][-1]
            for record in tuning
        ],
        "results": results,
    }
    text = json.dumps(rounded(facts), indent=1, allow_nan=False) + "\n"
    write_whole(out / "benchmarks" / "results" / "distribution_matching.json", text)
    images = out / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    draw_training(results, images / TRAINING_IMAGE)
    draw_answers(results, images / ANSWERS_IMAGE)
    text = page(facts, tuning, "../../docs/images")
    write_whole(out / "examples" / "distribution_matching" / "results.md", text)
    print(text)


def rounded(value: Any) -> Any:
    """Five significant digits, and null for what is no number, all the way down."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    return value
