"""Time FlowRL's objective over packed tokens: sums, residuals, token gradients.

python benchmarks/bench_flow_balance.py --json results.json
python benchmarks/bench_flow_balance.py --device cuda --weighting cispo
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from packed_ops import Layout, measure, report
from torch import Tensor

from flowrl.kernels.flow_balance import NUM_COLUMNS, residual_from_sums, sequence_sums

LAYOUTS = [Layout(512, 512), Layout(64, 8192), Layout(2, 131_072)]


def make_inputs(layout: Layout) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(layout.num_tokens, generator=generator)
    old = policy + 0.01 * torch.randn(layout.num_tokens, generator=generator)
    ref = policy + 0.1 * torch.randn(layout.num_tokens, generator=generator)
    mask = torch.rand(layout.num_tokens, generator=generator) < 0.9
    rewards, log_z = torch.randn(2, layout.num_sequences, generator=generator)
    return policy, old, ref, mask, layout.cu_seqlens, rewards, log_z


def run(weighting: str, implementation: str, inputs: tuple[Tensor, ...], backward: bool):
    policy, *tokens, rewards, log_z = inputs
    options = {"weighting": weighting, "implementation": implementation}
    leaf = policy.detach().requires_grad_(backward)
    loss = residual_from_sums(
        sequence_sums(leaf, *tokens, rewards, **options), log_z, rewards, **options
    ).loss
    if not backward:
        return (loss,)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaf)


def count_bytes(layout: Layout, weighting: str) -> dict[str, int]:
    """Three float32 log-probs and a mask byte a token; then the mask again and the gradient."""
    forward = layout.num_tokens * (3 * 4 + 1) + layout.num_sequences * NUM_COLUMNS * 8
    # cispo decides again in the backward and reads two log-probs for it.
    backward = layout.num_tokens * (1 + 4 + (8 if weighting == "cispo" else 0))
    return {"forward": forward, "forward+backward": forward + backward}


def main(
    weighting: Annotated[str, typer.Option(help="clip, raw, cap, one or cispo")] = "clip",
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    results = []
    for layout in LAYOUTS:
        results += measure(
            partial(run, weighting),
            make_inputs(layout),
            layout,
            count_bytes(layout, weighting),
            1e-5,  # float32 of a residual that is a difference of means
            repeats,
            torch.device(device),
        )
    report(f"flow_balance, {weighting}, float32", results, torch.device(device), json_path)


if __name__ == "__main__":
    typer.run(main)
