"""Which (row, vocabulary tile) pairs the backward of `linear_logprob` visits, as lists on the GPU.

A row leaves out the tiles of least mass q = exp(tile_lse - lse) whose sum stays within its budget,
never the target's tile; reference.select_tiles is the definition. Everything works on the distance
lse - tile_lse, one subtraction, so that every kernel sees the same bits and decides alike: a tile
is dropped when its distance exceeds the row's threshold. Tiles of equal mass go together, where
the reference may drop some of them.

The kept pairs are listed by tile, rows ascending, each tile padded to whole chunks of PAIR_CHUNK
pairs. Tables have fixed sizes and every count stays on the device: no synchronisation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowrl.kernels.linear_logprob.gpu import IS_INTERPRETED
from flowrl.kernels.linear_logprob.reference import MASS_SLACK, MIN_TAIL, TILE

PAIR_CHUNK = 128
CHUNK = tl.constexpr(PAIR_CHUNK)
# Rows x tiles of a block of count and fill, eight pairs a thread: whole 32-byte sectors whichever
# way tile_lse is laid out. Twice the tiles need stack memory on sm_90.
LIST_ROWS = 256
LIST_TILES = 8
LIST_WARPS = 8
# Rows x tiles of a block of the selection; its distances and masses stay in registers, 64 of each
# a thread. Of more tiles (a vocabulary above 262144) blocks half as wide are read for every step.
SELECT_ROWS = 256 if IS_INTERPRETED else 8  # the interpreter's cost is by the program
SELECT_TILES = 2048
SELECT_WARPS = 8

# Values of target_tile beside the tile's number.
_ELSEWHERE = tl.constexpr(-1)
_NO_GRADIENT = tl.constexpr(-2)
# Rounding (of lse - tile_lse, exp2 and the sum) stays below 2e-5, so the slack of 2^-13 covers it
# as it covers that of the forward: `dropped` bounds the sum from above.
_MASS_SLACK = tl.constexpr(MASS_SLACK)
_MIN_TAIL = tl.constexpr(MIN_TAIL)
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)
_TINY = tl.constexpr(2.0**-126)  # stands for a mass that underflows, to remain an upper bound
_ALL_ONES = tl.constexpr(2**31 - 1)


class PairLists(NamedTuple):
    """The kept pairs, with C = max_chunks; those of tile j fill chunks start[j] to start[j + 1]."""

    rows: Tensor  # [C * PAIR_CHUNK] int32, -1 in the padding of a tile's last chunk
    chunk_start: Tensor  # [tiles + 1] int32
    chunk_tile: Tensor  # [C] int32
    row_offset: Tensor  # [tiles, row blocks + 1] int32, pairs of the tile in earlier row blocks
    wave_tile: Tensor  # [waves + 1] int32, first tile of each wave
    is_dense: Tensor  # [1] int32, 1: too many pairs; then there are no lists, all waves empty
    dropped_mass: Tensor  # [T] float32


@triton.jit
def _distances(tile_lse, rows, tiles, stride_row, stride_tile, row_lse, is_inside):
    """lse - tile_lse, at least 0; a NaN stays, and keeps its tile, as it exceeds no threshold."""
    offset = rows.to(tl.int64) * stride_row + tiles.to(tl.int64) * stride_tile
    distance = row_lse - tl.load(tile_lse + offset, mask=is_inside, other=0.0)
    return tl.where(distance < 0, 0.0, distance)


@triton.jit
def _droppable(
    tile_lse, rows, start, stride_row, stride_tile, row_lse, row_target, num_rows, num_tiles,
    BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Distances and masses of a block; mass 0 where nothing is to be dropped."""
    tiles = start + tl.arange(0, BLOCK_TILES)
    is_inside = (rows < num_rows)[:, None] & (tiles < num_tiles)[None, :]
    distance = _distances(
        tile_lse,
        rows[:, None],
        tiles[None, :],
        stride_row,
        stride_tile,
        row_lse[:, None],
        is_inside,
    )
    mass = tl.exp2(distance * _MINUS_LOG2_E) * _MASS_SLACK
    mass = tl.where(mass < _TINY, _TINY, mass)
    return distance, tl.where(is_inside & (tiles[None, :] != row_target[:, None]), mass, 0.0)


