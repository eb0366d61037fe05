"""The flow-balance ops in plain PyTorch, in float64 inside and differentiable by autograd.

Legend: N packed tokens, B sequences; see __init__.py for the formulas.
"""

import math

import torch

# Columns of the sums, frozen: context parallelism all-reduces them, kernels index them.
POLICY = 0  # sum of log pi over the kept tokens
REF = 1  # sum of log pi_ref
LOG_RATIO = 2  # sum of log pi - log pi_old, added token by token: no cancellation of large sums
TOKENS = 3  # number of kept tokens, |y|
DROPPED = 4  # number of mask tokens that cispo dropped
NUM_COLUMNS = 5


def log_clip_bounds(clip_low: float, clip_high: float) -> tuple[float, float]:
    """Return log(1 - clip_low), which is -inf for clip_low = 1, and log(1 + clip_high)."""
    return (math.log1p(-clip_low) if clip_low < 1 else -math.inf), math.log1p(clip_high)


def kept_tokens(policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    """Return the mask [N] without the tokens that cispo drops."""
    if weighting != "cispo":
        return mask
    low, high = log_clip_bounds(clip_low, clip_high)
    log_ratio = policy.detach().double() - old.double()
    reward = torch.repeat_interleave(rewards, cu_seqlens.diff(), output_size=mask.shape[0])
    return mask & ~(((reward > 0) & (log_ratio > high)) | ((reward < 0) & (log_ratio < low)))


def sequence_sums(policy, old, ref, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    """Return [B, 5] float64: the columns above."""
    kept = kept_tokens(policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high)
    policy, old, ref = policy.double(), old.double(), ref.double()
    logprobs = torch.stack([policy, ref, policy - old], dim=1)
    # Selected, not multiplied: 0 * NaN under the mask is NaN.
    logprobs = torch.where(kept[:, None], logprobs, 0.0)
    counts = torch.stack([kept, mask & ~kept], dim=1).double()
    # segment_reduce adds in token order; index_add would use atomics on CUDA.
    return torch.segment_reduce(
        torch.cat([logprobs, counts], dim=1), "sum", offsets=cu_seqlens, unsafe=True
    )


def sequence_sums_backward(
    coefficient, policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high
):
    """Return [N] in policy's dtype: the coefficient [B] of the sequence at its kept tokens."""
    kept = kept_tokens(policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high)
    spread = torch.repeat_interleave(coefficient, cu_seqlens.diff(), output_size=mask.shape[0])
    return torch.where(kept, spread, 0.0).to(policy.dtype)


def residual_from_sums(
    sums, log_z, rewards, beta, weighting, clip_low, clip_high, weight_cap
) -> tuple[torch.Tensor, ...]:
    """Return the eight fields of SequenceResiduals, each [B]."""
    num_tokens = sums[:, TOKENS].detach()
    is_empty = num_tokens == 0
    mean_logprob = sums[:, POLICY] / num_tokens.clamp(min=1)
    mean_ref = sums[:, REF].detach() / num_tokens.clamp(min=1)
    residual = log_z.double() + mean_logprob - beta * rewards.double() - mean_ref
    residual = torch.where(is_empty, 0.0, residual)

    # The weight is a constant of the objective (Eq. 7): it is detached here and nowhere else.
    # Cloned, because an op's output may not be a view of its input.
    log_weight = sums[:, LOG_RATIO].detach().clone()
    weight, clipped = _weight(log_weight, weighting, clip_low, clip_high, weight_cap)
    clipped = clipped & ~is_empty
    skipped = torch.zeros_like(is_empty)
    if weighting == "raw":
        skipped = ~is_empty & _overflows(weight, residual.detach(), log_z.dtype)

    is_off = is_empty | skipped
    weight = torch.where(is_off, 0.0, weight)
    live = torch.where(is_off, 0.0, residual)
    loss = weight * live * live
    coefficient = 2 * weight * live.detach() / num_tokens.clamp(min=1)
    values = (loss, residual.detach(), log_weight, weight, mean_logprob.detach(), coefficient)
    return *(value.to(log_z.dtype) for value in values), clipped, skipped


def _weight(log_weight, weighting, clip_low, clip_high, weight_cap):
    """Return (weight, whether a bound changed it); the bounds act before exp can overflow."""
    if weighting == "one":  # not exp(0 * log_weight): old log-probs may be anything here
        return torch.ones_like(log_weight), torch.zeros_like(log_weight, dtype=torch.bool)
    low, high = -math.inf, math.inf
    if weighting in ("clip", "cispo"):
        low, high = log_clip_bounds(clip_low, clip_high)
    elif weighting == "cap":
        high = math.log(weight_cap)
    return log_weight.clamp(low, high).exp(), (log_weight < low) | (log_weight > high)


def _overflows(weight, residual, dtype):
    """Whether S, S d^2 or 2 S d is not finite in `dtype`; a d that is not must show instead."""
    products = torch.stack([weight * residual * residual, 2 * weight * residual]).to(dtype)
    product_overflows = residual.to(dtype).isfinite() & ~products.isfinite().all(dim=0)
    return ~weight.to(dtype).isfinite() | product_overflows


def group_means(values: torch.Tensor, weights: torch.Tensor, group_ids: torch.Tensor):
    """Return [B]: sum(weights * values) / sum(weights) over each row's group, 0 where that is 0/0.

    Sorted by group first, so that the sums have a fixed order on every device.
    """
    order = torch.argsort(group_ids, stable=True)
    _, sizes = torch.unique_consecutive(group_ids[order], return_counts=True)
    # Selected, not multiplied: 0 * NaN is NaN.
    weighted = torch.where(weights > 0, weights * values, 0.0)
    columns = torch.stack([weighted, weights], dim=1)[order]
    sums = torch.segment_reduce(columns, "sum", lengths=sizes, unsafe=True)
    means = sums[:, 0] / torch.where(sums[:, 1] == 0, 1.0, sums[:, 1])
    result = torch.empty_like(values)
    result[order] = torch.repeat_interleave(means, sizes)
    return result


def vargrad_log_z(old_logprobs, ref_logprobs, loss_mask, cu_seqlens, rewards, group_ids, beta):
    """Return [B] float64: the group mean of beta r - mean(log pi_old - log pi_ref).

    It is the log Z that minimises the group's sum of d^2 at the old policy; a sequence with an
    empty mask has no residual and so no say in it. A group of such sequences gives 0.
    """
    sums = sequence_sums(
        old_logprobs, old_logprobs, ref_logprobs, loss_mask, cu_seqlens, rewards, "one", 0.0, 0.0
    ).detach()
    mean_log_ratio = (sums[:, POLICY] - sums[:, REF]) / sums[:, TOKENS].clamp(min=1)
    values = beta * rewards.detach().double() - mean_log_ratio
    return group_means(values, (sums[:, TOKENS] > 0).double(), group_ids)
