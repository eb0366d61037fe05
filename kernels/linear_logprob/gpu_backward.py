# pyright: reportCallIssue=false
# (Launch options are no parameters of the kernel.)
"""Exact backward of `linear_logprob` in Triton: three matrix products per slice of the vocabulary.

The rows with a gradient are first gathered to the front, by an order made on the device, so cost
falls with the others and the host never waits for their number. For each slice
    d = g (1[v = target] - p) - g_e p (z - mean_logit)    [rows, slice], in the dtype of `hidden`
    grad_hidden += d @ weight_slice / temperature          float32, slices in their order
    grad_weight_slice = d^T @ hidden / temperature         written once, or added once to a buffer
d is rounded once, after the one-hot is in: apart from each other, bfloat16 p and 1 would leave 2^-9
of the gradient of a row whose 1 - p may be a thousand times smaller. No sum is atomic.

Legend: T rows, H hidden size, V entries of the shard; z logits divided by the temperature.
"""

import torch
import triton
from torch import Tensor

from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.linear_logprob import reference
from flowrl.kernels.linear_logprob.checks import check_backward, check_inputs
from flowrl.kernels.linear_logprob.gpu import (
    TILE,
    block_source,
    can_use_tma,
    device_capability,
    dot_precision,
    interpretable,
    on_device,
    unit_gradients,
)
from flowrl.kernels.linear_logprob.gpu_blocks import BLOCKS, Table, device_kind, launch_options
from flowrl.kernels.linear_logprob.gpu_dense import (
    gather_kernel,
    grad_hidden_kernel,
    grad_logits_kernel,
    grad_weight_kernel,
    kept_grad_logits_kernel,
)
from flowrl.kernels.linear_logprob.gpu_pairs import pair_backward

# Of d. At T = 8192 in bfloat16 these are 8192 entries, so that each product has some 1000 blocks
# and grad_hidden is read and written 19 times for V = 152064: 4.5 GB at H = 3584, about 3 % of the
# time of the products (an estimate, not measured). A slice has at least 256 entries, which above
# T = 262144 in bfloat16 take more.
SLICE_BYTES = 128 * 2**20


def backward(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    lse: Tensor,
    mean_logit: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    drop_mass: float,
    logprob: Tensor | None = None,
    ignore_index: int = -100,
    dropped_mass: Tensor | None = None,
    weight_grad: Tensor | None = None,
    kept_logits: Tensor | None = None,
    needs_grad_weight: bool = True,
    grad_weight_dtype: torch.dtype | None = None,
    table: Table = BLOCKS,
) -> tuple[Tensor, Tensor]:
    """Return (grad_hidden [T, H], grad_weight [V, H] or [0, H]) of one shard.

    With drop_mass > 0 the pairs of rows and tiles that carry mass are computed, unless so many do
    that all cost less; that is found on the device, where the kernels of the other way then exit.
    What `forward` stored in `kept_logits` replaces the recomputation; the backward is then exact.
    float64 is the reference's.

    Raises:
        ValueError: shapes, dtypes and devices that do not fit each other; `kept_logits` without
            `logprob`, from which 1 - p of the target is taken.
    """
    if hidden.dtype == torch.float64:
        return reference.backward(
            *(hidden, weight_shard, target, vocab_start, temperature, lse, mean_logit, tile_lse),
            *(grad_logprob, grad_entropy, drop_mass, logprob, ignore_index, dropped_mass),
            *(weight_grad, kept_logits, needs_grad_weight, grad_weight_dtype),
        )
    check_inputs(hidden, weight_shard, target, temperature)
    check_backward(
        *(hidden, weight_shard, lse, mean_logit, tile_lse, grad_logprob, grad_entropy),
        *(logprob, dropped_mass, weight_grad),
    )
    if kept_logits is not None and logprob is None:
        raise ValueError("kept_logits is given without logprob; pass the log-probs of the forward")
    has_result = needs_grad_weight and weight_grad is None
    if drop_mass > 0 and grad_entropy is None and kept_logits is None and hidden.shape[0] > 0:
        grad_hidden, grad_weight, is_dense = pair_backward(
            hidden=hidden,
            weight_shard=weight_shard,
            target=target,
            vocab_start=vocab_start,
            temperature=temperature,
            lse=lse,
            tile_lse=tile_lse,
            grad_logprob=grad_logprob,
            drop_mass=drop_mass,
            logprob=logprob,
            ignore_index=ignore_index,
            dropped_mass=dropped_mass,
            weight_grad=weight_grad,
            needs_grad_weight=needs_grad_weight,
            grad_weight_dtype=grad_weight_dtype,
            table=table,
        )
    else:
        grad_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        grad_weight = hidden.new_empty(
            weight_shard.shape[0] if has_result else 0,
            hidden.shape[1],
            dtype=grad_weight_dtype or torch.float32,
        )
        is_dense = torch.ones(1, dtype=torch.int32, device=hidden.device)
        if dropped_mass is not None:
            dropped_mass.zero_()
    if hidden.shape[0] == 0:
        return grad_hidden, grad_weight.zero_()
    destination = grad_weight if has_result else weight_grad
    with on_device(hidden):
        _run_slices(
            hidden,
            weight_shard,
            target,
            vocab_start,
            temperature,
            lse,
            mean_logit,
            tile_lse,
            grad_logprob,
            grad_entropy,
            logprob,
            ignore_index,
            kept_logits,
            grad_hidden,
            destination if needs_grad_weight or weight_grad is not None else None,
            weight_grad is not None,
            is_dense,
            table,
        )
    return grad_hidden, grad_weight


