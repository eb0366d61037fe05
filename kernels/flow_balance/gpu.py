# pyright: reportInvalidTypeForm=false, reportCallIssue=false
# (Triton reads the annotation tl.float64, without which a Python float reaches a kernel as float32;
# launch options are no parameters of the kernel.)
"""The flow-balance ops in Triton; formulas in __init__.py, columns in reference.py.

The kernels over tokens run one program per sequence: it adds in an order that depends on the
sequence alone, without atomics, so the bits repeat and neighbours do not change them. Estimated,
not measured: a block reads 2048 x 13 bytes and costs about 1 us of latency, so a sequence of 128k
tokens takes about 0.1 ms, which is nothing beside the forward and backward of those tokens;
splitting it would need a second pass.
"""

import math

import torch
import triton
import triton.language as tl

from flowrl.kernels._packed_gpu import token_range
from flowrl.kernels.flow_balance import reference

BLOCK = 2048
NUM_WARPS = 16  # 4 tokens a thread
BLOCK_SEQUENCES = 128  # of residual_from_sums
RESIDUAL_WARPS = 4

POLICY = tl.constexpr(reference.POLICY)
REF = tl.constexpr(reference.REF)
LOG_RATIO = tl.constexpr(reference.LOG_RATIO)
TOKENS = tl.constexpr(reference.TOKENS)
DROPPED = tl.constexpr(reference.DROPPED)
NUM_COLUMNS = tl.constexpr(reference.NUM_COLUMNS)


@triton.jit
def cispo_bounds(reward, low, high, BLOCK: tl.constexpr):
    """The log ratios between which cispo keeps a token of a sequence with this reward."""
    reward = tl.full([BLOCK], reward, tl.float64)
    # As blocks: in the interpreter these are Python floats, which tl.where rounds to float32.
    low = tl.full([BLOCK], low, tl.float64)
    high = tl.full([BLOCK], high, tl.float64)
    return tl.where(reward < 0, low, float("-inf")), tl.where(reward > 0, high, float("inf"))


