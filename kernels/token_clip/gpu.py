# pyright: reportInvalidTypeForm=false, reportCallIssue=false
# (Triton reads the annotation tl.float64, without which a Python float reaches a kernel as float32;
# launch options are no parameters of the kernel.)
"""token_clip in Triton; formulas in __init__.py, columns in reference.py.

One program per sequence: it adds in an order that depends on the sequence alone, without atomics,
so the bits repeat and neighbours do not change them. Estimated, not measured: a block reads
1024 x 13 to 21 bytes and costs 1 to 2 us of latency, so a sequence of 128k tokens takes 0.1 to
0.3 ms, which is nothing beside the forward and backward of those tokens; splitting it would need a
second pass.
"""

import torch
import triton
import triton.language as tl

from flowrl.kernels._packed_gpu import token_range
from flowrl.kernels.token_clip import reference

BLOCK = 1024
NUM_WARPS = 8  # 4 tokens a thread: with 16 warps, and so 128 registers a thread, it spills

LOSS = tl.constexpr(reference.LOSS)
TOKENS = tl.constexpr(reference.TOKENS)
CLIPPED = tl.constexpr(reference.CLIPPED)
CLIPPED_LOWER = tl.constexpr(reference.CLIPPED_LOWER)
OLD_KL = tl.constexpr(reference.OLD_KL)
REF_KL = tl.constexpr(reference.REF_KL)
RATIO = tl.constexpr(reference.RATIO)
NUM_COLUMNS = tl.constexpr(reference.NUM_COLUMNS)
MAX_EXPONENT = tl.constexpr(reference.MAX_EXPONENT)


@triton.jit
def bound(x, low, high):
    """clamp(x, low, high) that passes a NaN through."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit(do_not_specialize=["num_tokens"])
def token_clip_kernel(
    policy,
    old,
    advantages,
    mask,
    cu_seqlens,
    weights,  # or None
    ref,  # or None
    sums,
    token_grad,
    num_tokens,
    clip_low: tl.float64,
    clip_high: tl.float64,
    clip_ratio_c: tl.float64,
    kl_coef: tl.float64,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    zero = tl.zeros([BLOCK], tl.float64)
    # As blocks: in the interpreter these are Python floats, which tl.where rounds to float32 and
    # an inner function does not take.
    lower = tl.full([BLOCK], 1 - clip_low, tl.float64)
    upper = tl.full([BLOCK], 1 + clip_high, tl.float64)
    dual = tl.full([BLOCK], clip_ratio_c, tl.float64)
    kl_weight = tl.full([BLOCK], kl_coef, tl.float64)
    loss_sum, old_kl_sum, ref_kl_sum, ratio_sum = zero, zero, zero, zero
    num_kept = tl.zeros([BLOCK], tl.int32)
    num_clipped, num_clipped_lower = num_kept, num_kept
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        in_sequence = token < end
        kept = in_sequence & (tl.load(mask + token, mask=in_sequence, other=0) != 0)
        # What the mask leaves out is not read: 0, and so without effect on the sums.
        policy_t = tl.load(policy + token, mask=kept, other=0.0).to(tl.float64)
        old_t = tl.load(old + token, mask=kept, other=0.0).to(tl.float64)
        advantage = tl.load(advantages + token, mask=kept, other=0.0).to(tl.float64)

        log_ratio = policy_t - old_t
        ratio = tl.exp(bound(log_ratio, zero - MAX_EXPONENT, zero + MAX_EXPONENT))
        is_up = advantage > 0
        is_down = advantage < 0
        is_clipped = (is_up & (ratio > upper)) | (is_down & (ratio < lower))
        is_clipped_lower = is_down & (ratio > dual)
        bounded = tl.where(is_up, bound(ratio, zero, upper), bound(ratio, lower, dual))
        loss = -advantage * bounded
        is_flat = is_clipped | is_clipped_lower | (tl.abs(log_ratio) > MAX_EXPONENT)
        grad = tl.where(is_flat, 0.0, -advantage * ratio)

        if ref is not None:
            difference = tl.load(ref + token, mask=kept, other=0.0).to(tl.float64) - policy_t
            exponent = bound(difference, zero - MAX_EXPONENT, zero + MAX_EXPONENT)
            # No expm1 in Triton's language: off by 1e-16, not relative to a small difference.
            growth = tl.exp(exponent) - 1
            ref_kl = growth - exponent
            ref_kl_sum += ref_kl
            is_far = tl.abs(difference) > MAX_EXPONENT
            grad = tl.where(kl_weight == 0, grad, grad - kl_weight * tl.where(is_far, 0.0, growth))
            loss = tl.where(kl_weight == 0, loss, loss + kl_weight * ref_kl)
        if weights is not None:
            weight = tl.load(weights + token, mask=kept, other=0.0).to(tl.float64)
            loss = weight * loss
            grad = weight * grad
        grad = tl.where(kept, grad, 0.0)
        tl.store(token_grad + token, grad.to(token_grad.dtype.element_ty), mask=in_sequence)

        loss_sum += loss
        old_kl_sum -= log_ratio
        ratio_sum += tl.where(kept, ratio, 0.0)
        num_kept += kept.to(tl.int32)
        num_clipped += is_clipped.to(tl.int32)
        num_clipped_lower += is_clipped_lower.to(tl.int32)

    row = sums + sequence * NUM_COLUMNS
    tl.store(row + LOSS, tl.sum(loss_sum))
    tl.store(row + TOKENS, tl.sum(num_kept).to(tl.float64))
    tl.store(row + CLIPPED, tl.sum(num_clipped).to(tl.float64))
    tl.store(row + CLIPPED_LOWER, tl.sum(num_clipped_lower).to(tl.float64))
    tl.store(row + OLD_KL, tl.sum(old_kl_sum))
    tl.store(row + REF_KL, tl.sum(ref_kl_sum))
    tl.store(row + RATIO, tl.sum(ratio_sum))


@triton.jit(do_not_specialize=["num_tokens"])
def token_clip_backward_kernel(
    coefficient, token_grad, cu_seqlens, grad, num_tokens, BLOCK: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    factor = tl.load(coefficient + sequence)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        unit = tl.load(token_grad + token, mask=token < end, other=0.0).to(tl.float64)
        tl.store(grad + token, (factor * unit).to(grad.dtype.element_ty), mask=token < end)


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
    num_sequences = cu_seqlens.shape[0] - 1
    sums = policy.new_empty(num_sequences, reference.NUM_COLUMNS, dtype=torch.float64)
    token_grad = policy.new_zeros(policy.shape)  # also of tokens that cu_seqlens leaves out
    with torch.cuda.device_of(policy):
        token_clip_kernel[(num_sequences,)](
            policy.contiguous(),
            old.contiguous(),
            advantages.contiguous(),
            mask.contiguous(),
            cu_seqlens.contiguous(),
            None if weights is None else weights.contiguous(),
            None if ref is None else ref.contiguous(),
            sums,
            token_grad,
            policy.shape[0],
            clip_low,
            clip_high,
            clip_ratio_c,
            kl_coef,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return sums, token_grad


def token_clip_backward(coefficient, token_grad, cu_seqlens):
    """Return [N]: the coefficient [B] of each token's sequence times the token's gradient."""
    grad = token_grad.new_zeros(token_grad.shape)
    with torch.cuda.device_of(token_grad):
        token_clip_backward_kernel[(coefficient.shape[0],)](
            coefficient.contiguous(),
            token_grad.contiguous(),
            cu_seqlens.contiguous(),
            grad,
            token_grad.shape[0],
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad
