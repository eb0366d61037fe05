"""The kernels of the exact backward in Triton: three products per slice of the vocabulary.

gpu_backward.py says what they compute together. Each finds the number of rows with a gradient on
the device and leaves the work beyond it undone.
"""

import triton
import triton.language as tl

from flowrl.kernels.linear_logprob.gpu import (
    LOG2_E,
    TILE,
    grouped_block,
    load_block,
    shard_column,
    split_tiles,
)


@triton.jit
def gather_kernel(
    hidden,  # [T, H]
    order,  # [T] int64: rows with a gradient, then the others
    num_live,  # [1] int32
    live_hidden,  # [T rounded up to BLOCK_M, H]
    hidden_size,
    stride_hidden,
    stride_live,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Copy the rows with a gradient to the front, and fill their last block of BLOCK_M with 0."""
    num = tl.load(num_live)
    first_row = tl.program_id(0) * BLOCK_T
    if first_row < tl.cdiv(num, BLOCK_M) * BLOCK_M:
        rows = first_row + tl.arange(0, BLOCK_T)
        columns = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
        sources = tl.load(order + rows, mask=rows < num, other=0)
        is_column = (columns < hidden_size)[None, :]
        values = tl.load(
            hidden + sources[:, None] * stride_hidden + columns[None, :],
            mask=(rows < num)[:, None] & is_column,
            other=0,
        )
        destinations = live_hidden + rows.to(tl.int64)[:, None] * stride_live + columns[None, :]
        tl.store(destinations, values, mask=is_column)


@triton.jit
def _store_grad_logits(
    logits,  # [BLOCK_M, TILE], not yet divided by the temperature
    column,  # of the first entry, in the slice
    slice_start,
    rows,
    local_target,
    lse,
    entropy,  # lse - mean_logit
    unit_grad,
    unit_grad_entropy,
    grad_logits,
    num_entries,
    stride_grad,
    inverse_temperature,
    ENTROPY: tl.constexpr,
):
    columns = column + tl.arange(0, TILE)
    entries = slice_start + columns
    distance = tl.fma(logits, inverse_temperature, -lse[:, None])
    probability = tl.exp2(distance * LOG2_E)
    is_target = entries[None, :] == local_target[:, None]
    grad = tl.where(is_target, 1 - probability, -probability) * unit_grad[:, None]
    if ENTROPY:
        grad -= unit_grad_entropy[:, None] * (probability * (distance + entropy[:, None]))
    grad = tl.where((entries < num_entries)[None, :], grad, 0)
    addresses = grad_logits + rows.to(tl.int64)[:, None] * stride_grad + columns[None, :]
    tl.store(addresses, grad.to(grad_logits.dtype.element_ty))


@triton.jit(do_not_specialize=["vocab_start", "ignore_index"])
def grad_logits_kernel(
    live_hidden,  # descriptor or pointer: [T rounded up to BLOCK_M, H]
    weight,  # the same: [V, H]
    order,  # [T] int64
    num_live,  # [1] int32
    target,  # [T] int64
    lse,  # [T]
    mean_logit,  # [T]
    unit_grad,  # [T]
    unit_grad_entropy,  # [T] if ENTROPY
    grad_logits,  # [T rounded up to BLOCK_M, slice]
    slice_start,
    slice_width,
    num_entries,
    hidden_size,
    stride_hidden,
    stride_weight,
    stride_grad,
    vocab_start,
    ignore_index,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store d of one block of rows and entries, zeros in the padding."""
    num = tl.load(num_live)
    num_row_blocks, num_column_blocks = tl.cdiv(num, BLOCK_M), tl.cdiv(slice_width, BLOCK_N)
    if tl.program_id(0) < num_row_blocks * num_column_blocks:
        row_block, column_block = grouped_block(
            tl.program_id(0), num_row_blocks, num_column_blocks, GROUP
        )
        first_row, column = row_block * BLOCK_M, column_block * BLOCK_N
        first = slice_start + column
        logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, hidden_size, BLOCK_K):
            a = load_block(
                live_hidden, first_row, start, first_row + BLOCK_M, hidden_size, stride_hidden,
                BLOCK_M, BLOCK_K, IS_TMA,
            )  # fmt: skip
            b = load_block(
                weight, first, start, num_entries, hidden_size, stride_weight,
                BLOCK_N, BLOCK_K, IS_TMA,
            )  # fmt: skip
            logits = tl.dot(a, b.T, logits, input_precision=PRECISION)

        rows = first_row + tl.arange(0, BLOCK_M)
        is_live = rows < num
        sources = tl.load(order + rows, mask=is_live, other=0)
        # Padding: p = exp(0 - 0) times a gradient of 0.
        chosen = tl.load(target + sources, mask=is_live, other=ignore_index)
        local_target = shard_column(chosen, vocab_start, num_entries, chosen == ignore_index)
        row_lse = tl.load(lse + sources, mask=is_live, other=0)
        entropy = row_lse - tl.load(mean_logit + sources, mask=is_live, other=0)
        grad = tl.load(unit_grad + sources, mask=is_live, other=0)
        grad_entropy = tl.load(unit_grad_entropy + sources, mask=is_live, other=0)
        tl.static_assert(BLOCK_N == TILE or BLOCK_N == 2 * TILE)
        if BLOCK_N == TILE:
            _store_grad_logits(
                logits, column, slice_start, rows, local_target, row_lse, entropy,
                grad, grad_entropy, grad_logits, num_entries, stride_grad, inverse_temperature,
                ENTROPY,
            )  # fmt: skip
        else:
            left, right = split_tiles(logits, BLOCK_M)
            _store_grad_logits(
                left, column, slice_start, rows, local_target, row_lse, entropy,
                grad, grad_entropy, grad_logits, num_entries, stride_grad, inverse_temperature,
                ENTROPY,
            )  # fmt: skip
            _store_grad_logits(
                right, column + TILE, slice_start, rows, local_target, row_lse, entropy,
                grad, grad_entropy, grad_logits, num_entries, stride_grad, inverse_temperature,
                ENTROPY,
            )  # fmt: skip