def _run_slices(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    lse: Tensor,
    mean_logit: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logprob: Tensor | None,
    ignore_index: int,
    kept: Tensor | None,
    grad_hidden: Tensor,
    grad_weight: Tensor | None,
    is_accumulated: bool,
    is_dense: Tensor,
    table: Table,
) -> None:
    (num_rows, hidden_size), num_entries = hidden.shape, weight.shape[0]
    is_tma = can_use_tma(weight)
    has_entropy = grad_entropy is not None
    kind = device_kind(device_capability(hidden), hidden.dtype, is_tma)
    d_name = "grad_logits_entropy" if has_entropy else "grad_logits"
    for_d, for_hidden, for_weight = (
        launch_options(table, name, kind) for name in (d_name, "grad_hidden", "grad_weight")
    )
    # A sum over rows, or over entries, ends where the zeros of d's last block do.
    assert for_d["BLOCK_M"] % for_weight["BLOCK_K"] == 0
    assert for_d["BLOCK_N"] % for_hidden["BLOCK_K"] == 0
    hidden, weight = interpretable(hidden), interpretable(weight)
    precision = dot_precision(hidden)
    unit_grad, unit_grad_entropy, scale = unit_gradients(
        grad_logprob, grad_entropy, temperature, hidden.dtype
    )
    target, lse, mean_logit = target.contiguous(), lse.contiguous(), mean_logit.contiguous()

    has_gradient = grad_logprob != 0
    if grad_entropy is not None:
        has_gradient = has_gradient | (grad_entropy != 0)
    is_live = has_gradient & (target != ignore_index)
    order = torch.argsort((~is_live).to(torch.uint8), stable=True)
    num_live = is_live.sum(dtype=torch.int32)[None] * is_dense  # 0: every product is empty

    block_m = for_d["BLOCK_M"]
    num_padded = triton.cdiv(num_rows, block_m) * block_m
    row_stride = triton.cdiv(hidden_size, 8) * 8  # which TMA can step over
    live_hidden = hidden.new_empty(num_padded, row_stride)[:, :hidden_size]
    gather_kernel[(num_padded // 16, triton.cdiv(hidden_size, 256))](
        hidden,
        order,
        num_live,
        live_hidden,
        hidden_size,
        hidden.stride(0),
        row_stride,
        BLOCK_M=block_m,
        BLOCK_T=16,
        BLOCK_H=256,
        num_warps=4,
    )
    # Under the interpreter, which truncates float32 to bfloat16, that rounding is PyTorch's.
    is_rounded_after = IS_INTERPRETED and grad_weight is not None
    written = grad_weight.float() if grad_weight is not None and is_rounded_after else grad_weight

    slice_size = slice_entries(num_padded, hidden.element_size(), num_entries)
    grad_logits = hidden.new_empty(num_padded, slice_size)
    rows_of_d = block_source(live_hidden, for_d["BLOCK_M"], for_d["BLOCK_K"], is_tma)
    entries_of_d = block_source(weight, for_d["BLOCK_N"], for_d["BLOCK_K"], is_tma)
    d_by_rows = block_source(grad_logits, for_hidden["BLOCK_M"], for_hidden["BLOCK_K"], is_tma)
    weight_by_d = block_source(weight, for_hidden["BLOCK_K"], for_hidden["BLOCK_N"], is_tma)
    d_by_entries = block_source(grad_logits, for_weight["BLOCK_K"], for_weight["BLOCK_M"], is_tma)
    hidden_by_d = block_source(live_hidden, for_weight["BLOCK_K"], for_weight["BLOCK_N"], is_tma)
    tail = None if logprob is None else -torch.expm1(logprob.float()).contiguous()
    cdiv = triton.cdiv
    hidden_grid = cdiv(num_padded, for_hidden["BLOCK_M"]) * cdiv(hidden_size, for_hidden["BLOCK_N"])
    columns_of_weight = cdiv(hidden_size, for_weight["BLOCK_N"])
    for start in range(0, num_entries, slice_size):
        width = min(slice_size, num_entries - start)
        if kept is None:
            grad_logits_kernel[(num_padded // block_m * cdiv(width, for_d["BLOCK_N"]),)](
                rows_of_d,
                entries_of_d,
                order,
                num_live,
                target,
                lse,
                mean_logit,
                unit_grad,
                unit_grad_entropy,
                grad_logits,
                start,
                width,
                num_entries,
                hidden_size,
                row_stride,
                weight.stride(0),
                slice_size,
                vocab_start,
                ignore_index,
                1 / temperature,
                ENTROPY=has_entropy,
                IS_TMA=is_tma,
                PRECISION=precision,
                enable_fp_fusion=True,
                **for_d,
            )
        else:
            kept_grad_logits_kernel[(num_padded // 32, triton.cdiv(width, TILE.value))](
                kept,
                order,
                num_live,
                target,
                lse,
                mean_logit,
                tile_lse,
                tail,
                unit_grad,
                unit_grad_entropy,
                grad_logits,
                start,
                num_entries,
                kept.stride(0),
                tile_lse.stride(0),
                tile_lse.stride(1),
                slice_size,
                vocab_start,
                ignore_index,
                ENTROPY=has_entropy,
                BLOCK_M=block_m,
                BLOCK_T=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
        grad_hidden_kernel[(hidden_grid,)](
            d_by_rows,
            weight_by_d,
            order,
            num_live,
            scale,
            grad_hidden,
            start,
            width,
            num_padded,
            num_entries,
            hidden_size,
            slice_size,
            weight.stride(0),
            IS_TMA=is_tma,
            PRECISION=precision,
            enable_fp_fusion=True,
            **for_hidden,
        )
        if written is not None:
            grad_weight_kernel[(cdiv(width, for_weight["BLOCK_M"]) * columns_of_weight,)](
                d_by_entries,
                hidden_by_d,
                num_live,
                is_dense,
                scale,
                written,
                start,
                width,
                num_padded,
                hidden_size,
                slice_size,
                row_stride,
                written.stride(0),
                written.stride(1),
                ACCUMULATE=is_accumulated,
                IS_TMA=is_tma,
                PRECISION=precision,
                enable_fp_fusion=True,
                **for_weight,
            )
    if grad_weight is not None and written is not None and is_rounded_after:
        grad_weight.copy_(written)


def slice_entries(num_rows: int, element_size: int, num_entries: int) -> int:
    """Return how many vocabulary entries a slice of d has: whole blocks, SLICE_BYTES or one."""
    limit = max(SLICE_BYTES // (num_rows * element_size) // 256, 1) * 256
    return min(limit, triton.cdiv(num_entries, 256) * 256)
