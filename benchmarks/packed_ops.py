"""What the benchmarks of the ops over packed sequences share: layouts, check, timing, output.

A benchmark gives a function that runs its op once and returns what it computed. Each implementation
is first compared with the reference in float64 on the same inputs, and a failure stops the run;
then all are timed in turn. GB/s are the bytes that the op must move at least, as the benchmark
counts them, over the median time. "/ ref" is the median, with the range, of the ratios to the
reference in the same round.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flowrl.bench.measure import environment, time_interleaved

# (implementation, inputs, whether to run the backward) -> what the op computed
Run = Callable[[str, tuple[Tensor, ...], bool], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Layout:
    """Equally long sequences: the sums cost the same, and the load of the CTAs is known."""

    num_sequences: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.arange(self.num_sequences + 1) * self.length


def implementations(device: torch.device) -> list[str]:
    return ["reference", "triton" if device.type == "cuda" else "cpu"]


def widen(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def check(name: str, got: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float) -> None:
    for index, (value, exact) in enumerate(zip(got, truth, strict=True)):
        error = float((value.double() - exact).norm() / exact.norm())
        if not error <= tolerance:
            raise SystemExit(
                f"{name} is wrong, nothing was timed: output {index} is off by {error:.1e} "
                f"relative to its norm (allowed {tolerance:.0e})"
            )


def measure(
    run: Run,
    inputs: tuple[Tensor, ...],
    layout: Layout,
    num_bytes: dict[str, int],
    tolerance: float,
    repeats: int,
    device: torch.device,
) -> list[dict]:
    """Return one row per pass and implementation; num_bytes: pass -> bytes."""
    inputs = tuple(x.to(device) for x in inputs)
    truth = run("reference", widen(inputs), True)
    for name in implementations(device):
        check(name, run(name, inputs, True), truth, tolerance)
    results = []
    for direction, count in num_bytes.items():
        works = {
            name: partial(run, name, inputs, direction != "forward")
            for name in implementations(device)
        }
        times = time_interleaved(works, repeats, device)
        for name, samples in times.items():
            ratios = [a / b for a, b in zip(samples, times["reference"], strict=True)]
            results.append(
                {
                    "num_sequences": layout.num_sequences,
                    "length": layout.length,
                    "pass": direction,
                    "implementation": name,
                    "median_ms": statistics.median(samples),
                    "min_ms": min(samples),
                    "max_ms": max(samples),
                    "num_bytes": count,
                    "gb_per_s": count / statistics.median(samples) / 1e6,
                    "ratio_to_reference": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                }
            )
    return results


def report(title: str, results: list[dict], device: torch.device, json_path: Path | None) -> None:
    """Print the table and write the JSON."""
    facts = environment(device)
    table = Table(title=title)
    for column in ("B x length", "pass", "run by"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "GB/s", "/ ref", "range"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            f"{row['num_sequences']} x {row['length']}",
            "fwd" if row["pass"] == "forward" else "f+b",
            row["implementation"],
            f"{row['median_ms']:.3f}",
            f"{row['gb_per_s']:.2f}",
            f"{row['ratio_to_reference']:.3f}",
            "{:.3f}..{:.3f}".format(*row["ratio_range"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{facts['device']}, {facts['threads']} threads, torch {torch.__version__}, load "
        f"{facts['load_average']:.1f}, commit {facts['commit'][:12]}; medians"
    )
    if json_path is not None:
        json_path.write_text(json.dumps({"environment": facts, "results": results}, indent=1))
