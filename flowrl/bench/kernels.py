"""`flowrl bench kernels`: the language-model head against its rivals.

Each variant first runs alone in a process of its own, which gives its errors against float64 and
its memory; one that fails there is named with the reason. An exact variant of ours that is wrong
stops everything. The others are then timed in turn, round by round, and "/ torch" is the median of
the ratios to PyTorch's materialised logits of the same round, so a drift of the machine cancels.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flowrl.bench.inputs import HEADS, Case, make_inputs, sample_states
from flowrl.bench.measure import environment, one_pass, time_interleaved
from flowrl.bench.variants import MATERIALISED, Variant, all_variants, missing

PASSES = {"forward": False, "forward_backward": True}
LOGPROB_TOLERANCE = 1e-4
# Relative norm, of the exact backward; half precision rounds the operands of its products.
GRAD_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3}


def bench_kernels(
    cases: Sequence[Case],
    device: torch.device,
    drop_masses: Sequence[float] = (),
    only: Sequence[str] = (),
    repeats: int = 7,
    probe_timeout_s: float = 300,
    json_path: Path | None = None,
) -> dict:
    """Measure every variant, or those named in `only`, on every case, and print tables.

    The JSON is rewritten after each case, so what an interrupted run has measured is kept.
    Raises ValueError for unknown names and for a wrong result of an exact variant of ours.
    """
    torch.set_flush_denormal(True)
    variants = all_variants(device.type, drop_masses)
    if unknown := set(only) - set(variants):
        raise ValueError(f"no variant {sorted(unknown)}; there are {', '.join(variants)}")
    if only:
        variants = {name: v for name, v in variants.items() if name in {MATERIALISED, *only}}
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)  # instead of 80, which cuts the tables
    report: dict = {"environment": environment(device), "not_run": {}, "results": []}
    probes: dict[str, list[dict]] = {}
    for name, variant in variants.items():
        reason = missing(variant, device.type)
        if reason is None:
            say(f"errors and memory of {name}")
            probes[name], reason = run_probe(name, cases, device, drop_masses, probe_timeout_s)
        if reason is not None:
            report["not_run"][name] = reason
    for index, case in enumerate(cases):
        say(f"case {index + 1} of {len(cases)}: {repeats + 1} rounds of each pass")
        figures = {name: probe[index] for name, probe in probes.items() if index < len(probe)}
        if MATERIALISED not in figures:
            raise ValueError(f"PyTorch itself does not run: {report['not_run'][MATERIALISED]}")
        for name in figures:
            check(name, variants[name], figures[name], case)
        results = time_case(case, {name: variants[name] for name in figures}, device, repeats)
        report["results"] += [
            {
                **asdict(case),
                "states": None if case.states is None else Path(case.states).name,
                "distribution": case.distribution,
                "variant": name,
                "is_per_token": variants[name].is_per_token,
                "drop_mass": variants[name].drop_mass,
                **figures[name],
                **times,
            }
            for name, times in results.items()
        ]
        if json_path is not None:
            json_path.write_text(json.dumps(report, indent=1) + "\n")
        console.print(render(report["results"][-len(results) :]))
    facts = report["environment"]
    console.print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['versions']['torch']}, "
        f"commit {facts['commit'][:12]}, load {facts['load_average']:.1f}. Milliseconds and ratios "
        f"to torch: medians of {repeats} rounds. MiB: peak beyond inputs and gradients. logp, dH, "
        "dW: errors against float64. kept, left out: pairs, and largest bound on the mass. "
        "* sum of the log-probs only."
    )
    for name, reason in report["not_run"].items():
        console.print(f"not run: {name}: {reason}", markup=False)
    return report


def say(line: str) -> None:
    """Show what is under way, away from the results."""
    Console(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def run_probe(
    name: str,
    cases: Sequence[Case],
    device: torch.device,
    drop_masses: Sequence[float],
    timeout_s: float,
) -> tuple[list[dict], str | None]:
    """Return the figures of the cases that ran, and why the first that did not run did not."""
    spec = {
        "variant": name,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "drop_masses": list(drop_masses),
        "cases": [asdict(case) for case in cases],
    }
    command = [sys.executable, "-m", "flowrl.bench.probe", json.dumps(spec)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        reason = None
        try:
            code = subprocess.run(
                command, stdout=out, stderr=err, timeout=timeout_s * len(cases), check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code, reason = 0, f"took more than {timeout_s:g} s a case"
        out.seek(0)
        err.seek(0)
        # Some libraries print to standard output when they are imported.
        figures = [json.loads(line) for line in out if line.startswith("{")]
        if code != 0:
            lines = [line.strip() for line in err if line.strip()]
            reason = lines[-1][:200] if lines else f"exit status {code}"
    return figures, reason


def check(name: str, variant: Variant, figures: dict, case: Case) -> None:
    """Refuse to time an exact variant of ours whose results are wrong."""
    if variant.implementation is None or variant.drop_mass > 0:
        return
    allowed = {
        "logprob_error": LOGPROB_TOLERANCE,
        "grad_hidden_error": GRAD_TOLERANCE[case.dtype],
        "grad_weight_error": GRAD_TOLERANCE[case.dtype],
    }
    for figure, tolerance in allowed.items():
        if not figures[figure] <= tolerance:
            raise ValueError(
                f"{name} is wrong at {case}: {figure} {figures[figure]:.1e}, allowed "
                f"{tolerance:.0e}; nothing more was timed"
            )


def time_case(
    case: Case, variants: dict[str, Variant], device: torch.device, repeats: int
) -> dict[str, dict]:
    """Return name -> pass -> milliseconds and ratios to the materialised logits."""
    torch.compiler.reset()
    inputs = make_inputs(case, device)
    runs = {name: variant.load() for name, variant in variants.items()}
    results: dict[str, dict] = {name: {} for name in runs}
    for direction, backward in PASSES.items():
        works = {name: partial(one_pass, run, inputs, backward) for name, run in runs.items()}
        times = time_interleaved(works, repeats, device)
        for name, samples in times.items():
            ratios = [a / b for a, b in zip(samples, times[MATERIALISED], strict=True)]
            results[name][direction] = {
                "median_ms": statistics.median(samples),
                "min_ms": min(samples),
                "max_ms": max(samples),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                # Of the least disturbed rounds, for a machine with much else to do.
                "ratio_of_minima": min(samples) / min(times[MATERIALISED]),
            }
    return results


def render(rows: list[dict]) -> Table:
    """The table of one case."""
    first = rows[0]
    table = Table(
        title=f"T {first['num_rows']}, H {first['hidden_size']}, V {first['vocab_size']}, "
        f"{first['dtype']}, {first['distribution']}: {first['mean_entropy_nats']:.2f} nats",
        box=box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
    )
    table.add_column("variant", no_wrap=True)
    for column in ("fwd", "ratio", "f+b", "ratio", "MiB", "logp", "dH", "dW", "kept", "left out"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        forward, both = row["forward"], row["forward_backward"]
        is_sparse = row["drop_mass"] > 0
        table.add_row(
            row["variant"] + ("" if row["is_per_token"] else " *"),
            short(forward["median_ms"]),
            f"{forward['ratio']:.2f}",
            short(both["median_ms"]),
            f"{both['ratio']:.2f}",
            f"{row['extra_mib']:.0f}",
            f"{row['logprob_error']:.0e}",
            f"{row['grad_hidden_error']:.0e}",
            f"{row['grad_weight_error']:.0e}",
            f"{row['kept_share']:.3f}" if is_sparse else "",
            f"{row['dropped_mass_max']:.0e}" if is_sparse else "",
        )
    return table


def short(milliseconds: float) -> str:
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def make_cases(
    rows: Sequence[int],
    heads: Sequence[str],
    dtypes: Sequence[str],
    logit_std: float,
    peak: float,
    entropies: Sequence[float],
    temperatures: Sequence[float],
    states: Path | None,
    device: torch.device,
    cache: Path,
) -> list[Case]:
    """All combinations; with `temperatures` on SmolLM2's states, which are sampled if need be.

    Raises ValueError for a name that there is none of, for states of another head, and for
    entropies without peaked logits.
    """
    if entropies and not (peak > 0 and not temperatures and min(entropies) > 0):
        raise ValueError("--entropy scales peaked logits: it wants to be > 0, with --peak")
    if unknown := [name for name in heads if name not in HEADS]:
        raise ValueError(f"no head {unknown}; there are {', '.join(HEADS)}")
    if unknown := [name for name in dtypes if name not in GRAD_TOLERANCE]:
        raise ValueError(f"no dtype {unknown}; there are {', '.join(GRAD_TOLERANCE)}")
    if temperatures and list(heads) != ["smollm2-135m"]:
        raise ValueError(f"--temperature samples from smollm2-135m, not {', '.join(heads)}")
    cases = [
        Case(num_rows, *HEADS[name], dtype, logit_std, peak)
        for name, num_rows, dtype in product(heads, rows, dtypes)
    ]
    if entropies:
        cases = [replace(case, entropy=nats) for case, nats in product(cases, entropies)]
    if not temperatures:
        return cases
    states = states or cache / "smollm2_states.pt"
    if not states.exists():
        states.parent.mkdir(parents=True, exist_ok=True)
        say(f"sampling SmolLM2's states into {states}, which takes minutes on a CPU")
        sample_states(states, max(rows), temperatures, device, cache)
    return [
        replace(case, states=str(states), temperature=temperature)
        for case, temperature in product(cases, temperatures)
    ]
