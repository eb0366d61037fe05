"""token_clip in plain PyTorch, in float64 inside and differentiable by autograd.

Legend: N packed tokens, B sequences; see __init__.py for the formulas.
"""

import torch

# Columns of the sums, frozen: context parallelism all-reduces them, kernels index them.
LOSS = 0  # sum of weight (pg + kl_coef kl), the only column with a gradient
TOKENS = 1  # number of kept tokens
CLIPPED = 2  # number of tokens whose gradient the clip range removed
CLIPPED_LOWER = 3  # number of tokens that the dual clip bounded
OLD_KL = 4  # sum of log pi_old - log pi
REF_KL = 5  # sum of the k3 estimate, 0 without reference log-probs
RATIO = 6  # sum of ratios
NUM_COLUMNS = 7

# verl bounds the exponent of both estimates so; exp(20) is 4.9e8.
MAX_EXPONENT = 20.0


def token_clip(
    policy,
    old,
    advantages,
    mask,
    cu_seqlens,
    weights,
    ref,
    clip_low,
    clip_high,
    clip_ratio_c,
    kl_coef,
):
    """Return (sums [B, 7] float64, gradient [N] of each token's loss in policy's dtype)."""

    # Selected before any arithmetic, not multiplied: 0 * NaN under the mask is NaN.
    def select(tensor):
        return torch.where(mask, tensor, 0.0).double()

    dtype = policy.dtype
    policy, old, advantages = select(policy), select(old), select(advantages)
    weights = mask.double() if weights is None else select(weights)

    log_ratio = policy - old
    ratio = _bound(log_ratio, -MAX_EXPONENT, MAX_EXPONENT).exp()
    # max(-A r, -A clamp(r)) bounds r from above where A > 0 and from below where A < 0.
    is_up, is_down = advantages > 0, advantages < 0
    is_clipped = (is_up & (ratio > 1 + clip_high)) | (is_down & (ratio < 1 - clip_low))
    is_clipped_lower = is_down & (ratio > clip_ratio_c)
    bounded = torch.where(is_up, _bound(ratio, 0.0, 1 + clip_high), ratio)
    bounded = torch.where(is_down, _bound(ratio, 1 - clip_low, clip_ratio_c), bounded)
    loss = -advantages * bounded
    is_flat = is_clipped | is_clipped_lower | (log_ratio.abs() > MAX_EXPONENT)
    grad = torch.where(is_flat, 0.0, -advantages * ratio)

    ref_kl = torch.zeros_like(policy)
    if ref is not None:
        difference = select(ref) - policy
        exponent = _bound(difference, -MAX_EXPONENT, MAX_EXPONENT)
        ref_kl = exponent.expm1() - exponent
        if kl_coef != 0:
            loss = loss + kl_coef * ref_kl
            is_far = difference.abs() > MAX_EXPONENT
            grad = grad - kl_coef * torch.where(is_far, 0.0, exponent.expm1())

    columns = [
        weights * loss,
        mask,
        is_clipped,
        is_clipped_lower,
        (old - policy).detach(),
        ref_kl.detach(),
        torch.where(mask, ratio.detach(), 0.0),
    ]
    # segment_reduce adds in token order; index_add would use atomics on CUDA.
    sums = torch.segment_reduce(
        torch.stack([column.double() for column in columns], dim=1),
        "sum",
        offsets=cu_seqlens,
        unsafe=True,
    )
    return sums, (weights * grad).detach().to(dtype)


def _bound(x, low, high):
    """clamp(x, low, high), but a NaN keeps its gradient, so that it shows there as well."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def token_clip_backward(coefficient, token_grad, cu_seqlens):
    """Return [N]: the coefficient [B] of each token's sequence times the token's gradient."""
    spread = torch.repeat_interleave(
        coefficient, cu_seqlens.diff(), output_size=token_grad.shape[0]
    )
    return (spread * token_grad).to(token_grad.dtype)
