"""Time the clipped policy loss of PPO and GRPO over packed tokens, with and without a KL term.

python benchmarks/bench_token_clip.py --json results.json
python benchmarks/bench_token_clip.py --device cuda --kl-coef 0.001
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from packed_ops import Layout, measure, report
from torch import Tensor

from flowrl.kernels.token_clip import LOSS, NUM_COLUMNS, token_clip

LAYOUTS = [Layout(512, 512), Layout(64, 8192), Layout(2, 131_072)]


def make_inputs(layout: Layout) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(layout.num_tokens, generator=generator)
    old = policy + 0.2 * torch.randn(layout.num_tokens, generator=generator)
    ref = policy + 0.1 * torch.randn(layout.num_tokens, generator=generator)
    advantages = torch.randn(layout.num_tokens, generator=generator)
    mask = torch.rand(layout.num_tokens, generator=generator) < 0.9
    return policy, old, advantages, mask, layout.cu_seqlens, ref


def run(kl_coef: float, implementation: str, inputs: tuple[Tensor, ...], backward: bool):
    policy, *tokens, ref = inputs
    leaf = policy.detach().requires_grad_(backward)
    sums = token_clip(
        leaf,
        *tokens,
        ref_logprobs=ref if kl_coef else None,
        kl_coef=kl_coef,
        implementation=implementation,
    )
    if not backward:
        return (sums,)
    return sums.detach(), *torch.autograd.grad(sums[:, LOSS].sum(), leaf)


def count_bytes(layout: Layout, kl_coef: float) -> dict[str, int]:
    """Three or four float32 values and a mask byte in, the token's gradient out; then it again."""
    num_read = 4 if kl_coef else 3
    forward = layout.num_tokens * (num_read * 4 + 1 + 4) + layout.num_sequences * NUM_COLUMNS * 8
    return {"forward": forward, "forward+backward": forward + layout.num_tokens * 2 * 4}


def main(
    kl_coef: Annotated[float, typer.Option(help="> 0 adds the KL term")] = 0.0,
    repeats: Annotated[int, typer.Option(help="timed rounds after one warm-up round")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    results = []
    for layout in LAYOUTS:
        results += measure(
            partial(run, kl_coef),
            make_inputs(layout),
            layout,
            count_bytes(layout, kl_coef),
            1e-6,
            repeats,
            torch.device(device),
        )
    report(f"token_clip, kl_coef {kl_coef:g}, float32", results, torch.device(device), json_path)


if __name__ == "__main__":
    typer.run(main)