@triton.jit(do_not_specialize=["vocab_start", "ignore_index"])
def kept_grad_logits_kernel(
    kept,  # [T, 128 tiles]: exp(z - tile_lse)
    order,  # [T] int64
    num_live,  # [1] int32
    target,  # [T] int64
    lse,  # [T]
    mean_logit,  # [T]
    tile_lse,  # [T, tiles]
    tail,  # [T]: 1 - p of the target
    unit_grad,  # [T]
    unit_grad_entropy,  # [T] if ENTROPY
    grad_logits,  # [T rounded up to BLOCK_M, slice]
    slice_start,
    num_entries,
    stride_kept,
    stride_tile_row,
    stride_tile,
    stride_grad,
    vocab_start,
    ignore_index,
    ENTROPY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Store d of BLOCK_T rows and one tile from what the forward kept."""
    num = tl.load(num_live)
    first_row = tl.program_id(0) * BLOCK_T
    if first_row < tl.cdiv(num, BLOCK_M) * BLOCK_M:
        rows = first_row + tl.arange(0, BLOCK_T)
        is_live = rows < num
        columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
        entries = slice_start + columns
        tile = slice_start // TILE + tl.program_id(1)
        sources = tl.load(order + rows, mask=is_live, other=0)
        chosen = tl.load(target + sources)
        local_target = shard_column(chosen, vocab_start, num_entries, chosen == ignore_index)
        tile_addresses = tile_lse + sources * stride_tile_row + tile.to(tl.int64) * stride_tile
        distance = tl.load(tile_addresses) - tl.load(lse + sources)
        share = tl.load(kept + sources[:, None] * stride_kept + entries[None, :]).to(tl.float32)
        probability = share * tl.exp2(distance * LOG2_E)[:, None]
        # 1 - p from the log-prob: what is kept is rounded relative to p.
        one_hot = tl.where(entries[None, :] == local_target[:, None], 1.0, 0.0)
        grad = tl.where(one_hot > 0, tl.load(tail + sources)[:, None], -probability)
        grad *= tl.load(unit_grad + sources)[:, None]
        if ENTROPY:
            offset = tl.load(tile_addresses) - tl.load(mean_logit + sources)
            # A share that has underflowed contributes nothing: keep its logarithm finite.
            centred = tl.log(tl.maximum(share, 1e-38)) + offset[:, None]
            grad -= tl.load(unit_grad_entropy + sources)[:, None] * (probability * centred)
        grad = tl.where(is_live[:, None] & (entries < num_entries)[None, :], grad, 0)
        addresses = grad_logits + rows.to(tl.int64)[:, None] * stride_grad + columns[None, :]
        tl.store(addresses, grad.to(grad_logits.dtype.element_ty))


@triton.jit
def _add_rows(values, sources, is_live, columns, grad_hidden, hidden_size):
    is_inside = is_live[:, None] & (columns < hidden_size)[None, :]
    addresses = grad_hidden + sources[:, None] * hidden_size + columns[None, :]
    tl.store(addresses, tl.load(addresses, mask=is_inside) + values, mask=is_inside)


@triton.jit
def grad_hidden_kernel(
    grad_logits,  # descriptor or pointer: [T rounded up to BLOCK_M, slice]
    weight,  # the same: [V, H]
    order,  # [T] int64
    num_live,  # [1] int32
    scale,  # [1]: what one unit of d stands for
    grad_hidden,  # [T, H] contiguous
    slice_start,
    slice_width,
    num_padded,
    num_entries,
    hidden_size,
    stride_grad,
    stride_weight,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add d @ weight of one slice to a block of grad_hidden."""
    num = tl.load(num_live)
    num_row_blocks, num_column_blocks = tl.cdiv(num, BLOCK_M), tl.cdiv(hidden_size, BLOCK_N)
    if tl.program_id(0) < num_row_blocks * num_column_blocks:
        row_block, column_block = grouped_block(
            tl.program_id(0), num_row_blocks, num_column_blocks, GROUP
        )
        first_row, column = row_block * BLOCK_M, column_block * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, slice_width, BLOCK_K):
            a = load_block(
                grad_logits, first_row, start, num_padded, stride_grad, stride_grad,
                BLOCK_M, BLOCK_K, IS_TMA,
            )  # fmt: skip
            b = load_block(
                weight, slice_start + start, column, num_entries, hidden_size, stride_weight,
                BLOCK_K, BLOCK_N, IS_TMA,
            )  # fmt: skip
            total = tl.dot(a, b, total, input_precision=PRECISION)

        rows = first_row + tl.arange(0, BLOCK_M)
        sources = tl.load(order + rows, mask=rows < num, other=0)
        total *= tl.load(scale)
        if BLOCK_N == TILE:
            columns = column + tl.arange(0, TILE)
            _add_rows(total, sources, rows < num, columns, grad_hidden, hidden_size)
        else:  # half at a time: the sum so far needs registers too
            left, right = split_tiles(total, BLOCK_M)
            columns = column + tl.arange(0, TILE)
            _add_rows(left, sources, rows < num, columns, grad_hidden, hidden_size)
            _add_rows(right, sources, rows < num, columns + TILE, grad_hidden, hidden_size)


