"""Sums and means of the selected rows of packed sequences.

    sum_b = sum of hidden_i over i in [cu_seqlens_b, cu_seqlens_{b+1}) with mask_i;   count_b
    mean_b = sum_b / count_b,  0 where count_b = 0

Pools the prompt's hidden states for the Z network of FlowRL (arXiv 2509.15207, section on the
partition function). A context-parallel caller all-reduces (sum, count) before dividing.
"""

from collections.abc import Callable
from functools import partial

import torch

from flowrl.kernels import _native
from flowrl.kernels._packed import check_implementation, check_packed
from flowrl.kernels._triton import HAS_KERNELS, IS_INTERPRETED, interpreted
from flowrl.kernels.segment_mean import reference

__all__ = ["segment_mean", "segment_sum"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_native.load()
_library = torch.library.Library("flowrl", "FRAGMENT")
_library.define("segment_sum(Tensor hidden, Tensor cu_seqlens, Tensor mask) -> (Tensor, Tensor)")
_library.define(
    "segment_sum_backward(Tensor grad_sum, Tensor cu_seqlens, Tensor mask, ScalarType dtype) "
    "-> Tensor"
)
# cpu.cpp, where it is built, registers the key CPU itself and goes before these.
_library.impl("segment_sum", reference.segment_sum, "CompositeExplicitAutograd")
_library.impl("segment_sum_backward", reference.segment_sum_backward, "CompositeExplicitAutograd")


@torch.library.register_fake("flowrl::segment_sum", lib=_library)
def _(hidden, cu_seqlens, mask):
    num_sequences = cu_seqlens.shape[0] - 1
    dtype = reference.sum_dtype(hidden.dtype)
    sums = hidden.new_empty(num_sequences, hidden.shape[1], dtype=dtype)
    return sums, hidden.new_empty(num_sequences, dtype=torch.int64)


@torch.library.register_fake("flowrl::segment_sum_backward", lib=_library)
def _(grad_sum, cu_seqlens, mask, dtype):
    return grad_sum.new_empty(mask.shape[0], grad_sum.shape[1], dtype=dtype)


def _setup_context(ctx, inputs, output):
    hidden, cu_seqlens, mask = inputs
    ctx.save_for_backward(cu_seqlens, mask)
    ctx.hidden_dtype = hidden.dtype


def _backward(ctx, grad_sum, _, run_backward: Callable = torch.ops.flowrl.segment_sum_backward):
    grad = run_backward(grad_sum, *ctx.saved_tensors, ctx.hidden_dtype)
    return grad, None, None


torch.library.register_autograd(
    "flowrl::segment_sum", _backward, setup_context=_setup_context, lib=_library
)
_FORWARDS = {"reference": reference.segment_sum}  # the others go by the dispatcher
if HAS_KERNELS:
    from flowrl.kernels.segment_mean import gpu

    _library.impl("segment_sum", gpu.segment_sum, "CUDA")
    _library.impl("segment_sum_backward", gpu.segment_sum_backward, "CUDA")
    if IS_INTERPRETED:
        _FORWARDS["triton"] = interpreted(
            gpu.segment_sum,
            _setup_context,
            partial(_backward, run_backward=gpu.segment_sum_backward),
        )


def segment_sum(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the selected rows of each packed sequence and count them.

    hidden: [N, H] bfloat16, float16, float32 or float64. cu_seqlens: [B + 1] int32 or int64, 0 to
    N. mask: [N] bool, int or float of 0 and 1; a NaN in a row that it leaves out does no harm.
    Returns (sum [B, H], count [B] int64); the sum is accumulated and returned in float32 or wider
    (float64 for float64). Differentiable in hidden. Raises ValueError for wrong shapes, dtypes
    and devices, on the CPU also for a cu_seqlens or mask with wrong values.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden must have shape [N, H], got {list(hidden.shape)}")
    if hidden.dtype not in DTYPES:
        raise ValueError(f"hidden must be one of {DTYPES}, got {hidden.dtype}")
    mask, cu_seqlens = check_packed(mask, cu_seqlens, hidden.shape[0], hidden.device)
    check_implementation("flowrl::segment_sum", implementation, hidden.device)
    forward = _FORWARDS.get(implementation or "", torch.ops.flowrl.segment_sum)
    return forward(hidden, cu_seqlens, mask)


def segment_mean(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor,
    implementation: str | None = None,
) -> torch.Tensor:
    """Return the mean [B, H] of each sequence's selected rows, 0 where there are none.

    Arguments, dtypes and errors are those of segment_sum.
    """
    sums, counts = segment_sum(hidden, cu_seqlens, mask, implementation)
    return sums / counts.clamp(min=1)[:, None]
