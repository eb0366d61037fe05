# pyright: reportCallIssue=false
# (Launch options are no parameters of the kernel.)
"""segment_sum in Triton, forward and backward; see __init__.py.

One program per sequence and block of columns walks the sequence's rows in order, without atomics,
so the bits repeat and neighbours do not change them. Each of its ROWS x COLUMNS accumulators adds
every ROWS-th row, so its rounding error is that of a sum ROWS times shorter. Estimated, not
measured: a program streams some 50 GB/s, so prompts of a few thousand tokens are bound by the
memory of the whole GPU as soon as there are a few dozen programs.
"""

import torch
import triton
import triton.language as tl

from flowrl.kernels._packed_gpu import token_range
from flowrl.kernels.segment_mean import reference

ROWS = 32
COLUMNS = 128  # 256 contiguous bytes of bfloat16
NUM_WARPS = 4  # 32 accumulators a thread


@triton.jit(do_not_specialize=["num_tokens"])
def segment_sum_kernel(
    hidden,
    cu_seqlens,
    mask,
    sums,
    counts,
    num_tokens,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = sums.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    total = tl.zeros([ROWS, COLUMNS], dtype)
    num_kept = tl.zeros([ROWS], tl.int64)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        in_sequence = row < end
        kept = in_sequence & (tl.load(mask + row, mask=in_sequence, other=0) != 0)
        # What the mask leaves out is not read: a NaN there does no harm.
        block = tl.load(
            hidden + row[:, None].to(tl.int64) * width + column[None, :],
            mask=kept[:, None] & (column < width)[None, :],
            other=0.0,
        )
        total += block.to(dtype)
        num_kept += kept.to(tl.int64)
    tl.store(sums + sequence * width + column, tl.sum(total, axis=0), mask=column < width)
    if tl.program_id(1) == 0:
        tl.store(counts + sequence, tl.sum(num_kept))


@triton.jit(do_not_specialize=["num_tokens"])
def segment_sum_backward_kernel(
    grad_sum, cu_seqlens, mask, grad, num_tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = token_range(cu_seqlens, sequence, num_tokens)
    value = tl.load(grad_sum + sequence * width + column, mask=column < width, other=0.0)
    value = value.to(grad.dtype.element_ty)
    # The first and the last program also write the zeros of rows before and behind all sequences.
    first = tl.where(sequence == 0, 0, begin)
    stop = tl.where(sequence == tl.num_programs(0) - 1, num_tokens, end)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS)
        in_sequence = (row >= begin) & (row < end)
        kept = in_sequence & (tl.load(mask + row, mask=in_sequence, other=0) != 0)
        tl.store(
            grad + row[:, None].to(tl.int64) * width + column[None, :],
            tl.where(kept[:, None], value[None, :], 0.0),
            mask=(row < stop)[:, None] & (column < width)[None, :],
        )


def segment_sum(hidden, cu_seqlens, mask):
    """Return (sum [B, H] float32 or float64, count [B] int64)."""
    num_sequences, width = cu_seqlens.shape[0] - 1, hidden.shape[1]
    sums = hidden.new_empty(num_sequences, width, dtype=reference.sum_dtype(hidden.dtype))
    counts = hidden.new_empty(num_sequences, dtype=torch.int64)
    grid = (num_sequences, max(triton.cdiv(width, COLUMNS), 1))  # 1: counts even where H = 0
    with torch.cuda.device_of(hidden):
        segment_sum_kernel[grid](
            hidden.contiguous(),
            cu_seqlens.contiguous(),
            mask.contiguous(),
            sums,
            counts,
            hidden.shape[0],
            width,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return sums, counts


def segment_sum_backward(grad_sum, cu_seqlens, mask, dtype):
    """Return grad_hidden [N, H] in `dtype`: each sequence's gradient at its selected rows."""
    num_sequences, width = grad_sum.shape
    allocate = grad_sum.new_empty if num_sequences > 0 else grad_sum.new_zeros
    grad = allocate(mask.shape[0], width, dtype=dtype)
    with torch.cuda.device_of(grad_sum):
        segment_sum_backward_kernel[(num_sequences, triton.cdiv(width, COLUMNS))](
            grad_sum.contiguous(),
            cu_seqlens.contiguous(),
            mask.contiguous(),
            grad,
            mask.shape[0],
            width,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return grad