@triton.jit
def _store_weight_rows(
    values, entries, slice_start, slice_width, columns, grad_weight, hidden_size,
    stride_entry, stride_column, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    is_inside = (entries < slice_width)[:, None] & (columns < hidden_size)[None, :]
    rows = (slice_start + entries).to(tl.int64)[:, None]
    addresses = grad_weight + rows * stride_entry + columns.to(tl.int64)[None, :] * stride_column
    if ACCUMULATE:
        values += tl.load(addresses, mask=is_inside)
    tl.store(addresses, values.to(grad_weight.dtype.element_ty), mask=is_inside)


@triton.jit
def grad_weight_kernel(
    grad_logits,  # descriptor or pointer: [T rounded up to BLOCK_M, slice]
    live_hidden,  # the same: [T rounded up to BLOCK_M, H]
    num_live,  # [1] int32
    is_dense,  # [1] int32
    scale,  # [1]: what one unit of d stands for
    grad_weight,  # [V, H], any strides
    slice_start,
    slice_width,
    num_padded,
    hidden_size,
    stride_grad,
    stride_hidden,
    stride_entry,
    stride_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store or add d^T @ hidden for one block of a slice; zeros when no row has a gradient."""
    if tl.load(is_dense) != 0:
        num = tl.load(num_live)
        entry_block, column_block = grouped_block(
            tl.program_id(0), tl.cdiv(slice_width, BLOCK_M), tl.cdiv(hidden_size, BLOCK_N), GROUP
        )
        entry, column = entry_block * BLOCK_M, column_block * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, num, BLOCK_K):
            a = load_block(
                grad_logits, start, entry, num_padded, stride_grad, stride_grad,
                BLOCK_K, BLOCK_M, IS_TMA,
            )  # fmt: skip
            b = load_block(
                live_hidden, start, column, num_padded, hidden_size, stride_hidden,
                BLOCK_K, BLOCK_N, IS_TMA,
            )  # fmt: skip
            total = tl.dot(a.T, b, total, input_precision=PRECISION)

        total *= tl.load(scale)
        entries = entry + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, TILE)
        if BLOCK_N == TILE:
            _store_weight_rows(
                total, entries, slice_start, slice_width, columns, grad_weight, hidden_size,
                stride_entry, stride_column, ACCUMULATE,
            )  # fmt: skip
        else:
            left, right = split_tiles(total, BLOCK_M)
            _store_weight_rows(
                left, entries, slice_start, slice_width, columns, grad_weight, hidden_size,
                stride_entry, stride_column, ACCUMULATE,
            )  # fmt: skip
            _store_weight_rows(
                right, entries, slice_start, slice_width, columns + TILE, grad_weight,
                hidden_size, stride_entry, stride_column, ACCUMULATE,
            )  # fmt: skip
