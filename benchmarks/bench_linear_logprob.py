"""Time linear_logprob against materialised PyTorch at the head of SmolLM2 (H = 576, V = 49152).

    python benchmarks/bench_linear_logprob.py --rows 512 --rows 1024 --json results.json
    python benchmarks/bench_linear_logprob.py --dtype bfloat16 --drop-mass 0.001953125 --peak 3

Correctness against float64 comes first, and a failure stops the run. Variants are interleaved, so
that a drift of the machine hits all of them; "/ torch" is the median, with the range, of the
ratios to the materialised variant in the same round. Denormals are flushed for all. Peak MiB is the
growth of resident (CPU) or allocated (CUDA) memory over the inputs, gradients included; FLOPs are
2 T H V forward and 6 T H V with backward, for all variants alike, so recomputation counts as lost
speed. --peak gives logits that fall off with the token's rank, like those of a language model, with
a few likely tokens on top; the mean entropy and the share of (row, tile) pairs that --drop-mass
keeps are printed.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from flowrl.kernels.linear_logprob import linear_logprob, live_implementation, reference

HIDDEN_SIZE, VOCAB_SIZE = 576, 49152
MATERIALISED = "materialised"
DROPPED = " drop_mass"
LOGPROB_TOLERANCE = 1e-4
CHECKED_ROWS = 64  # float64 logits of more rows only cost time

Variant = Callable[[Tensor, Tensor, Tensor], Tensor]


def materialised(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logprobs = F.linear(hidden, weight).log_softmax(dim=1)
    return logprobs.gather(1, target[:, None]).squeeze(1)


def fused(implementation: str, drop_mass: float) -> Variant:
    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprob(
            hidden, weight, target, drop_mass=drop_mass, implementation=implementation
        )[0]

    return run


def make_inputs(num_rows: int, logit_std: float, peak: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian logits, or if peak > 0 a fall by `peak` nats per factor e of the rank beyond 64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, HIDDEN_SIZE, generator=generator)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) / HIDDEN_SIZE**0.5
    target = torch.randint(VOCAB_SIZE, (num_rows,), generator=generator)
    if peak == 0:
        return hidden, weight * logit_std, target
    fall = peak * (torch.arange(VOCAB_SIZE) / 64).log1p()
    hidden *= 0.5
    hidden[:, 0], weight[:, 0] = 1, -fall
    likely = [
        (torch.rand(num_rows, generator=generator) ** 4 * VOCAB_SIZE).long() for _ in range(5)
    ]
    for order, tokens in enumerate([target, *likely]):
        lift = 12 - 2 * order + 0.8 * fall[tokens]
        hidden[:, 1:] += lift[:, None] * weight[tokens, 1:]
    return hidden, weight, target


def kept_share(hidden: Tensor, weight: Tensor, target: Tensor, drop_mass: float) -> float:
    forward = torch.ops.flowrl.linear_logprob_forward
    lse, target_logit, _, tile_lse = forward(hidden, weight, target, 0, 1.0)
    keep, _ = reference.select_tiles(tile_lse, lse, target_logit - lse, target, drop_mass)
    return float(keep.float().mean())


def check(variants: dict[str, Variant], hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    """Compare log-probs and their gradients with float64; return the mean entropy in nats."""
    hidden, target = hidden[:CHECKED_ROWS].detach(), target[:CHECKED_ROWS]
    exact_hidden = hidden.double().requires_grad_()
    logprobs = (exact_hidden @ weight.detach().double().t()).log_softmax(dim=1)
    truth = logprobs.gather(1, target[:, None]).squeeze(1)
    (exact_grad,) = torch.autograd.grad(truth.sum(), exact_hidden)
    for name, run in variants.items():
        if name == MATERIALISED or name.endswith(DROPPED):
            continue  # with drop_mass the gradient is not exact; the tests check its bound
        leaf = hidden.clone().requires_grad_()
        logprob = run(leaf, weight.detach(), target)
        (grad,) = torch.autograd.grad(logprob.sum(), leaf)
        error = float((logprob - truth).detach().abs().max())
        grad_error = float((grad - exact_grad).norm() / exact_grad.norm())
        grad_tolerance = 1e-5 if hidden.dtype == torch.float32 else 5e-3
        if not (error <= LOGPROB_TOLERANCE and grad_error <= grad_tolerance):
            raise SystemExit(
                f"{name} is wrong, nothing was timed: log-prob off by {error:.1e} "
                f"(allowed {LOGPROB_TOLERANCE:.0e}), gradient by {grad_error:.1e} "
                f"(allowed {grad_tolerance:.0e})"
            )
    return float(-(logprobs.exp() * logprobs).sum(1).mean().detach())


def one_pass(run: Variant, hidden: Tensor, weight: Tensor, target: Tensor, backward: bool) -> None:
    if not backward:
        with torch.no_grad():
            run(hidden, weight, target)
        return
    # Different weights per row, as in a policy gradient; some libraries only do a scalar loss.
    loss = (
        run(hidden, weight, target) * torch.linspace(-1, 1, len(hidden), device=hidden.device)
    ).sum()
    torch.autograd.grad(loss, (hidden, weight))


def peak_mib(work: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    # Linux with glibc: return what earlier variants freed, or it would hide what this one takes;
    # writing 5 resets the high-water mark of the resident memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_kib("VmRSS")
    work()
    return (_status_kib("VmHWM") - before) / 2**10


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def time_interleaved(works: dict[str, Callable[[], None]], repeats: int, device: torch.device):
    """Return name -> list of milliseconds, one round over all variants at a time."""
    times = {name: [] for name in works}
    for round_index in range(repeats + 1):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_index:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(
    variants: dict[str, Variant],
    num_rows: int,
    dtype: torch.dtype,
    logits: dict[str, float],
    drop_mass: float,
    repeats: int,
    device: torch.device,
) -> list[dict]:
    hidden, weight, target = (tensor.to(device) for tensor in make_inputs(num_rows, **logits))
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    mean_entropy = check(variants, hidden, weight, target)
    share = kept_share(hidden.detach(), weight.detach(), target, drop_mass) if drop_mass else 1.0

    results = []
    for direction, flops_factor in (("forward", 2), ("forward+backward", 6)):
        is_backward = direction != "forward"
        works = {
            name: partial(one_pass, run, hidden, weight, target, is_backward)
            for name, run in variants.items()
            if is_backward or not name.endswith(DROPPED)  # the forward is the same
        }
        peaks = {name: peak_mib(work, device) for name, work in works.items()}
        times = time_interleaved(works, repeats, device)
        for name, samples in times.items():
            median = statistics.median(samples)
            ratios = [a / b for a, b in zip(samples, times[MATERIALISED], strict=True)]
            results.append(
                {
                    "rows": num_rows,
                    "hidden_size": HIDDEN_SIZE,
                    "vocab_size": VOCAB_SIZE,
                    "dtype": str(dtype).removeprefix("torch."),
                    "mean_entropy_nats": mean_entropy,
                    "direction": direction,
                    "implementation": name,
                    "median_ms": median,
                    "min_ms": min(samples),
                    "max_ms": max(samples),
                    "gflops": flops_factor * num_rows * HIDDEN_SIZE * VOCAB_SIZE / median / 1e6,
                    "peak_mib": peaks[name],
                    "ratio_to_materialised": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                    "drop_mass": drop_mass if name.endswith(DROPPED) else 0.0,
                    "kept_share": share if name.endswith(DROPPED) else 1.0,
                }
            )
    return results


def environment(device: torch.device) -> dict:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def print_table(results: list[dict], facts: dict) -> None:
    first = results[0]
    table = Table(title=f"linear_logprob, H = {HIDDEN_SIZE}, V = {VOCAB_SIZE}, {first['dtype']}")
    for column in ("T", "pass", "variant"):
        table.add_column(column, no_wrap=True)
    for column in ("ms", "GF/s", "MiB", "/ torch", "range"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            str(row["rows"]),
            "fwd" if row["direction"] == "forward" else "f+b",
            row["implementation"],
            f"{row['median_ms']:.0f}",
            f"{row['gflops']:.0f}",
            f"{row['peak_mib']:.0f}",
            f"{row['ratio_to_materialised']:.2f}",
            "{:.2f}..{:.2f}".format(*row["ratio_range"]),
        )
    console = Console()
    console.print(table)
    console.print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, commit "
        f"{facts['commit'][:12]}; medians; mean entropy {first['mean_entropy_nats']:.2f} nats, "
        f"share of pairs kept {min(row['kept_share'] for row in results):.3f}"
    )


def main(
    rows: Annotated[list[int] | None, typer.Option(help="T; repeat for several")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    logit_std: Annotated[float, typer.Option(help="spread of the logits; sets the entropy")] = 3.0,
    peak: Annotated[float, typer.Option(help="fall of the logits with the rank; 0: none")] = 0.0,
    drop_mass: Annotated[float, typer.Option(help="> 0 adds variants with it")] = 0.0,
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    where = torch.device(device)
    live = live_implementation(where.type)
    names = [live] if live == "reference" else [live, "reference"]
    variants = {MATERIALISED: materialised} | {name: fused(name, 0.0) for name in names}
    if drop_mass:
        variants |= {live + DROPPED: fused(live, drop_mass)}
    logits = {"logit_std": logit_std, "peak": peak}
    torch.set_flush_denormal(True)
    results = []
    for num_rows in rows or [512, 1024]:
        results += measure(
            variants, num_rows, getattr(torch, dtype), logits, drop_mass, repeats, where
        )
    facts = environment(where)
    print_table(results, facts)
    if json_path is not None:
        json_path.write_text(json.dumps({"environment": facts, "results": results}, indent=1))


if __name__ == "__main__":
    typer.run(main)
