"""The clipped policy loss of PPO, GRPO and REINFORCE++ over packed tokens, with its gradient.

Per kept token t of sequence b, with the advantage A_t and x_t = log pi - log pi_old,

    ratio_t = exp( clamp(x_t, -20, 20) )
    pg_t    = max( -A_t ratio_t, -A_t clamp(ratio_t, 1 - clip_low, 1 + clip_high) )
    pg_t    = min( pg_t, -A_t clip_ratio_c )  where A_t < 0 and clip_ratio_c is given
    kl_t    = exp(k_t) - k_t - 1,  k_t = clamp(log pi_ref - log pi, -20, 20)
    loss_b  = sum_t weight_t (pg_t + kl_coef kl_t)
    dloss_b/dlog pi_t = weight_t ( -A_t ratio_t [pg is not clipped] + kl_coef (1 - exp(k_t)) )

(the clip: arXiv 1707.06347, Eq. 7; two bounds: DAPO, arXiv 2503.14476; the dual clip: arXiv
1912.09729; kl_t: the k3 estimate of joschu.net/blog/kl-approx). As in verl the two exponents are
bounded by 20, so nothing overflows; beyond it their gradients are 0. verl's second bound, 10 on
kl_t itself, is left out. One launch computes sums and gradient; sums are float64 for every input
dtype, and a context-parallel caller all-reduces them.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

from flowrl.kernels import _native
from flowrl.kernels._packed import check_implementation, check_packed, check_same
from flowrl.kernels._triton import HAS_KERNELS, IS_INTERPRETED, interpreted
from flowrl.kernels.token_clip import reference
from flowrl.kernels.token_clip.reference import (
    CLIPPED,
    CLIPPED_LOWER,
    LOSS,
    NUM_COLUMNS,
    OLD_KL,
    RATIO,
    REF_KL,
    TOKENS,
)

__all__ = [
    "CLIPPED",
    "CLIPPED_LOWER",
    "LOSS",
    "NUM_COLUMNS",
    "OLD_KL",
    "RATIO",
    "REF_KL",
    "TOKENS",
    "token_clip",
]

_native.load()
_library = torch.library.Library("flowrl", "FRAGMENT")
_library.define(
    "token_clip(Tensor policy, Tensor old, Tensor advantages, Tensor mask, Tensor cu_seqlens, "
    "Tensor? weights, Tensor? ref, float clip_low, float clip_high, float clip_ratio_c, "
    "float kl_coef) -> (Tensor, Tensor)"
)
_library.define(
    "token_clip_backward(Tensor coefficient, Tensor token_grad, Tensor cu_seqlens) -> Tensor"
)
# cpu.cpp, where it is built, registers the key CPU itself and goes before these.
_library.impl("token_clip", reference.token_clip, "CompositeExplicitAutograd")
_library.impl("token_clip_backward", reference.token_clip_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("flowrl::token_clip", lib=_library)
def _(policy, old, advantages, mask, cu_seqlens, weights, ref, *scalars):
    sums = policy.new_empty(cu_seqlens.shape[0] - 1, NUM_COLUMNS, dtype=torch.float64)
    return sums, policy.new_empty(policy.shape)


@torch.library.register_fake("flowrl::token_clip_backward", lib=_library)
def _(coefficient, token_grad, cu_seqlens):
    return token_grad.new_empty(token_grad.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[4])


def _backward(ctx, grad_sums, _, run_backward: Callable = torch.ops.flowrl.token_clip_backward):
    grad = run_backward(grad_sums[:, LOSS], *ctx.saved_tensors)
    return grad, *(None,) * 10


torch.library.register_autograd(
    "flowrl::token_clip", _backward, setup_context=_setup_context, lib=_library
)
_FORWARDS = {"reference": reference.token_clip}  # the others go by the dispatcher
if HAS_KERNELS:
    from flowrl.kernels.token_clip import gpu

    _library.impl("token_clip", gpu.token_clip, "CUDA")
    _library.impl("token_clip_backward", gpu.token_clip_backward, "CUDA")
    if IS_INTERPRETED:
        _FORWARDS["triton"] = interpreted(
            gpu.token_clip,
            _setup_context,
            partial(_backward, run_backward=gpu.token_clip_backward),
        )


def token_clip(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    implementation: str | None = None,
) -> torch.Tensor:
    """Sum the clipped policy loss and its diagnostics over each packed sequence's kept tokens.

    policy_logprobs, old_logprobs, advantages: [N] float32 or float64, one dtype.
    loss_mask: [N] bool, int or float of 0 and 1. cu_seqlens: [B + 1] int32 or int64, 0 to N.
    token_weights: [N], None for 1; they weigh the column LOSS only. ref_logprobs: [N]; without
    them REF_KL is 0 and kl_coef must be 0. clip_low in [0, 1], clip_high >= 0: 1 and math.inf
    turn the clip off. clip_ratio_c: > 1, or None for no dual clip.
    Returns [B, 7] float64 with the columns LOSS, TOKENS, CLIPPED, CLIPPED_LOWER, OLD_KL (without
    the bound on the exponent), REF_KL and RATIO; sums of shards of a sequence add up to the sums
    of the whole. LOSS is differentiable in policy_logprobs, once; a NaN under the mask does no
    harm. At a bound the gradient is that of the unbounded side.
    Raises ValueError for wrong shapes, dtypes, devices and options, on the CPU also for a
    cu_seqlens or mask with wrong values.
    """
    _check_options(clip_low, clip_high, clip_ratio_c, kl_coef, ref_logprobs is not None)
    if policy_logprobs.ndim != 1:
        raise ValueError(
            f"policy_logprobs must be packed to [N], got {list(policy_logprobs.shape)}"
        )
    for name, tensor in (
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("token_weights", token_weights),
        ("ref_logprobs", ref_logprobs),
    ):
        if tensor is None:
            continue
        if tensor.shape != policy_logprobs.shape:
            raise ValueError(
                f"{name} must have policy_logprobs' shape {list(policy_logprobs.shape)}, "
                f"got {list(tensor.shape)}"
            )
        check_same(name, tensor, "policy_logprobs", policy_logprobs)
    mask, cu_seqlens = check_packed(
        loss_mask, cu_seqlens, policy_logprobs.shape[0], policy_logprobs.device
    )
    check_implementation("flowrl::token_clip", implementation, policy_logprobs.device)
    forward = _FORWARDS.get(implementation or "", torch.ops.flowrl.token_clip)
    sums, _ = forward(
        policy_logprobs,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        cu_seqlens,
        None if token_weights is None else token_weights.detach(),
        None if ref_logprobs is None else ref_logprobs.detach(),
        float(clip_low),
        float(clip_high),
        math.inf if clip_ratio_c is None else float(clip_ratio_c),
        float(kl_coef),
    )
    return sums


def _check_options(clip_low, clip_high, clip_ratio_c, kl_coef, has_ref) -> None:
    if not 0 <= clip_low <= 1:
        raise ValueError(f"clip_low must be in [0, 1], got {clip_low}")
    if not clip_high >= 0:
        raise ValueError(f"clip_high must be >= 0, got {clip_high}")
    if clip_ratio_c is not None and not clip_ratio_c > 1:
        raise ValueError(f"clip_ratio_c must be > 1, or None for no dual clip, got {clip_ratio_c}")
    if not (math.isfinite(kl_coef) and kl_coef >= 0):
        raise ValueError(f"kl_coef must be finite and >= 0, got {kl_coef}")
    if kl_coef != 0 and not has_ref:
        raise ValueError(f"kl_coef is {kl_coef} but ref_logprobs is None: pass them or use 0")
