"""Time, memory and errors of one variant of the head, and where a measurement was made."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flowrl.bench.variants import Run, Variant
from flowrl.kernels.linear_logprob import linear_logprob, reference

CHECKED_ROWS = 256  # float64 logits of more rows only cost time
DISTRIBUTIONS = ("torch", "triton", "cut-cross-entropy", "liger-kernel", "quack-kernels", "verl")


def one_pass(run: Run, inputs: tuple[Tensor, ...], backward: bool) -> tuple[Tensor, ...]:
    """Return the log-probs, after a backward followed by the gradients of hidden and weight."""
    hidden, weight, target, grad = inputs
    if not backward:
        with torch.no_grad():
            return (run(hidden, weight, target),)
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob = run(hidden, weight, target)
    # A gradient of its own for each row, as in a policy gradient; a sum has none to give.
    loss = logprob if logprob.dim() == 0 else torch.dot(logprob.float(), grad)
    return (logprob.detach(), *torch.autograd.grad(loss, (hidden, weight)))


def errors(run: Run, inputs: tuple[Tensor, ...], is_per_token: bool) -> dict[str, float]:
    """Deviations from float64 on up to CHECKED_ROWS rows spread over the batch.

    The log-probs' is the largest, the gradients' are norms relative to the truth's. Of a sum of
    log-probs the deviation is divided by the number of rows.
    """
    hidden, weight, target, grad = inputs
    step = -(-len(target) // CHECKED_ROWS)
    rows = (hidden[::step].contiguous(), weight, target[::step].contiguous(), grad[::step])
    upstream = rows[3].double() if is_per_token else torch.ones_like(rows[3]).double()
    logits = rows[0].double() @ weight.double().t()
    true_logprobs = logits.log_softmax(dim=1)
    truth = true_logprobs.gather(1, rows[2][:, None]).squeeze(1)
    entropy = float(-(true_logprobs.exp() * true_logprobs).sum(1).mean())
    grad_logits = true_logprobs.exp_().mul_(-upstream[:, None])
    grad_logits.scatter_add_(1, rows[2][:, None], upstream[:, None])
    true_hidden = grad_logits @ weight.double()
    true_weight = grad_logits.t() @ rows[0].double()
    logprob, grad_hidden, grad_weight = one_pass(run, rows, backward=True)
    if is_per_token:
        logprob_error = float((logprob - truth).abs().max())
    else:
        logprob_error = float((logprob - truth.sum()).abs()) / len(truth)
    return {
        "mean_entropy_nats": entropy,
        "logprob_error": logprob_error,
        "grad_hidden_error": float((grad_hidden - true_hidden).norm() / true_hidden.norm()),
        "grad_weight_error": float((grad_weight - true_weight).norm() / true_weight.norm()),
    }


def kept_and_dropped(variant: Variant, inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """Share of (row, tile) pairs kept by `drop_mass`, and the bound on the mass left out."""
    hidden, weight, target, grad = inputs
    lse, target_logit, _, tile_lse = torch.ops.flowrl.linear_logprob_forward(
        hidden, weight, target, 0, 1.0
    )
    keep, _ = reference.select_tiles(tile_lse, lse, target_logit - lse, target, variant.drop_mass)
    dropped = torch.full_like(lse, torch.nan)
    leaf = hidden.detach().requires_grad_()
    logprob, _ = linear_logprob(
        leaf,
        weight,
        target,
        drop_mass=variant.drop_mass,
        dropped_mass=dropped,
        implementation=variant.implementation,
    )
    torch.autograd.grad(torch.dot(logprob, grad), leaf)
    return {
        "kept_share": float(keep.float().mean()),
        "dropped_mass_mean": float(dropped.mean()),
        "dropped_mass_max": float(dropped.max()),
    }


def extra_mib(run: Run, inputs: tuple[Tensor, ...], backward: bool) -> float:
    """Peak memory of one pass beyond its inputs and the gradients that it returns.

    On the CPU the growth of the resident memory, so it wants a process that did nothing else.
    """
    one_pass(run, inputs, backward)  # compiles, fills caches
    gc.collect()
    hidden, weight, _, _ = inputs
    num_values = hidden.numel() + weight.numel() if backward else 0
    returned = num_values * hidden.element_size()
    if hidden.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(run, inputs, backward)
        return (torch.cuda.max_memory_allocated() - before - returned) / 2**20
    # Linux with glibc: trimming returns what was freed, which would hide what the pass takes;
    # writing 5 resets the high-water mark of the resident memory.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    one_pass(run, inputs, backward)
    return (_status_bytes("VmHWM") - before - returned) / 2**20


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def time_interleaved(
    works: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return name -> milliseconds, one round over all at a time, so a drift hits all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
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


def environment(device: torch.device) -> dict:
    """Device, versions, commit, command and load of the machine."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "flush_denormal": True,
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }
