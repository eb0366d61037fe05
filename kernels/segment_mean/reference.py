"""segment_sum in plain PyTorch, forward and backward; see __init__.py."""

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the sums: float64 for float64, float32 for anything narrower."""
    return torch.promote_types(dtype, torch.float32)


def segment_sum(hidden, cu_seqlens, mask):
    """Return (sum [B, H] float32 or float64, count [B] int64)."""
    # Selected, not multiplied: 0 * NaN in a masked row is NaN.
    rows = torch.where(mask[:, None], hidden, 0.0).to(sum_dtype(hidden.dtype))
    sums = torch.segment_reduce(rows, "sum", offsets=cu_seqlens, unsafe=True)
    counts = torch.segment_reduce(mask.double(), "sum", offsets=cu_seqlens, unsafe=True)
    return sums, counts.to(torch.int64)


def segment_sum_backward(grad_sum, cu_seqlens, mask, dtype):
    """Return grad_hidden [N, H] in `dtype`: each sequence's gradient at its selected rows."""
    rows = torch.repeat_interleave(grad_sum, cu_seqlens.diff(), dim=0, output_size=mask.shape[0])
    return torch.where(mask[:, None], rows, 0.0).to(dtype)
