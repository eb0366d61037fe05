"""Every op without host synchronisation, and inside a CUDA graph, forward and backward.

    python benchmarks/check_capture.py

Each op first runs with synchronisations made errors, twice, which has to give the same bits; then
it is captured into a graph, and the replay has to give them too. --device cpu runs the ops without
either, to try the script. The exit status is the number of ops that failed.
"""

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from flowrl.bench.inputs import Case, make_inputs
from flowrl.kernels.flow_balance import residual_from_sums, sequence_sums
from flowrl.kernels.linear_logprob import linear_logprob
from flowrl.kernels.segment_mean import segment_mean
from flowrl.kernels.token_clip import token_clip

Check = Callable[[], tuple[Tensor, ...]]


def head(device: torch.device, num_rows: int, drop_mass: float, entropy: bool) -> Check:
    case = Case(num_rows, 256, 5000, "bfloat16" if device.type == "cuda" else "float32", peak=3.0)
    hidden, weight, target, grad = make_inputs(case, device)
    hidden.requires_grad_()
    weight.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        logprob, second = linear_logprob(
            hidden, weight, target, entropy=entropy, drop_mass=drop_mass
        )
        loss = torch.dot(logprob, grad)
        if second is not None:
            loss = loss + second.sum()
        return (logprob.detach(), *torch.autograd.grad(loss, (hidden, weight)))

    return run


def token_ops(device: torch.device, num_rows: int) -> dict[str, Check]:
    token = (-torch.rand(num_rows, device=device)).requires_grad_()
    cu_seqlens = torch.tensor([0, 1, num_rows // 2, num_rows], device=device, dtype=torch.int32)
    mask = torch.arange(num_rows, device=device) % 5 > 0
    rewards = torch.tensor([1.0, -1.0, 0.5], device=device)
    log_z = torch.zeros(3, device=device, requires_grad=True)
    hidden = torch.randn(num_rows, 256, device=device, requires_grad=True)

    def balance() -> tuple[Tensor, ...]:
        old = token.detach() - 0.01
        sums = sequence_sums(token, old, old, mask, cu_seqlens, rewards)
        out = residual_from_sums(sums, log_z, rewards)
        return (out.loss.detach(), *torch.autograd.grad(out.loss.sum(), (token, log_z)))

    def pool() -> tuple[Tensor, ...]:
        mean = segment_mean(hidden, cu_seqlens, mask)
        return mean.detach(), *torch.autograd.grad(mean.square().sum(), hidden)

    def clip() -> tuple[Tensor, ...]:
        old, advantages = token.detach() - 0.01, rewards[0].expand(num_rows).contiguous()
        sums = token_clip(token, old, advantages, mask, cu_seqlens)
        return sums.detach(), *torch.autograd.grad(sums[:, 0].sum(), token)

    return {"flow_balance": balance, "segment_mean": pool, "token_clip": clip}


def check(run: Check, device: torch.device) -> None:
    """Raise what the device raises at a synchronisation or capture, or on unequal bits."""
    expected = run()
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        again = run()
    finally:
        if is_cuda:
            torch.cuda.set_sync_debug_mode("default")
    compare(again, expected, "the second run")
    if not is_cuda:
        return
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()  # what is allocated once, is so before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    compare(captured, expected, "the replayed graph")


def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], who: str) -> None:
    for index, (one, two) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(one, two):
            raise RuntimeError(f"{who} gives other bits in result {index}")


def main(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script")] = "cuda",
    rows: Annotated[int, typer.Option(help="tokens")] = 700,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    where = torch.device(device)
    checks = {
        "linear_logprob": head(where, rows, 0.0, False),
        "linear_logprob entropy": head(where, rows, 0.0, True),
        "linear_logprob drop_mass": head(where, rows, 2**-9, False),
        **token_ops(where, rows),
    }
    results = {}
    for name, run in checks.items():
        try:
            check(run, where)
            results[name] = "ok"
        except RuntimeError as error:
            traceback.print_exc()
            results[name] = str(error).splitlines()[0]
        print(f"{name}: {results[name]}", flush=True)
        if json_path is not None:
            json_path.write_text(json.dumps(results, indent=1) + "\n")
    raise SystemExit(sum(result != "ok" for result in results.values()))


if __name__ == "__main__":
    typer.run(main)
