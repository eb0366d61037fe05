"""Backward of `linear_logprob` on the (row, vocabulary tile) pairs that hold softmax mass.

A grouped matrix product, as of a mixture of experts: a tile of TILE vocabulary entries is an expert
and its kept rows (gpu_lists.py) are its tokens. Waves of whole tiles go through three kernels:
    pair_p   P [pairs, TILE] = g (1[v = y] - p), in the dtype of the inputs
    pair_dw  grad_weight of a tile = P^T hidden[rows] / temperature, in registers, stored once
    pair_dh  grad_hidden[rows] += P weight_tile / temperature, tile after tile
All sums have a fixed order, none is atomic. How many waves hold pairs is known on the device only:
the host launches as many as MAX_FILL allows if all rows have a gradient, and empty ones exit.

Estimated cost for bfloat16 on an H200 (790 TFLOP/s, 4.3 TB/s; not measured): a pair takes 3
products of 2 TILE H FLOPs, 1.6 ps H at 60 % of the peak, and reads and writes its float32 row of
grad_hidden, 8 H bytes or 1.9 ps H. One (row, tile) of the exact backward, three products without
gather, takes 1.2 ps H at 80 % of the peak.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowrl.kernels.linear_logprob.gpu import (
    IS_INTERPRETED,
    LOG2_E,
    TILE,
    block_source,
    can_use_tma,
    device_capability,
    dot_precision,
    interpretable,
    load_block,
    on_device,
    unit_gradients,
)
from flowrl.kernels.linear_logprob.gpu_blocks import BLOCKS, Table, device_kind, launch_options
from flowrl.kernels.linear_logprob.gpu_lists import (
    CHUNK,
    LIST_ROWS,
    PAIR_CHUNK,
    PairLists,
    build_lists,
)

# Share of the (row, tile) pairs of rows with a gradient above which the exact backward takes over.
# By the estimate above both cost the same at 0.35; below that, because gathering may come out
# slower than estimated.
MAX_FILL = 0.25
# Bytes of P that exist at a time: 4096 chunks in bfloat16. Larger waves are fewer launches.
PAIR_BUFFER_BYTES = 2**27


@triton.jit
def _gather_rows(source, rows, columns, num_columns, stride):
    """Rows of a matrix, zeros for the rows -1 of the padding and outside the columns."""
    offset = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    is_inside = (rows >= 0)[:, None] & (columns < num_columns)[None, :]
    return tl.load(source + offset, mask=is_inside, other=0.0)


@triton.jit(do_not_specialize=["wave", "vocab_start"])
def pair_p_kernel(
    hidden,  # [T, H]
    weight,  # descriptor or pointer: [V, H]
    target,  # [T] int64
    lse,  # [T]
    unit_grad,  # [T]
    pair_rows,
    chunk_start,
    chunk_tile,
    wave_tile,
    pairs,  # [pairs of a wave, TILE]
    wave,
    vocab_start,
    num_entries,
    hidden_size,
    stride_hidden,
    stride_weight,
    inverse_temperature,
    BLOCK_H: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store P of one chunk, zeros in its padding and outside the vocabulary."""
    first_chunk = tl.load(chunk_start + tl.load(wave_tile + wave))
    chunk = first_chunk + tl.program_id(0)
    if chunk >= tl.load(chunk_start + tl.load(wave_tile + wave + 1)):
        return
    first = tl.load(chunk_tile + chunk) * TILE
    lanes = tl.arange(0, CHUNK)
    rows = tl.load(pair_rows + chunk.to(tl.int64) * CHUNK + lanes)
    logits = tl.zeros((CHUNK, TILE), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        a = _gather_rows(hidden, rows, start + tl.arange(0, BLOCK_H), hidden_size, stride_hidden)
        b = load_block(
            weight, first, start, num_entries, hidden_size, stride_weight, TILE, BLOCK_H, IS_TMA
        )
        logits = tl.dot(a, b.T, logits, input_precision=PRECISION)

    is_row = rows >= 0
    row_lse = tl.load(lse + rows, mask=is_row, other=0)
    grad = tl.load(unit_grad + rows, mask=is_row, other=0)
    local_target = tl.load(target + rows, mask=is_row, other=-1) - vocab_start
    columns = tl.arange(0, TILE)
    # The difference first: it is exact where 1 - p is small, and lse * LOG2_E would be rounded.
    probability = tl.exp2((logits * inverse_temperature - row_lse[:, None]) * LOG2_E)
    # 1 - p before it is rounded: added to a rounded -p, 1 would leave p's error, not that of 1 - p.
    one_hot = (local_target[:, None] == (first + columns)[None, :]).to(tl.float32)
    gradient = grad[:, None] * (one_hot - probability)
    is_inside = is_row[:, None] & (first + columns < num_entries)[None, :]
    gradient = tl.where(is_inside, gradient, 0).to(pairs.dtype.element_ty)
    places = (tl.program_id(0) * CHUNK + lanes).to(tl.int64)
    tl.store(pairs + places[:, None] * TILE + columns[None, :], gradient)


@triton.jit(do_not_specialize=["wave"])
def pair_dw_kernel(
    pairs,  # descriptor or pointer: [num_pairs, TILE]
    hidden,  # [T, H]
    pair_rows,
    chunk_start,
    wave_tile,
    scale,  # [1]
    grad_weight,  # [V, H]
    wave,
    num_pairs,
    num_entries,
    hidden_size,
    stride_hidden,
    stride_grad_v,
    stride_grad_h,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    ADD: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store scale P^T hidden of the wave's tiles, 0 without pairs; ADD: add it to what is there."""
    first_tile = tl.load(wave_tile + wave)
    num_tiles = tl.load(wave_tile + wave + 1) - first_tile
    first_chunk = tl.load(chunk_start + first_tile)
    factor = tl.load(scale)
    num_blocks = tl.cdiv(hidden_size, BLOCK_H)
    STEPS: tl.constexpr = CHUNK // BLOCK_PAIRS
    for item in range(tl.program_id(0), num_tiles * num_blocks, tl.num_programs(0)):
        tile = first_tile + item // num_blocks
        columns = item % num_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        begin = tl.load(chunk_start + tile) * STEPS
        end = tl.load(chunk_start + tile + 1) * STEPS
        total = tl.zeros((TILE, BLOCK_H), dtype=tl.float32)
        for step in range(begin, end):
            lanes = tl.cast(step, tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
            b = _gather_rows(
                hidden, tl.load(pair_rows + lanes), columns, hidden_size, stride_hidden
            )
            place = (step - first_chunk * STEPS) * BLOCK_PAIRS
            a = load_block(pairs, place, 0, num_pairs, TILE, TILE, BLOCK_PAIRS, TILE, IS_TMA)
            total = tl.dot(a.T, b, total, input_precision=PRECISION)
        total *= factor
        entries = tile * TILE + tl.arange(0, TILE)
        to = grad_weight + entries.to(tl.int64)[:, None] * stride_grad_v
        to += columns.to(tl.int64)[None, :] * stride_grad_h
        is_inside = (entries < num_entries)[:, None] & (columns < hidden_size)[None, :]
        if ADD:
            total += tl.load(to, mask=is_inside, other=0)
        tl.store(to, total.to(grad_weight.dtype.element_ty), mask=is_inside)


@triton.jit(do_not_specialize=["wave"])
def pair_dh_kernel(
    pairs,  # descriptor or pointer: [num_pairs, TILE]
    weight,  # the same: [V, H]
    pair_rows,
    chunk_start,
    row_offset,  # [tiles, row_blocks + 1]
    wave_tile,
    scale,  # [1]
    grad_hidden,  # [T, H]
    wave,
    num_pairs,
    row_blocks,
    range_blocks,
    num_entries,
    hidden_size,
    stride_weight,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add scale P weight to grad_hidden.

    A program owns BLOCK_H columns of range_blocks blocks of rows and goes through the tiles in
    order: nobody else writes there, and every row is summed in the order of the tiles.
    """
    column = tl.program_id(0) * BLOCK_H
    columns = column + tl.arange(0, BLOCK_H)
    first_block = tl.program_id(1) * range_blocks
    last_block = tl.minimum(first_block + range_blocks, row_blocks)
    first_tile = tl.load(wave_tile + wave)
    first_chunk = tl.load(chunk_start + first_tile)
    factor = tl.load(scale)
    for tile in range(first_tile, tl.load(wave_tile + wave + 1)):
        chunk = tl.load(chunk_start + tile)
        offset = row_offset + tl.cast(tile, tl.int64) * (row_blocks + 1)
        end = tl.load(offset + last_block)
        for start in range(tl.load(offset + first_block), end, BLOCK_PAIRS):
            # The block may go on with pairs of other rows; their products are not stored.
            place = (chunk - first_chunk) * CHUNK + start
            part = tl.zeros((BLOCK_PAIRS, BLOCK_H), dtype=tl.float32)
            for entry in range(0, TILE, BLOCK_V):
                a = load_block(
                    pairs, place, entry, num_pairs, TILE, TILE, BLOCK_PAIRS, BLOCK_V, IS_TMA
                )
                b = load_block(
                    weight, tile * TILE + entry, column, num_entries, hidden_size, stride_weight,
                    BLOCK_V, BLOCK_H, IS_TMA,
                )  # fmt: skip
                part = tl.dot(a, b, part, input_precision=PRECISION)
            lanes = start + tl.arange(0, BLOCK_PAIRS)
            is_pair = lanes < end
            rows = tl.load(pair_rows + chunk.to(tl.int64) * CHUNK + lanes, mask=is_pair, other=0)
            to = grad_hidden + rows.to(tl.int64)[:, None] * hidden_size + columns[None, :]
            is_inside = is_pair[:, None] & (columns < hidden_size)[None, :]
            old = tl.load(to, mask=is_inside, other=0)
            tl.store(to, tl.fma(part, factor, old), mask=is_inside)
        # The next tile reads what other threads of this program have written.
        tl.debug_barrier()


def pair_backward(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    lse: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    drop_mass: float,
    logprob: Tensor | None,
    ignore_index: int,
    dropped_mass: Tensor | None,
    weight_grad: Tensor | None,
    needs_grad_weight: bool,
    grad_weight_dtype: torch.dtype | None,
    max_fill: float = MAX_FILL,
    buffer_bytes: int = PAIR_BUFFER_BYTES,
    table: Table = BLOCKS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (grad_hidden [T, H] float32, grad_weight [V, H] or [0, H], is_dense [1] int32).

    Arguments and results are those of `linear_logprob_backward` with drop_mass > 0 and no gradient
    of the entropy; T > 0. is_dense = 1 says that of the pairs of rows with a gradient more than
    `max_fill` would be kept and nothing was done: grad_hidden is 0, grad_weight unwritten,
    weight_grad untouched, and the exact backward has to do the work. `dropped_mass` is right either
    way, 0 in the exact case. At most `buffer_bytes` of P exist at a time, plus what the pairs of
    one tile may need.
    """
    num_rows, hidden_size = hidden.shape
    num_entries = weight_shard.shape[0]
    grad_weight_dtype = grad_weight_dtype or torch.float32
    grad_hidden = hidden.new_zeros(num_rows, hidden_size, dtype=torch.float32)
    has_result = needs_grad_weight and weight_grad is None
    grad_weight = hidden.new_empty(
        num_entries if has_result else 0,
        hidden_size,
        # Rounded after the kernels in the interpreter, which truncates.
        dtype=torch.float32 if IS_INTERPRETED else grad_weight_dtype,
    )
    is_tma = can_use_tma(weight_shard)
    kind = device_kind(device_capability(hidden), hidden.dtype, is_tma)
    hidden, weight_shard = interpretable(hidden), interpretable(weight_shard)
    unit_grad, _, scale = unit_gradients(grad_logprob, None, temperature, hidden.dtype)
    num_tiles = triton.cdiv(num_entries, TILE.value)
    tile_chunks = triton.cdiv(num_rows, PAIR_CHUNK)
    # What the tables hold, enough where every row has a gradient.
    max_chunks = int(max_fill * num_rows * num_tiles) // PAIR_CHUNK + num_tiles
    max_chunks = min(max_chunks, num_tiles * tile_chunks)
    wave_chunks = buffer_bytes // (PAIR_CHUNK * TILE.value * hidden.element_size())
    wave_chunks = min(max(wave_chunks, 1), max_chunks)
    buffer_chunks = min(wave_chunks + tile_chunks - 1, max_chunks)
    pairs = hidden.new_empty(buffer_chunks * PAIR_CHUNK, TILE.value)
    with on_device(hidden):
        lists = build_lists(
            *(target, vocab_start, num_entries, lse.contiguous(), tile_lse, grad_logprob),
            *(drop_mass, logprob, ignore_index, max_fill, max_chunks, wave_chunks),
        )
        _run_waves(
            *(hidden, weight_shard, target.contiguous(), vocab_start, 1 / temperature),
            *(lse.contiguous(), unit_grad, scale, lists, pairs, grad_hidden),
            grad_weight if weight_grad is None else weight_grad,
            needs_grad_weight or weight_grad is not None,
            *(weight_grad is not None, is_tma),
            *(launch_options(table, name, kind) for name in ("pair_p", "pair_dw", "pair_dh")),
        )
    if dropped_mass is not None:
        dropped_mass.copy_(lists.dropped_mass)
    return grad_hidden, grad_weight.to(grad_weight_dtype), lists.is_dense


def _run_waves(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    inverse_temperature: float,
    lse: Tensor,
    unit_grad: Tensor,
    scale: Tensor,
    lists: PairLists,
    pairs: Tensor,
    grad_hidden: Tensor,
    grad_weight: Tensor,
    needs_grad_weight: bool,
    adds: bool,
    is_tma: bool,
    p_blocks: dict[str, int],
    dw_blocks: dict[str, int],
    dh_blocks: dict[str, int],
) -> None:
    num_pairs, (num_rows, hidden_size), num_entries = len(pairs), hidden.shape, len(weight)
    flags = {"IS_TMA": is_tma, "PRECISION": dot_precision(hidden), "enable_fp_fusion": True}
    num_sms = _num_multiprocessors(hidden)
    # As many ranges of rows as give two programs of pair_dh to a multiprocessor.
    row_blocks = triton.cdiv(num_rows, LIST_ROWS)
    column_blocks = triton.cdiv(hidden_size, dh_blocks["BLOCK_H"])
    num_ranges = min(triton.cdiv(2 * num_sms, column_blocks), row_blocks)
    range_blocks = triton.cdiv(row_blocks, num_ranges)
    for wave in range(len(lists.wave_tile) - 1):
        pair_p_kernel[(num_pairs // PAIR_CHUNK,)](
            *(hidden, block_source(weight, TILE.value, p_blocks["BLOCK_H"], is_tma), target, lse),
            *(unit_grad, lists.rows, lists.chunk_start, lists.chunk_tile, lists.wave_tile, pairs),
            *(wave, vocab_start, num_entries, hidden_size, hidden.stride(0), weight.stride(0)),
            inverse_temperature,
            **p_blocks,
            **flags,
        )
        if needs_grad_weight:
            pair_dw_kernel[(2 * num_sms,)](
                block_source(pairs, dw_blocks["BLOCK_PAIRS"], TILE.value, is_tma),
                *(hidden, lists.rows, lists.chunk_start, lists.wave_tile, scale, grad_weight),
                *(wave, num_pairs, num_entries, hidden_size, hidden.stride(0)),
                *(grad_weight.stride(0), grad_weight.stride(1)),
                **{"ADD": adds},
                **dw_blocks,
                **flags,
            )
        pair_dh_kernel[(column_blocks, triton.cdiv(row_blocks, range_blocks))](
            block_source(pairs, dh_blocks["BLOCK_PAIRS"], dh_blocks["BLOCK_V"], is_tma),
            block_source(weight, dh_blocks["BLOCK_V"], dh_blocks["BLOCK_H"], is_tma),
            *(lists.rows, lists.chunk_start, lists.row_offset, lists.wave_tile, scale),
            *(grad_hidden, wave, num_pairs, row_blocks, range_blocks, num_entries, hidden_size),
            weight.stride(0),
            **dh_blocks,
            **flags,
        )


def _num_multiprocessors(tensor: Tensor) -> int:
    if not tensor.is_cuda:
        return 1  # the interpreter runs one program after another
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count