@triton.jit(do_not_specialize=["num_tokens"])
def sequence_sums_kernel(
    policy,
    old,
    ref,
    mask,
    cu_seqlens,
    rewards,
    sums,
    num_tokens,
    low: tl.float64,
    high: tl.float64,
    IS_CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    policy_sum = tl.zeros([BLOCK], tl.float64)
    ref_sum, log_ratio_sum = policy_sum, policy_sum
    num_kept = tl.zeros([BLOCK], tl.int32)
    num_dropped = num_kept
    lowest, highest = cispo_bounds(tl.load(rewards + sequence), low, high, BLOCK)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        in_sequence = token < end
        kept = in_sequence & (tl.load(mask + token, mask=in_sequence, other=0) != 0)
        # What the mask leaves out is not read: 0, and so without effect on the sums.
        policy_t = tl.load(policy + token, mask=kept, other=0.0).to(tl.float64)
        log_ratio = policy_t - tl.load(old + token, mask=kept, other=0.0).to(tl.float64)
        if IS_CISPO:
            dropped = kept & ((log_ratio < lowest) | (log_ratio > highest))
            kept = kept & (dropped == 0)
            policy_t = tl.where(kept, policy_t, 0.0)
            log_ratio = tl.where(kept, log_ratio, 0.0)
            num_dropped += dropped.to(tl.int32)
        policy_sum += policy_t
        ref_sum += tl.load(ref + token, mask=kept, other=0.0).to(tl.float64)
        log_ratio_sum += log_ratio
        num_kept += kept.to(tl.int32)

    row = sums + sequence * NUM_COLUMNS
    tl.store(row + POLICY, tl.sum(policy_sum))
    tl.store(row + REF, tl.sum(ref_sum))
    tl.store(row + LOG_RATIO, tl.sum(log_ratio_sum))
    tl.store(row + TOKENS, tl.sum(num_kept).to(tl.float64))
    tl.store(row + DROPPED, tl.sum(num_dropped).to(tl.float64))


@triton.jit(do_not_specialize=["num_tokens"])
def sequence_sums_backward_kernel(
    coefficient,
    policy,
    old,
    mask,
    cu_seqlens,
    rewards,
    grad,
    num_tokens,
    low: tl.float64,
    high: tl.float64,
    IS_CISPO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    value = tl.load(coefficient + sequence).to(grad.dtype.element_ty)
    lowest, highest = cispo_bounds(tl.load(rewards + sequence), low, high, BLOCK)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        in_sequence = token < end
        kept = in_sequence & (tl.load(mask + token, mask=in_sequence, other=0) != 0)
        if IS_CISPO:
            policy_t = tl.load(policy + token, mask=kept, other=0.0).to(tl.float64)
            log_ratio = policy_t - tl.load(old + token, mask=kept, other=0.0).to(tl.float64)
            dropped = (log_ratio < lowest) | (log_ratio > highest)  # a NaN is kept, and shows
            kept = kept & (dropped == 0)
        tl.store(grad + token, tl.where(kept, value, 0.0), mask=in_sequence)


@triton.jit
def is_finite(x, dtype: tl.constexpr):
    """Whether x, rounded to dtype, is neither infinite nor NaN."""
    return tl.abs(x.to(dtype)) < float("inf")


@triton.jit
def residual_from_sums_kernel(
    sums,
    log_z,
    rewards,
    loss_out,
    residual_out,
    log_weight_out,
    weight_out,
    mean_logprob_out,
    coefficient_out,
    clipped_out,
    skipped_out,
    num_sequences,
    beta: tl.float64,
    low: tl.float64,
    high: tl.float64,
    IS_ONE: tl.constexpr,
    IS_RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = loss_out.dtype.element_ty
    sequence = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = sequence < num_sequences
    row = sums + sequence.to(tl.int64) * NUM_COLUMNS
    count = tl.load(row + TOKENS, mask=is_inside, other=0.0)
    is_empty = count == 0
    count = tl.where(is_empty, 1.0, count)
    mean_logprob = tl.load(row + POLICY, mask=is_inside, other=0.0) / count
    mean_ref = tl.load(row + REF, mask=is_inside, other=0.0) / count
    reward = tl.load(rewards + sequence, mask=is_inside, other=0.0).to(tl.float64)
    log_z_b = tl.load(log_z + sequence, mask=is_inside, other=0.0).to(tl.float64)
    residual = log_z_b + mean_logprob - beta * reward - mean_ref
    residual = tl.where(is_empty, 0.0, residual)

    log_weight = tl.load(row + LOG_RATIO, mask=is_inside, other=0.0)
    lowest, highest = tl.full([BLOCK], low, tl.float64), tl.full([BLOCK], high, tl.float64)
    is_below = log_weight < lowest
    is_above = log_weight > highest
    if IS_ONE:  # the old log-probs, and so log_weight, may be anything here
        weight = tl.full([BLOCK], 1.0, tl.float64)
    else:
        weight = tl.exp(tl.where(is_below, lowest, tl.where(is_above, highest, log_weight)))
    is_clipped = (is_below | is_above) & (is_empty == 0)
    is_skipped = tl.zeros([BLOCK], tl.int1)
    if IS_RAW:
        fits = is_finite(weight * residual * residual, dtype)
        fits = fits & is_finite(2 * weight * residual, dtype)
        # A residual that is not finite must show instead.
        overflows = is_finite(residual, dtype) & (fits == 0)
        overflows = overflows | (is_finite(weight, dtype) == 0)
        is_skipped = overflows & (is_empty == 0)

    is_off = is_empty | is_skipped
    weight = tl.where(is_off, 0.0, weight)
    live = tl.where(is_off, 0.0, residual)
    tl.store(loss_out + sequence, (weight * live * live).to(dtype), mask=is_inside)
    tl.store(residual_out + sequence, residual.to(dtype), mask=is_inside)
    tl.store(log_weight_out + sequence, log_weight.to(dtype), mask=is_inside)
    tl.store(weight_out + sequence, weight.to(dtype), mask=is_inside)
    tl.store(mean_logprob_out + sequence, mean_logprob.to(dtype), mask=is_inside)
    tl.store(coefficient_out + sequence, (2 * weight * live / count).to(dtype), mask=is_inside)
    tl.store(clipped_out + sequence, is_clipped, mask=is_inside)
    tl.store(skipped_out + sequence, is_skipped, mask=is_inside)


def sequence_sums(policy, old, ref, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    """Return [B, 5] float64: the columns of reference.py."""
    num_sequences = cu_seqlens.shape[0] - 1
    sums = policy.new_empty(num_sequences, reference.NUM_COLUMNS, dtype=torch.float64)
    with torch.cuda.device_of(policy):
        sequence_sums_kernel[(num_sequences,)](
            policy.contiguous(),
            old.contiguous(),
            ref.contiguous(),
            mask.contiguous(),
            cu_seqlens.contiguous(),
            rewards.contiguous(),
            sums,
            policy.shape[0],
            *reference.log_clip_bounds(clip_low, clip_high),
            IS_CISPO=weighting == "cispo",
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return sums


def sequence_sums_backward(
    coefficient, policy, old, mask, cu_seqlens, rewards, weighting, clip_low, clip_high
):
    """Return [N] in policy's dtype: the coefficient [B] of the sequence at its kept tokens."""
    grad = policy.new_zeros(policy.shape)  # also of tokens that cu_seqlens leaves out
    with torch.cuda.device_of(policy):
        sequence_sums_backward_kernel[(rewards.shape[0],)](
            coefficient.contiguous(),
            policy.contiguous(),
            old.contiguous(),
            mask.contiguous(),
            cu_seqlens.contiguous(),
            rewards.contiguous(),
            grad,
            policy.shape[0],
            *reference.log_clip_bounds(clip_low, clip_high),
            IS_CISPO=weighting == "cispo",
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad


def residual_from_sums(
    sums, log_z, rewards, beta, weighting, clip_low, clip_high, weight_cap
) -> tuple[torch.Tensor, ...]:
    """Return the eight fields of SequenceResiduals, each [B]."""
    num_sequences = log_z.shape[0]
    low, high = -math.inf, math.inf
    if weighting in ("clip", "cispo"):
        low, high = reference.log_clip_bounds(clip_low, clip_high)
    elif weighting == "cap":
        high = math.log(weight_cap)
    values = [log_z.new_empty(log_z.shape) for _ in range(6)]
    flags = [log_z.new_empty(log_z.shape, dtype=torch.bool) for _ in range(2)]
    with torch.cuda.device_of(log_z):
        residual_from_sums_kernel[(triton.cdiv(num_sequences, BLOCK_SEQUENCES),)](
            sums.contiguous(),
            log_z.contiguous(),
            rewards.contiguous(),
            *values,
            *flags,
            num_sequences,
            beta,
            low,
            high,
            IS_ONE=weighting == "one",
            IS_RAW=weighting == "raw",
            BLOCK=BLOCK_SEQUENCES,
            num_warps=RESIDUAL_WARPS,
            enable_fp_fusion=True,
        )
    return *values, *flags
