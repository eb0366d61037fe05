"""FlowRL's sequence-level loss over packed tokens, as two differentiable ops.

With the loss mask m, |y| = sum m, and r the group-normalised reward, per sequence

    d = log Z + (1/|y|) sum m log pi - beta r - (1/|y|) sum m log pi_ref
    S = exp( sum m (log pi - log pi_old) ),  detached;   w = weighting(S)
    loss = w d^2;   dloss/dlog pi_t = 2 w d m_t / |y|;   dloss/dlog Z = 2 w d

(arXiv 2509.15207, Eq. 6 and 7; the paper's weighting is `clip`). `sequence_sums` reduces tokens to
[B, 5] sums and counts, `residual_from_sums` does the rest without tokens, so a context-parallel
caller all-reduces the sums in between. Sums are float64 for every input dtype.

Weightings: `clip` clamp(S, 1 - clip_low, 1 + clip_high); `raw` S; `cap` min(S, weight_cap);
`one` 1; `cispo` first drops from m every token with r > 0 and ratio > 1 + clip_high, or r < 0 and
ratio < 1 - clip_low, then clips S. Bounds act on log S, so nothing overflows.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from flowrl.kernels import _native
from flowrl.kernels._packed import check_implementation, check_packed, check_same
from flowrl.kernels._triton import HAS_KERNELS, IS_INTERPRETED, interpreted
from flowrl.kernels.flow_balance import reference
from flowrl.kernels.flow_balance.reference import (
    DROPPED,
    LOG_RATIO,
    NUM_COLUMNS,
    POLICY,
    REF,
    TOKENS,
)

__all__ = [
    "DROPPED",
    "LOG_RATIO",
    "NUM_COLUMNS",
    "POLICY",
    "REF",
    "TOKENS",
    "WEIGHTINGS",
    "SequenceResiduals",
    "check_beta",
    "check_tokens",
    "residual_from_sums",
    "sequence_sums",
]

WEIGHTINGS = ("clip", "raw", "cap", "one", "cispo")

_native.load()
_library = torch.library.Library("flowrl", "FRAGMENT")
_library.define(
    "sequence_sums(Tensor policy, Tensor old, Tensor ref, Tensor mask, Tensor cu_seqlens, "
    "Tensor rewards, str weighting, float clip_low, float clip_high) -> Tensor"
)
_library.define(
    "sequence_sums_backward(Tensor coefficient, Tensor policy, Tensor old, Tensor mask, "
    "Tensor cu_seqlens, Tensor rewards, str weighting, float clip_low, float clip_high) -> Tensor"
)
_library.define(
    "residual_from_sums(Tensor sums, Tensor log_z, Tensor rewards, float beta, str weighting, "
    "float clip_low, float clip_high, float weight_cap) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
# cpu.cpp, where it is built, registers the key CPU itself and goes before these.
_library.impl("sequence_sums", reference.sequence_sums, "CompositeExplicitAutograd")
_library.impl(
    "sequence_sums_backward", reference.sequence_sums_backward, "CompositeExplicitAutograd"
)
_library.impl("residual_from_sums", reference.residual_from_sums, "CompositeExplicitAutograd")


@torch.library.register_fake("flowrl::sequence_sums", lib=_library)
def _(policy, old, ref, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    return policy.new_empty(cu_seqlens.shape[0] - 1, NUM_COLUMNS, dtype=torch.float64)


@torch.library.register_fake("flowrl::sequence_sums_backward", lib=_library)
def _(coefficient, policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    return policy.new_empty(policy.shape)


@torch.library.register_fake("flowrl::residual_from_sums", lib=_library)
def _(sums, log_z, rewards, beta, weighting, clip_low, clip_high, weight_cap):
    values = tuple(log_z.new_empty(log_z.shape) for _ in range(6))
    flags = tuple(log_z.new_empty(log_z.shape, dtype=torch.bool) for _ in range(2))
    return values + flags


def _sums_setup_context(ctx, inputs, output):
    policy, old, _, mask, cu_seqlens, rewards, *ctx.rule = inputs
    ctx.save_for_backward(policy, old, mask, cu_seqlens, rewards)


def _sums_backward(
    ctx, grad_sums, run_backward: Callable = torch.ops.flowrl.sequence_sums_backward
):
    # Of the columns only these two depend on the policy; the counts are piecewise constant.
    coefficient = grad_sums[:, POLICY] + grad_sums[:, LOG_RATIO]
    grad = run_backward(coefficient, *ctx.saved_tensors, *ctx.rule)
    return grad, None, None, None, None, None, None, None, None


def _residual_setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(inputs[0], output[5])


def _residual_backward(ctx, grad_loss, *_):
    sums, coefficient = ctx.saved_tensors
    grad_mean = grad_loss * coefficient
    grad_sums = torch.zeros_like(sums)
    grad_sums[:, POLICY] = grad_mean
    grad_log_z = grad_mean * sums[:, TOKENS].to(grad_mean.dtype)
    return grad_sums, grad_log_z, None, None, None, None, None, None


torch.library.register_autograd(
    "flowrl::sequence_sums", _sums_backward, setup_context=_sums_setup_context, lib=_library
)
torch.library.register_autograd(
    "flowrl::residual_from_sums",
    _residual_backward,
    setup_context=_residual_setup_context,
    lib=_library,
)
# The others go by the dispatcher.
_SUMS_FORWARDS = {"reference": reference.sequence_sums}
_RESIDUAL_FORWARDS = {"reference": reference.residual_from_sums}
if HAS_KERNELS:
    from flowrl.kernels.flow_balance import gpu

    _library.impl("sequence_sums", gpu.sequence_sums, "CUDA")
    _library.impl("sequence_sums_backward", gpu.sequence_sums_backward, "CUDA")
    _library.impl("residual_from_sums", gpu.residual_from_sums, "CUDA")
    if IS_INTERPRETED:
        _SUMS_FORWARDS["triton"] = interpreted(
            gpu.sequence_sums,
            _sums_setup_context,
            partial(_sums_backward, run_backward=gpu.sequence_sums_backward),
        )
        _RESIDUAL_FORWARDS["triton"] = interpreted(
            gpu.residual_from_sums, _residual_setup_context, _residual_backward
        )


class SequenceResiduals(NamedTuple):
    """What residual_from_sums returns, each [B]; only `loss` carries a gradient."""

    loss: torch.Tensor  # w d^2
    residual: torch.Tensor  # d
    log_weight: torch.Tensor  # log S before clip or cap
    weight: torch.Tensor  # w
    mean_logprob: torch.Tensor  # mean of log pi over the kept tokens
    coefficient: torch.Tensor  # 2 w d / |y|: the gradient of every kept token
    clipped: torch.Tensor  # bool: clip or cap changed the weight
    skipped: torch.Tensor  # bool: raw, and S (or its product with d) is not finite


def sequence_sums(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rewards: torch.Tensor,
    weighting: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    implementation: str | None = None,
) -> torch.Tensor:
    """Sum packed token log-probs over each sequence's kept tokens.

    policy_logprobs, old_logprobs, ref_logprobs: [N] float32 or float64, one dtype.
    loss_mask: [N] bool, int or float of 0 and 1. cu_seqlens: [B + 1] int32 or int64, 0 to N.
    rewards: [B], normalised; only their sign is read, and only by `cispo`.
    Returns [B, 5] float64 with the columns POLICY, REF, LOG_RATIO, TOKENS and DROPPED; sums of
    shards of a sequence add up to the sums of the whole. Differentiable in policy_logprobs.
    Raises ValueError for wrong shapes, dtypes, devices and options, on the CPU also for a
    cu_seqlens or mask with wrong values.
    """
    check_weighting(weighting, clip_low, clip_high)
    mask, cu_seqlens = check_tokens(
        policy_logprobs, old_logprobs, ref_logprobs, loss_mask, cu_seqlens, rewards
    )
    check_implementation("flowrl::sequence_sums", implementation, policy_logprobs.device)
    forward = _SUMS_FORWARDS.get(implementation or "", torch.ops.flowrl.sequence_sums)
    return forward(
        policy_logprobs,
        old_logprobs.detach(),
        ref_logprobs.detach(),
        mask,
        cu_seqlens,
        rewards.detach(),
        weighting,
        float(clip_low),
        float(clip_high),
    )


def residual_from_sums(
    sums: torch.Tensor,
    log_z: torch.Tensor,
    rewards: torch.Tensor,
    beta: float = 15.0,
    weighting: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weight_cap: float = 10.0,
    implementation: str | None = None,
) -> SequenceResiduals:
    """Turn the sums of whole sequences into loss, residual, weight and token coefficient.

    sums: [B, 5] float64 from sequence_sums with the same weighting, all-reduced where a sequence
    is spread over ranks. log_z, rewards: [B] float32 or float64, one dtype, that of the result.
    `loss` is differentiable in sums and log_z. A sequence without kept tokens gives 0 throughout.
    `raw` with a non-finite S in the result's dtype gives weight, loss and gradients 0 and says so
    in `skipped`. Raises ValueError for wrong shapes, dtypes, devices and options.
    """
    check_weighting(weighting, clip_low, clip_high)
    check_beta(beta)
    if not (math.isfinite(weight_cap) and weight_cap > 0):
        raise ValueError(f"weight_cap must be finite and > 0, got {weight_cap}")
    num_sequences = rewards.shape[0] if rewards.ndim == 1 else -1
    if sums.shape != (num_sequences, NUM_COLUMNS) or sums.dtype != torch.float64:
        raise ValueError(
            f"sums must be float64 of shape [B, {NUM_COLUMNS}] with B = len(rewards), "
            f"got {sums.dtype} {list(sums.shape)} for rewards {list(rewards.shape)}"
        )
    if log_z.shape != rewards.shape:
        raise ValueError(f"log_z must have shape {list(rewards.shape)}, got {list(log_z.shape)}")
    check_same("log_z", log_z, "rewards", rewards)
    if sums.device != rewards.device:
        raise ValueError(f"sums are on {sums.device} but rewards on {rewards.device}: move one")
    check_implementation("flowrl::residual_from_sums", implementation, sums.device)
    forward = _RESIDUAL_FORWARDS.get(implementation or "", torch.ops.flowrl.residual_from_sums)
    return SequenceResiduals(
        *forward(
            sums,
            log_z,
            rewards.detach(),
            float(beta),
            weighting,
            float(clip_low),
            float(clip_high),
            float(weight_cap),
        )
    )


def check_beta(beta: float) -> None:
    """Raise ValueError unless beta is finite and >= 0."""
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be finite and >= 0, got {beta}")


def check_weighting(weighting: str, clip_low: float, clip_high: float) -> None:
    """Raise ValueError for an unknown weighting or a clip range that is none."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"unknown weighting {weighting!r}: use one of {', '.join(WEIGHTINGS)}")
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not (math.isfinite(clip_high) and clip_high >= 0):
        raise ValueError(f"clip_high must be finite and >= 0, got {clip_high}")


def check_tokens(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rewards: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mask [N] bool, cu_seqlens [B + 1] int64) of checked inputs; ValueError otherwise."""
    if policy_logprobs.ndim != 1:
        raise ValueError(
            f"policy_logprobs must be packed to [N], got {list(policy_logprobs.shape)}"
        )
    for name, tensor in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if tensor.shape != policy_logprobs.shape:
            raise ValueError(
                f"{name} must have policy_logprobs' shape {list(policy_logprobs.shape)}, "
                f"got {list(tensor.shape)}"
            )
        check_same(name, tensor, "policy_logprobs", policy_logprobs)
    mask, cu_seqlens = check_packed(
        loss_mask, cu_seqlens, policy_logprobs.shape[0], policy_logprobs.device
    )
    if rewards.shape != (cu_seqlens.shape[0] - 1,):
        raise ValueError(
            f"rewards must have shape [{cu_seqlens.shape[0] - 1}], one per sequence of "
            f"cu_seqlens, got {list(rewards.shape)}"
        )
    check_same("rewards", rewards, "policy_logprobs", policy_logprobs)
    return mask, cu_seqlens
