"""Tiny packed batches for the objectives, and their policy loss written out in plain PyTorch."""

import pytest
import torch

from flowrl.kernels import _native
from flowrl.objectives.aggregation import LOSS_AGG_MODES

# Triton's interpreter takes seconds where these take milliseconds, so it has one test of its own.
IMPLEMENTATIONS = [None, "reference"]
IMPLEMENTATIONS += ["cpu"] if _native.load() else []
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_mode = pytest.mark.parametrize("mode", LOSS_AGG_MODES)
each_ratio = pytest.mark.parametrize("ratio", ["token", "sequence"])
F64 = torch.float64

DAPO = {"clip_low": 0.2, "clip_high": 0.28}
GSPO = {
    "ratio": "sequence",
    "clip_low": 3e-4,
    "clip_high": 4e-4,
    "loss_agg_mode": "seq-mean-token-mean",
}
# What is given beside the tensors of policy_batch, and which of its optional tensors are.
SWITCHES = {
    "grpo": ({"kl_coef": 0.04, "loss_agg_mode": "seq-mean-token-mean"}, ["ref_logprobs"]),
    "dapo": (DAPO, []),
    "dapo_tis": (DAPO, ["token_weights"]),
    "dr_grpo": ({"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 16.0}, []),
    "dual_clip": ({"clip_ratio_c": 1.5, "loss_agg_mode": "seq-mean-token-sum"}, []),
    "entropy": ({"entropy_coeff": 0.1}, ["entropy"]),
    "gspo": (GSPO, []),
    "gspo_everything": (
        {**GSPO, "clip_low": 0.02, "kl_coef": 0.3, "entropy_coeff": -0.1, "clip_ratio_c": 1.01},
        ["ref_logprobs", "entropy", "token_weights"],
    ),
    "kl_and_weights": (
        {"kl_coef": 0.3, "loss_agg_mode": "seq-mean-token-sum"},
        ["ref_logprobs", "token_weights"],
    ),
}
each_switch = pytest.mark.parametrize("switch", SWITCHES)


def policy_batch(dtype=F64, lengths=(6, 0, 9, 1, 4, 12), seed=0):
    """Return grpo_loss's tensors by name: prompts, holes in the mask, and one empty mask."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def normal():
        return torch.randn(num_tokens, generator=generator, dtype=F64)

    policy = -normal().abs()
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for b, length in enumerate(lengths):
        start = int(cu_seqlens[b])
        mask[start : start + length // 3] = False  # the prompt
        if b == 4:
            mask[start : start + length] = False
        elif length:
            mask[start + length - 1] = True
    floats = {
        "policy_logprobs": policy,
        "old_logprobs": policy + 0.4 * normal(),
        "advantages": normal(),
        "ref_logprobs": policy + 0.3 * normal(),
        "entropy": normal().abs(),
        "token_weights": normal().abs(),
    }
    batch = {name: x.to(dtype) for name, x in floats.items()}
    return batch | {"loss_mask": mask, "cu_seqlens": cu_seqlens}


def policy_arguments(switch, dtype=F64, seed=0):
    """Return the arguments of grpo_loss for one entry of SWITCHES; its leaves require grad."""
    options, optional = SWITCHES[switch]
    tensors = policy_batch(dtype, seed=seed)
    for name in {"ref_logprobs", "entropy", "token_weights"} - set(optional):
        del tensors[name]
    for name in {"policy_logprobs", "entropy"} & set(tensors):
        tensors[name].requires_grad_()
    return tensors | options


def policy_leaves(arguments):
    """The arguments that grpo_loss has gradients for."""
    return [arguments[name] for name in ("policy_logprobs", "entropy") if name in arguments]


def written_policy_loss(
    policy_logprobs, old_logprobs, advantages, loss_mask, cu_seqlens, ref_logprobs=None,
    entropy=None, token_weights=None, clip_low=0.2, clip_high=0.2, clip_ratio_c=None, kl_coef=0.0,
    entropy_coeff=0.0, ratio="token", loss_agg_mode="token-mean", loss_scale_factor=None,
):  # fmt: skip
    """Return (loss_sum in float64, tokens whose clip removed the gradient), token by token."""
    total, num_clipped = torch.zeros((), dtype=F64), 0
    for b in range(len(cu_seqlens) - 1):
        rows = [i for i in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])) if loss_mask[i]]
        if not rows:
            continue
        log_ratios = policy_logprobs[rows].double() - old_logprobs[rows].double()
        losses = []
        for i, log_ratio in zip(rows, log_ratios, strict=True):
            if ratio == "sequence":  # GSPO-token: the sequence's value, the token's gradient
                p = policy_logprobs[i].double()
                log_ratio = log_ratios.mean().detach() + p - p.detach()
            rho, a = log_ratio.exp(), advantages[i].double()
            clamped = rho.clamp(1 - clip_low, 1 + clip_high)
            loss = torch.maximum(-a * rho, -a * clamped)
            num_clipped += bool(-a * clamped > -a * rho)
            if clip_ratio_c is not None and a < 0:
                loss = torch.minimum(loss, -a * clip_ratio_c)
            if token_weights is not None:
                loss = loss * token_weights[i].double()
            if kl_coef:
                k = ref_logprobs[i].double() - policy_logprobs[i].double()
                loss = loss + kl_coef * (k.exp() - k - 1)
            if entropy_coeff:
                loss = loss - entropy_coeff * entropy[i].double()
            losses.append(loss)
        sum_of_losses = torch.stack(losses).sum()
        divisor = {
            "token-mean": 1,
            "seq-mean-token-mean": len(rows),
            "seq-mean-token-sum": 1,
            "seq-mean-token-sum-norm": loss_scale_factor,
        }[loss_agg_mode]
        total = total + sum_of_losses / divisor
    return total, num_clipped
