"""Time the masked mean of the prompt's hidden states (H = 896, that of Qwen2.5-0.5B).

python benchmarks/bench_segment_mean.py --json results.json
python benchmarks/bench_segment_mean.py --device cuda --dtype float32
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from packed_ops import Layout, measure, report
from torch import Tensor

from flowrl.kernels.segment_mean import segment_mean

WIDTH = 896
LAYOUTS = [Layout(256, 128), Layout(16, 2048), Layout(1, 32_768)]
# Relative to the norm: the gradient is rounded once to the dtype of the hidden states.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def make_inputs(layout: Layout, dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(layout.num_tokens, WIDTH, generator=generator).to(dtype)
    mask = torch.rand(layout.num_tokens, generator=generator) < 0.9
    upstream = torch.randn(layout.num_sequences, WIDTH, generator=generator)
    return hidden, layout.cu_seqlens, mask, upstream


def run(implementation: str, inputs: tuple[Tensor, ...], backward: bool) -> tuple[Tensor, ...]:
    hidden, cu_seqlens, mask, upstream = inputs
    leaf = hidden.detach().requires_grad_(backward)
    means = segment_mean(leaf, cu_seqlens, mask, implementation)
    if not backward:
        return (means,)
    return means.detach(), *torch.autograd.grad(means, leaf, upstream)


def count_bytes(layout: Layout, dtype: torch.dtype) -> dict[str, int]:
    """A hidden state and a mask byte a token in, a float32 mean out; the gradient back."""
    state, mean = WIDTH * dtype.itemsize, WIDTH * 4
    one_way = layout.num_tokens * (state + 1) + layout.num_sequences * mean
    return {"forward": one_way, "forward+backward": 2 * one_way}


def main(
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "bfloat16",
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    torch_dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    results = []
    for layout in LAYOUTS:
        results += measure(
            run,
            make_inputs(layout, torch_dtype),
            layout,
            count_bytes(layout, torch_dtype),
            TOLERANCES[torch_dtype],
            repeats,
            torch.device(device),
        )
    report(f"segment_mean, H = {WIDTH}, {dtype}", results, torch.device(device), json_path)


if __name__ == "__main__":
    typer.run(main)
