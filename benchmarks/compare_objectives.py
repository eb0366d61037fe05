"""FlowRL, GRPO and PPO on the quickstart's task with SmolLM2-135M, several seeds each.

    python benchmarks/compare_objectives.py        # about an hour on two idle cores

Every finished run is a folder with result.json, so the command continues where it was stopped. At
the end: benchmarks/results/compare_objectives.json, a picture in docs/images, a report in
benchmarks/reports.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flowrl.bench.measure import environment
from flowrl.config import load_config
from flowrl.evaluate import score_responses
from flowrl.files import write_whole
from flowrl.intervals import Accuracy, bootstrap_interval
from flowrl.metrics import metric_series, read_metrics
from flowrl.plots import rolling_mean
from flowrl.run import Run, start
from flowrl.settings import Config
from flowrl.train import training_step

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
NAME = "compare_objectives"
WINDOW = 5  # steps of the picture's rolling mean
# Settings beside the quickstart's; the critic learns at ten times the policy's rate, verl's ratio.
METHODS: dict[str, tuple[str, ...]] = {
    "FlowRL": (),
    "GRPO": ("algorithm.objective=grpo",),
    "PPO": (
        "algorithm.objective=ppo",
        "critic.optim={lr: 2.0e-4, lr_warmup_steps: 3, weight_decay: 0.0}",
    ),
}
COLOURS = {"FlowRL": "#1f5fa8", "GRPO": "#d9480f", "PPO": "#be123c", "before": "#6b7280"}

Result = dict[str, Any]


def pass_at_k(num_right: int, num_samples: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right (arXiv 2107.03374, Eq. 1)."""
    return 1 - comb(num_samples - num_right, k) / comb(num_samples, k)


def powers_up_to(num_samples: int) -> list[int]:
    return [2**i for i in range(num_samples.bit_length())]


def judged(run: Run, num_samples: int) -> list[int]:
    """How many of `num_samples` answers to each held-out question are right."""
    sampling = replace(run.val_sampling, n=num_samples)
    prompts = [p.token_ids for p in run.val_prompts]
    responses = run.engine.generate(prompts, sampling, run.config.trainer.seed)
    _, scores = score_responses(run.tokenizer, run.rewards, run.val_prompts, responses)
    threshold = run.config.reward.correct_threshold
    is_right = np.reshape([s.score >= threshold for s in scores], (len(prompts), num_samples))
    return is_right.sum(axis=1).tolist()


def config_of(overrides: Sequence[str], seed: int, steps: int, folder: Path) -> Config:
    return load_config(
        QUICKSTART,
        [
            *overrides,
            f"trainer.seed={seed}",
            f"trainer.total_training_steps={steps}",
            "trainer.logger=[console, jsonl]",
            f"trainer.default_local_dir={folder}",
        ],
    )


def trained(method: str, seed: int, steps: int, num_samples: int, folder: Path) -> Result:
    """One run's result: read where there is one, else made; no steps gives the untrained model."""
    path = folder / "result.json"
    if not path.exists():
        started = time.perf_counter()
        # The configuration wants at least one step; without any, its objective does not matter.
        config = config_of(METHODS.get(method, ()), seed, max(steps, 1), folder)
        with start(config) as run, run.console:
            for _ in range(steps):
                run.log(training_step(run))
            result = {
                "method": method,
                "seed": seed,
                "steps": steps,
                "num_samples": num_samples,
                "num_right": judged(run, num_samples),
                "elapsed_s": time.perf_counter() - started,
            }
        write_whole(path, json.dumps(result) + "\n")
    result = json.loads(path.read_text(encoding="utf-8"))
    if (result["steps"], result["num_samples"]) != (steps, num_samples):
        raise ValueError(
            f"{path} has {result['steps']} steps and {result['num_samples']} samples, not {steps} "
            f"and {num_samples}: give a new --folder"
        )
    return result


