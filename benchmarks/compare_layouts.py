"""The quickstart in one process and spread over ranks: how far the metrics of five steps differ.

    python benchmarks/compare_layouts.py    # SmolLM2 in float32 on TP3 x PP2, minutes on two cores

SmolLM2 has three key-value heads, which two tensor-parallel ranks cannot share. Both runs sample
their own responses, so the metrics agree only if every response is the same. Exits 1 if a metric
differs by more than 1e-4, absolutely and relatively.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from flowrl.bench.measure import environment
from flowrl.files import write_whole
from flowrl.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compare_layouts.json"
BOUND = 1e-4
# Wall-clock times and what is divided by them.
TIMED = ("timing_s/", "perf/")
COMMON = ("model.dtype=float32", "trainer.logger=[jsonl]", "trainer.save_freq=-1")


def run(command: list[str], folder: Path, steps: int, overrides: list[str]) -> list[dict]:
    """Train, and return the rows of metrics."""
    arguments = [*COMMON, f"trainer.total_training_steps={steps}", *overrides]
    arguments.append(f"trainer.default_local_dir={folder}")
    config = str(ROOT / "configs" / "quickstart.yaml")
    # Ranks share the cores; torchrun itself would give each a single thread with a warning.
    environment_of_run = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(
        [sys.executable, *command, "-m", "flowrl", "train", config, *arguments],
        check=True,
        cwd=ROOT,
        env=environment_of_run,
    )
    return read_metrics(folder)


def distance(one: float | None, other: float | None) -> float:
    """The smaller of the absolute and the relative difference; None stands for no finite number."""
    if one is None or other is None:
        return 0.0 if one is other else math.inf
    return abs(one - other) / max(1.0, abs(one))


def largest_differences(rows: list[dict], others: list[dict]) -> dict[str, float]:
    """Metric -> its largest distance over the steps. Raises ValueError for other steps or names."""
    worst: dict[str, float] = {}
    for row, other in zip(rows, others, strict=True):
        if row.keys() != other.keys() or row["step"] != other["step"]:
            raise ValueError(
                f"step {row['step']} against {other['step']}: only one of the runs has "
                f"{sorted(row.keys() ^ other.keys())}"
            )
        for name in row.keys() - {"step"}:
            if not name.startswith(TIMED):
                worst[name] = max(worst.get(name, 0.0), distance(row[name], other[name]))
    return dict(sorted(worst.items()))


def main(
    tensor: Annotated[int, typer.Option(help="tensor-parallel ranks")] = 3,
    pipeline: Annotated[int, typer.Option(help="pipeline stages")] = 2,
    steps: Annotated[int, typer.Option(help="training steps")] = 5,
    overrides: Annotated[list[str] | None, typer.Argument(help="of both runs")] = None,
    path: Annotated[Path, typer.Option("--json", help="the record")] = RESULTS,
) -> None:
    overrides = overrides or []
    layout = [
        f"parallel.tensor_model_parallel_size={tensor}",
        f"parallel.pipeline_model_parallel_size={pipeline}",
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(tensor * pipeline)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = run([], folder / "one", steps, overrides)
        spread = run(torchrun, folder / "spread", steps, [*overrides, *layout])
    differences = largest_differences(one, spread)
    for metric, value in differences.items():
        print(f"{metric:40} {value:.1e}")
    worst = max(differences, key=lambda metric: differences[metric])
    print(f"TP{tensor} x PP{pipeline}, {steps} steps: largest {differences[worst]:.1e} ({worst})")
    record = {
        "environment": environment(torch.device("cpu")),
        "layout": {"tensor": tensor, "pipeline": pipeline},
        "steps": steps,
        "overrides": overrides,
        "largest_differences": differences,
        "rows": {"one process": one, "spread": spread},
    }
    write_whole(path, json.dumps(record, indent=1) + "\n")
    if differences[worst] > BOUND:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
