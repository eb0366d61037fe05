"""Measure what beta does to success and diversity, exactly, on the tiny enumerable policy.

    python examples/choosing_beta.py --json benchmarks/results/choosing_beta.json

Trains configs/tiny.yaml once per beta and seed (about half a minute each on two cores). Success is
the probability of a right answer and diversity the effective number of right answers (exponential
of the entropy over them), both computed by listing all answers, averaged over the 21 prompts.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowrl.config import load_config
from flowrl.policy.enumerate import exact_success
from flowrl.policy.tiny import TARGETS
from flowrl.run import Run, start
from flowrl.train import train

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"


def measure(run: Run) -> dict[str, float]:
    """Exact success, effective number of right answers of one policy."""
    results = [exact_success(run.policy.model, run.tokenizer, n) for n in TARGETS]
    return {
        "success": mean(success for success, _ in results),
        "effective_answers": mean(effective for _, effective in results),
    }


def trained(beta: float, seed: int, steps: int) -> dict[str, float]:
    """Train with one beta and measure."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            TINY,
            [
                f"flow.beta={beta}",
                f"trainer.seed={seed}",
                f"trainer.total_training_steps={steps}",
                "trainer.test_freq=-1",
                "trainer.val_before_train=false",
                "trainer.logger=[jsonl]",
                f"trainer.default_local_dir={folder}",
            ],
        )
        return measure(train(config))


def untrained() -> dict[str, float]:
    """Measure the policy before training."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start(load_config(TINY, [f"trainer.default_local_dir={folder}"])) as run,
    ):
        return measure(run)


def main(
    betas: Annotated[list[float], typer.Option("--beta")] = [0.1, 0.5, 1.5, 5.0, 15.0],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="seeds per beta")] = 2,
    steps: Annotated[int, typer.Option(help="training steps")] = 200,
    json_path: Annotated[Path | None, typer.Option("--json", help="also write JSON there")] = None,
) -> None:
    rows = [{"beta": None, "seed": None, **untrained()}]
    for beta in betas:
        for seed in range(seeds):
            rows.append({"beta": beta, "seed": seed, **trained(beta, seed, steps)})
    table = Table("beta", "tilt at |y| = 6", "seed", "success", "effective right answers (of 19)")
    for row in rows:
        beta = row["beta"]
        table.add_row(
            "before" if beta is None else f"{beta:g}",
            "" if beta is None else f"{6 * beta:g} nats",
            "" if beta is None else str(row["seed"]),
            f"{row['success']:.3f}",
            f"{row['effective_answers']:.1f}",
        )
    Console().print(table)
    if json_path is not None:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=TINY.parent
        ).stdout.strip()
        record = {
            "command": " ".join(["python", "examples/choosing_beta.py", *sys.argv[1:]]),
            "commit": commit,
            "device": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "steps": steps,
            "rows": rows,
        }
        json_path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