def accuracy(results: Sequence[Result], k: int) -> Accuracy:
    """pass@k over the held-out questions, each the mean over the seeds; k = 1 is avg@n."""
    per_question = [
        mean(
            pass_at_k(num_right, result["num_samples"], k)
            for result, num_right in zip(results, counts, strict=True)
        )
        for counts in zip(*(result["num_right"] for result in results), strict=True)
    ]
    return bootstrap_interval(per_question)


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """pass@k with its interval over questions, and as a mean of each seed."""
    return {
        "method": results[0]["method"],
        "elapsed_s": [round(result["elapsed_s"], 1) for result in results],
        "pass_at": {
            str(k): {
                **vars(accuracy(results, k)),
                "seeds": [accuracy([result], k).mean for result in results],
            }
            for k in powers_up_to(results[0]["num_samples"])
        },
    }


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def report_text(summaries: Sequence[dict[str, Any]], facts: dict[str, Any], image: str) -> str:
    """The report in Markdown."""
    ks = list(summaries[0]["pass_at"])
    num_samples = facts["num_samples"]
    lines = [
        "# FlowRL, GRPO and PPO on two-digit addition",
        "",
        f"SmolLM2-135M-Instruct, `configs/quickstart.yaml`, {facts['steps']} steps, "
        f"{facts['num_seeds']} seeds, {facts['num_questions']} held-out questions. Learning rate, "
        "batches and samples are the quickstart's for all and were chosen with FlowRL; the rest "
        "are defaults. One text is right per question, so this compares learning, not diversity.",
        "",
        f"Right answers in %, from {num_samples} samples a question at temperature 1. avg@"
        f"{num_samples} is the mean, pass@k the unbiased estimate; in brackets 95 % bootstrap "
        "intervals over questions of the mean over seeds, which leave out the spread of the seeds: "
        "the next table has these.",
        "",
        f"| method | avg@{num_samples} | " + " | ".join(f"pass@{k}" for k in ks[1:]) + " |",
        "|---" * (len(ks) + 1) + "|",
    ]
    for entry in summaries:
        cells = [
            f"{percent(v['mean'])} ({percent(v['low'])} to {percent(v['high'])})"
            for v in entry["pass_at"].values()
        ]
        lines.append(f"| {entry['method']} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"| method | avg@{num_samples} of each seed | pass@{ks[-1]} of each seed | s a run |",
        "|---|---|---|---|",
    ]
    for entry in summaries:
        first, last = entry["pass_at"][ks[0]]["seeds"], entry["pass_at"][ks[-1]]["seeds"]
        seconds = ", ".join(f"{s:.0f}" for s in entry["elapsed_s"])
        cells = [", ".join(map(percent, first)), ", ".join(map(percent, last)), seconds]
        lines.append(f"| {entry['method']} | " + " | ".join(cells) + " |")
    made = facts["environment"]
    lines += [
        "",
        f"![reward over training and pass@k]({image})",
        "",
        f"{made['device']}, {made['threads']} threads (load average {made['load_average']:.1f}, "
        f"which the run times are to be read with), torch {made['versions']['torch']}, commit "
        f"{made['commit'][:7]}, `{made['command']}`.",
        "",
    ]
    return "\n".join(lines)


def draw(
    summaries: Sequence[dict[str, Any]], curves: dict[str, list[list[float]]], path: Path
) -> None:
    """Reward over training, and pass@k against k with intervals."""
    figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for method, rows in curves.items():
        steps = np.arange(1, len(rows[0]) + 1)
        for row in rows:
            left.plot(steps, row, color=COLOURS[method], linewidth=0.7, alpha=0.3)
        smooth = rolling_mean(np.mean(rows, axis=0), WINDOW)
        left.plot(steps, smooth, color=COLOURS[method], linewidth=2, label=method)
    left.set(title="Training", xlabel="step", ylabel="share of right answers")
    for entry in summaries:
        ks = [int(k) for k in entry["pass_at"]]
        values = list(entry["pass_at"].values())
        means = np.array([v["mean"] for v in values])
        errors = [
            means - np.array([v["low"] for v in values]),
            np.array([v["high"] for v in values]) - means,
        ]
        colour = COLOURS[entry["method"]]
        right.errorbar(ks, means, errors, fmt="o-", capsize=3, color=colour, label=entry["method"])
    right.set(title="Held-out questions", xlabel="k", ylabel="pass@k", xscale="log")
    right.set_xticks(ks, [str(k) for k in ks])
    right.minorticks_off()
    for axes in (left, right):
        axes.set_ylim(0, 1.02)
        axes.grid(color="#e5e7eb", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main(
    folder: Annotated[Path, typer.Option(help="finished runs are kept here")] = Path("runs") / NAME,
    seeds: Annotated[int, typer.Option(help="runs a method")] = 3,
    steps: Annotated[int, typer.Option(help="training steps")] = 40,
    num_samples: Annotated[int, typer.Option("--samples", help="answers a held-out question")] = 16,
    out: Annotated[Path, typer.Option(help="where benchmarks/ and docs/ lie")] = ROOT,
) -> None:
    groups = [[trained("before", 0, 0, num_samples, folder / "before")]]
    curves: dict[str, list[list[float]]] = {}
    for method in METHODS:
        homes = [folder / f"{method}_seed{seed}" for seed in range(seeds)]
        groups.append(
            [trained(method, seed, steps, num_samples, home) for seed, home in enumerate(homes)]
        )
        curves[method] = [metric_series(read_metrics(h), "critic/accuracy")[1] for h in homes]
    summaries = [summary(group) for group in groups]
    facts = {
        "environment": environment(torch.device("cpu")),
        "steps": steps,
        "num_seeds": seeds,
        "num_samples": num_samples,
        "num_questions": len(groups[0][0]["num_right"]),
        "results": summaries,
    }
    results = out / "benchmarks" / "results" / f"{NAME}.json"
    report = out / "benchmarks" / "reports" / f"{NAME}.md"
    image = out / "docs" / "images" / f"{NAME}.png"
    write_whole(results, json.dumps(facts, indent=1) + "\n")
    draw(summaries, curves, image)
    write_whole(report, report_text(summaries, facts, f"../../docs/images/{NAME}.png"))
    print(report.read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
