"""Every op without host synchronisation, and inside a CUDA graph, forward and backward.

    python benchmarks/check_capture.py
    compute-sanitizer python benchmarks/check_capture.py --once --rows 200 --hidden 70

Each op first runs with synchronisations made errors, twice, which has to give the same bits; then
it is captured into a graph, and the replay has to give them too. --device cpu runs the ops without
either, to try the script. --once runs each op once and checks nothing, for a tool that watches:
compute-sanitizer or ncu. The exit status is the number of ops that failed.
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


def head(case: Case, device: torch.device, drop_mass: float, entropy: bool) -> Check:
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
    hidden: Annotated[int, typer.Option(help="hidden size of the head")] = 256,
    vocab: Annotated[int, typer.Option(help="vocabulary of the head")] = 5000,
    dtype: Annotated[str | None, typer.Option(help="default: bfloat16 on a GPU")] = None,
    once: Annotated[bool, typer.Option("--once", help="run only, for a tool to watch")] = False,
    only: Annotated[str, typer.Option(help="ops whose name begins so")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    where = torch.device(device)
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    case = Case(rows, hidden, vocab, dtype, peak=3.0)
    checks = {
        "linear_logprob": head(case, where, 0.0, False),
        "linear_logprob entropy": head(case, where, 0.0, True),
        "linear_logprob drop_mass": head(case, where, 2**-9, False),
        **token_ops(where, rows),
    }
    results = {}
    for name, run in checks.items():
        if not name.startswith(only):
            continue
        try:
            if once:
                run()
            else:
                check(run, where)
            if where.type == "cuda":
                torch.cuda.synchronize()
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