@triton.jit
def select_kernel(
    tile_lse, lse, budget, target_tile, threshold, dropped, num_rows, num_tiles, stride_row,
    stride_tile, drop_mass,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr, IS_RESIDENT: tl.constexpr,
):  # fmt: skip
    """threshold [T]: the least distance beyond which tiles may go; dropped [T]: their mass.

    Non-negative floats are ordered as their bits, which are settled from the top: a bit is cleared
    if the tiles beyond the threshold then still fit the budget. Where none fits, or the budget is
    NaN, all bits stay set, a NaN that no distance exceeds.
    """
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = rows < num_rows
    row_lse = tl.load(lse + rows, mask=is_row, other=0.0)
    row_target = tl.load(target_tile + rows, mask=is_row, other=_NO_GRADIENT)
    distance, mass = _droppable(
        tile_lse, rows, 0, stride_row, stride_tile, row_lse, row_target, num_rows, num_tiles,
        BLOCK_TILES,
    )  # fmt: skip
    if budget is None:
        outside = tl.sum(mass, 1)
        if not IS_RESIDENT:
            for start in range(BLOCK_TILES, num_tiles, BLOCK_TILES):
                _, mass = _droppable(
                    tile_lse, rows, start, stride_row, stride_tile, row_lse, row_target, num_rows,
                    num_tiles, BLOCK_TILES,
                )  # fmt: skip
                outside += tl.sum(mass, 1)
        outside = outside / _MASS_SLACK
        tail = 8 * tl.where(outside < _MIN_TAIL, _MIN_TAIL, outside)
        row_budget = drop_mass * tl.where(tail > 1, 1.0, tail)
    else:
        row_budget = tl.load(budget + rows, mask=is_row, other=0.0)

    bits = tl.full([BLOCK_ROWS], _ALL_ONES, tl.int32)
    row_dropped = tl.zeros([BLOCK_ROWS], tl.float32)
    for step in range(31):
        candidate = bits & ~(1 << (30 - step))
        limit = candidate.to(tl.float32, bitcast=True)[:, None]
        if IS_RESIDENT:
            total = tl.sum(tl.where(distance > limit, mass, 0.0), 1)
        else:
            total = tl.zeros([BLOCK_ROWS], tl.float32)
            for start in range(0, num_tiles, BLOCK_TILES):
                distance, mass = _droppable(
                    tile_lse, rows, start, stride_row, stride_tile, row_lse, row_target, num_rows,
                    num_tiles, BLOCK_TILES,
                )  # fmt: skip
                total += tl.sum(tl.where(distance > limit, mass, 0.0), 1)
        fits = total <= row_budget
        bits = tl.where(fits, candidate, bits)
        row_dropped = tl.where(fits, total, row_dropped)
    tl.store(threshold + rows, bits.to(tl.float32, bitcast=True), mask=is_row)
    row_dropped = tl.where(row_target == _NO_GRADIENT, 0.0, row_dropped)
    tl.store(dropped + rows, row_dropped, mask=is_row)


@triton.jit
def _kept(
    tile_lse, lse, threshold, target_tile, rows, tiles, num_rows, num_tiles, stride_row, stride_tile
):
    """[tiles, rows]: whether a pair is in the lists."""
    is_row = rows < num_rows
    row_lse = tl.load(lse + rows, mask=is_row, other=0.0)[None, :]
    row_threshold = tl.load(threshold + rows, mask=is_row, other=0.0)[None, :]
    row_target = tl.load(target_tile + rows, mask=is_row, other=_NO_GRADIENT)[None, :]
    is_inside = (tiles < num_tiles)[:, None] & (row_target != _NO_GRADIENT)
    distance = _distances(
        tile_lse, rows[None, :], tiles[:, None], stride_row, stride_tile, row_lse, is_inside
    )
    is_kept = ~(distance > row_threshold) | (tiles[:, None] == row_target)
    return is_kept & is_inside


@triton.jit
def count_kernel(
    tile_lse, lse, threshold, target_tile, counts, num_rows, num_tiles, stride_row, stride_tile,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """counts [tiles, row blocks]: kept pairs of each tile and block of rows."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tiles = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    is_kept = _kept(
        tile_lse, lse, threshold, target_tile, rows, tiles, num_rows, num_tiles, stride_row,
        stride_tile,
    )  # fmt: skip
    offset = tiles.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(counts + offset, tl.sum(is_kept.to(tl.int32), 1), mask=tiles < num_tiles)


@triton.jit
def fill_kernel(
    tile_lse, lse, threshold, target_tile, row_offset, chunk_start, is_dense, pair_rows, num_rows,
    num_tiles, stride_row, stride_tile,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Write the rows of the kept pairs to their places, which the counts have settled."""
    if tl.load(is_dense) != 0:
        return
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tiles = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    is_kept = _kept(
        tile_lse, lse, threshold, target_tile, rows, tiles, num_rows, num_tiles, stride_row,
        stride_tile,
    )  # fmt: skip
    offset = tiles.to(tl.int64) * (tl.num_programs(0) + 1) + tl.program_id(0)
    first = tl.load(chunk_start + tiles, mask=tiles < num_tiles, other=0).to(tl.int64) * CHUNK
    first += tl.load(row_offset + offset, mask=tiles < num_tiles, other=0)
    place = first[:, None] + tl.cumsum(is_kept.to(tl.int32), 1) - 1
    tl.store(pair_rows + place, tl.broadcast_to(rows[None, :], place.shape), mask=is_kept)


def build_lists(
    target: Tensor,
    vocab_start: int,
    vocab_size: int,
    lse: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    drop_mass: float,
    logprob: Tensor | None,
    ignore_index: int,
    max_fill: float,
    max_chunks: int,
    wave_chunks: int,
    select_block: tuple[int, int] = (SELECT_ROWS, SELECT_TILES),
) -> PairLists:
    """Return the pairs that `drop_mass` keeps, cut into waves of whole tiles.

    Wave w has the tiles whose first chunk is one of w * wave_chunks, ..., (w + 1) * wave_chunks - 1
    and so at most wave_chunks + ceil(T / PAIR_CHUNK) - 1 chunks. More pairs than `max_fill` of
    those of rows with a gradient, or more than max_chunks hold, are too many. tile_lse [T, tiles]
    may have any strides. select_block, rows x tiles of the selection, holds powers of two.
    """
    num_rows, num_tiles = tile_lse.shape
    assert num_rows > 0 and num_tiles == triton.cdiv(vocab_size, TILE)
    target_tile = _target_tiles(target, vocab_start, vocab_size, grad_logprob, ignore_index)
    budget = None
    if logprob is not None:
        budget = drop_mass * (8 * (-torch.expm1(logprob)).clamp(min=MIN_TAIL)).clamp(max=1)
    threshold, dropped = torch.empty_like(lse), torch.empty_like(lse)
    block_rows, block_tiles = select_block
    is_resident = num_tiles <= block_tiles
    block_tiles = triton.next_power_of_2(num_tiles) if is_resident else block_tiles // 2
    select_config = {
        "BLOCK_ROWS": block_rows,
        "BLOCK_TILES": block_tiles,
        "IS_RESIDENT": is_resident,
        "num_warps": SELECT_WARPS,
        "enable_fp_fusion": True,
    }
    select_kernel[(triton.cdiv(num_rows, block_rows),)](
        *(tile_lse, lse, budget, target_tile, threshold, dropped, num_rows, num_tiles),
        *(tile_lse.stride(0), tile_lse.stride(1), drop_mass),
        **select_config,
    )

    row_blocks = triton.cdiv(num_rows, LIST_ROWS)
    grid = (row_blocks, triton.cdiv(num_tiles, LIST_TILES))
    rule = (tile_lse, lse, threshold, target_tile)
    sizes = (num_rows, num_tiles, tile_lse.stride(0), tile_lse.stride(1))
    list_config = {
        "BLOCK_ROWS": LIST_ROWS,
        "BLOCK_TILES": LIST_TILES,
        "num_warps": LIST_WARPS,
        "enable_fp_fusion": True,
    }
    counts = lse.new_empty(num_tiles, row_blocks, dtype=torch.int32)
    count_kernel[grid](*rule, counts, *sizes, **list_config)

    row_offset = lse.new_zeros(num_tiles, row_blocks + 1, dtype=torch.int32)
    torch.cumsum(counts, 1, dtype=torch.int32, out=row_offset[:, 1:])
    num_chunks = (row_offset[:, -1] + PAIR_CHUNK - 1).div(PAIR_CHUNK, rounding_mode="floor")
    chunk_start = lse.new_zeros(num_tiles + 1, dtype=torch.int64)
    torch.cumsum(num_chunks, 0, dtype=torch.int64, out=chunk_start[1:])
    # Of the rows with a gradient, since they alone cost the exact backward anything. A chunk a tile
    # is for what the padding takes.
    num_live = (target_tile != _NO_GRADIENT.value).sum()
    limit = num_live.double() * (max_fill * num_tiles / PAIR_CHUNK) + num_tiles
    is_dense = (chunk_start[-1:] > limit.clamp(max=max_chunks)).to(torch.int32)
    chunks = torch.arange(max_chunks, device=lse.device)
    chunk_tile = torch.searchsorted(chunk_start[1:], chunks, right=True, out_int32=True)
    # One wave more than max_chunks fill, for empty tiles behind the last chunk.
    wave_start = wave_chunks * torch.arange(max_chunks // wave_chunks + 2, device=lse.device)
    wave_tile = torch.searchsorted(chunk_start[:-1], wave_start, out_int32=True)

    pair_rows = lse.new_full((max_chunks * PAIR_CHUNK,), -1, dtype=torch.int32)
    chunk_start = chunk_start.clamp(max=2**31 - 1).to(torch.int32)
    fill_kernel[grid](*(*rule, row_offset, chunk_start, is_dense, pair_rows, *sizes), **list_config)
    return PairLists(
        rows=pair_rows,
        chunk_start=chunk_start,
        chunk_tile=chunk_tile,
        row_offset=row_offset,
        wave_tile=wave_tile * (1 - is_dense),
        is_dense=is_dense,
        dropped_mass=dropped * (1 - is_dense),
    )


def _target_tiles(
    target: Tensor, vocab_start: int, vocab_size: int, grad_logprob: Tensor, ignore_index: int
) -> Tensor:
    """[T] int32: the tile of the target, or why there is none."""
    local_target = target - vocab_start
    is_here = (local_target >= 0) & (local_target < vocab_size)
    tile = local_target.div(TILE, rounding_mode="floor").masked_fill(~is_here, _ELSEWHERE.value)
    is_still = (grad_logprob == 0) | (target == ignore_index)
    return tile.masked_fill(is_still, _NO_GRADIENT.value).to(torch.int32)
