# pyright: reportCallIssue=false, reportArgumentType=false, reportOperatorIssue=false
# (Launch options are no parameters of a kernel, and what a tl function returns is not typed.)
"""Forward of `linear_logprob` in Triton: one pass of product tiles, then one over their sums.

A program owns BLOCK_T rows and BLOCK_V vocabulary entries. It keeps the logits in registers and
stores the log-sum-exp of each row and run of TILE entries, in float32, so no [T, V] exists; the
target's logit comes from the same accumulator, in the one program that holds it. A second kernel
sums the tiles of a row in a fixed order. Sizes of blocks never depend on T and the last block is
padded, so a row's bits depend on nothing else in the batch.

Legend: T rows, H hidden size, V entries of the shard; z logits divided by the temperature.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.linear_logprob import reference
from flowrl.kernels.linear_logprob.checks import check_inputs
from flowrl.kernels.linear_logprob.gpu_blocks import BLOCKS, Table, device_kind, launch_options

TILE = tl.constexpr(128)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Finite and far from overflow at any temperature above 1e-18: exp2(-inf) * -inf would be NaN in
# the mean logit of a partial tile.
PADDING_LOGIT = tl.constexpr(-1e20)
TENSOR_MAP_ALIGNMENT = 16  # bytes, of the base and the row stride of what TMA reads


def forward(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    ignore_index: int = -100,
    entropy: bool = False,
    kept_logits: Tensor | None = None,
    table: Table = BLOCKS,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (lse [T], target_logit [T], mean_logit [T], tile_lse [T, tiles]) of one shard.

    tile_lse is a view of tile-major memory, in which a program's stores are contiguous.
    `kept_logits` [T, 128 tiles], of the dtype of `hidden`, receives exp(z - tile_lse), which
    rounds to a relative error where a bfloat16 logit of 20 would be off by 6 % of the probability.
    float64 is the reference's.
    """
    if hidden.dtype == torch.float64:
        return reference.forward(
            hidden, weight_shard, target, vocab_start, temperature, ignore_index, entropy
        )
    check_inputs(hidden, weight_shard, target, temperature)
    num_rows, num_entries = hidden.shape[0], weight_shard.shape[0]
    num_tiles = triton.cdiv(num_entries, TILE.value)
    lse, target_logit, mean_logit = (
        hidden.new_zeros(num_rows, dtype=torch.float32) for _ in range(3)
    )
    tile_lse = hidden.new_empty(num_tiles, num_rows, dtype=torch.float32)
    tile_mean = torch.empty_like(tile_lse) if entropy else tile_lse
    if num_rows > 0:
        is_tma = can_use_tma(hidden, weight_shard)
        keeps = kept_logits is not None
        kind = device_kind(device_capability(hidden), hidden.dtype, is_tma)
        config = launch_options(table, "forward_keep" if keeps else "forward", kind)
        hidden, weight_shard = interpretable(hidden), interpretable(weight_shard)
        target = target.contiguous()
        num_blocks = triton.cdiv(num_rows, config["BLOCK_T"]) * triton.cdiv(
            num_entries, config["BLOCK_V"]
        )
        with on_device(hidden):
            forward_kernel[(num_blocks,)](
                block_source(hidden, config["BLOCK_T"], config["BLOCK_H"], is_tma),
                block_source(weight_shard, config["BLOCK_V"], config["BLOCK_H"], is_tma),
                target,
                tile_lse,
                tile_mean,
                target_logit,
                tile_lse if kept_logits is None else kept_logits,
                num_rows,
                num_entries,
                hidden.shape[1],
                hidden.stride(0),
                weight_shard.stride(0),
                0 if kept_logits is None else kept_logits.stride(0),
                vocab_start,
                ignore_index,
                1 / temperature,
                ENTROPY=entropy,
                KEEP=keeps,
                IS_TMA=is_tma,
                PRECISION=dot_precision(hidden),
                enable_fp_fusion=True,
                **config,
            )
            finalise_kernel[(triton.cdiv(num_rows, 32),)](
                tile_lse,
                tile_mean,
                target,
                lse,
                mean_logit,
                num_rows,
                num_tiles,
                ignore_index,
                ENTROPY=entropy,
                BLOCK_T=32,
                BLOCK_N=32,
                num_warps=4,
                enable_fp_fusion=True,
            )
    return lse, target_logit, mean_logit, tile_lse.t()


def unit_gradients(
    grad_logprob: Tensor, grad_entropy: Tensor | None, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (unit_grad [T], unit_grad_entropy [T], scale [1]).

    A gradient divided by the temperature is its unit times `scale`.

    float16 would lose gradients of 1e-6, the size that a mean over a batch gives them, so there
    the largest becomes 1/2 to 1, by a power of two; a NaN does not count.
    """
    unit_grad = grad_logprob.float().contiguous()
    unit_grad_entropy = unit_grad if grad_entropy is None else grad_entropy.float().contiguous()
    if dtype != torch.float16:
        return unit_grad, unit_grad_entropy, unit_grad.new_full((1,), 1 / temperature)
    sizes = torch.maximum(unit_grad.abs(), unit_grad_entropy.abs())
    largest = torch.where(sizes.isfinite(), sizes, 0).amax().clamp(min=2.0**-100)
    power = largest.log2().ceil().exp2()
    return unit_grad / power, unit_grad_entropy / power, power[None] / temperature


def device_capability(tensor: Tensor) -> tuple[int, int]:
    """Return the compute capability of the tensor's device; the interpreter follows Hopper."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def interpretable(tensor: Tensor) -> Tensor:
    """Return `tensor` with contiguous rows, and in float32 where the interpreter needs that.

    The interpreter multiplies the bit patterns of bfloat16 operands, and truncates when it converts
    to bfloat16.
    """
    if IS_INTERPRETED and tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    if tensor.shape[0] == 1:
        tensor = tensor[0][None]  # its row stride may be anything, and TMA takes not every one
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def can_use_tma(*matrices: Tensor) -> bool:
    """Whether all matrices can be read by the tensor memory accelerator, in 16-bit floats.

    On sm_80 descriptors compile to synchronous loads. In float32 one operand of the product comes
    from registers, so there is nothing to gain.
    """
    if device_capability(matrices[0]) < (9, 0) or matrices[0].dtype == torch.float32:
        return False
    for matrix in matrices:
        is_strided = matrix.stride(1) == 1 and matrix.shape[0] > 1  # see `interpretable`
        row_bytes = (matrix.stride(0) if is_strided else matrix.shape[1]) * 2
        is_aligned = matrix.stride(1) != 1 or matrix.data_ptr() % TENSOR_MAP_ALIGNMENT == 0
        if not is_aligned or row_bytes % TENSOR_MAP_ALIGNMENT or matrix.numel() == 0:
            return False
    return True


def block_source(
    matrix: Tensor, block_rows: int, block_columns: int, is_tma: bool
) -> Tensor | TensorDescriptor:
    """Return what `load_block` takes: a descriptor, or the matrix for addresses of its own."""
    if is_tma:
        return TensorDescriptor.from_tensor(matrix, [block_rows, block_columns])
    return matrix


def dot_precision(operand: Tensor) -> str:
    # Triton's default would round float32 operands to tf32, an error of 1e-3.
    return "tf32x3" if operand.dtype == torch.float32 else "ieee"


@triton.jit
def load_block(
    source,
    row,
    column,
    num_rows,
    num_columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    IS_TMA: tl.constexpr,
):
    """Return the block at (row, column), zeros outside the matrix."""
    if IS_TMA:
        block = source.load([row, column])
    else:
        rows = row + tl.arange(0, BLOCK_ROWS)
        columns = column + tl.arange(0, BLOCK_COLUMNS)
        is_inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        addresses = source + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        block = tl.load(addresses, mask=is_inside, other=0)
    return block


@triton.jit
def grouped_block(program, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Return (row block, column block): down GROUP row blocks first, then along the columns."""
    group_size = GROUP * num_column_blocks
    first_row_block = program // group_size * GROUP
    num_in_group = tl.minimum(num_row_blocks - first_row_block, GROUP)
    in_group = program % group_size
    return first_row_block + in_group % num_in_group, in_group // num_in_group


@triton.jit
def shard_column(target, vocab_start, num_entries, is_ignored):
    """Return the target's int32 column in this shard, -1 where it has none."""
    is_here = (target >= vocab_start) & (target - vocab_start < num_entries)
    return tl.where(is_here & ~is_ignored, target - vocab_start, -1).to(tl.int32)


@triton.jit
def split_tiles(block, BLOCK_ROWS: tl.constexpr):
    """Return the two halves [BLOCK_ROWS, TILE] of a block of 2 TILE columns."""
    return tl.split(tl.permute(tl.reshape(block, (BLOCK_ROWS, 2, TILE)), (0, 2, 1)))


@triton.jit
def _finish_tile(
    logits,  # [BLOCK_T, TILE], not yet divided by the temperature
    tile,
    rows,
    local_target,
    is_ignored,
    tile_lse,
    tile_mean,
    target_logit,
    kept,
    num_rows,
    num_entries,
    stride_kept,
    inverse_temperature,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
):
    columns = tile * TILE + tl.arange(0, TILE)
    is_stored = rows < tl.where(tile * TILE < num_entries, num_rows, 0)
    is_target = columns[None, :] == local_target[:, None]
    found = tl.sum(tl.where(is_target, logits, 0), axis=1) * inverse_temperature
    is_here = (local_target >= tile * TILE) & (local_target < tile * TILE + TILE)
    tl.store(target_logit + rows, found, mask=is_stored & is_here)

    # One finite mask and one product-and-add an entry: two masks or a branch here spill registers.
    logits = tl.where((columns < num_entries)[None, :], logits, PADDING_LOGIT)
    scale = inverse_temperature * LOG2_E
    top = tl.max(logits, axis=1)
    shift = top * scale
    # What rounding took from the shift; without it logits of 400 would cost 2e-5.
    residual = tl.fma(top, scale, -shift)
    exponents = tl.fma(logits, scale, -shift[:, None])
    exponentials = tl.exp2(exponents)
    offsets = tile.to(tl.int64) * num_rows + rows
    total = tl.sum(exponentials, axis=1)
    if ENTROPY:
        weighted = tl.sum(exponentials * exponents, axis=1)
        mean = top * inverse_temperature + LN_2 * (weighted / total - residual)
        tl.store(tile_mean + offsets, tl.where(is_ignored, 0, mean), mask=is_stored)
    lse = top * inverse_temperature + LN_2 * (tl.log2(total) - residual)
    tl.store(tile_lse + offsets, tl.where(is_ignored, 0, lse), mask=is_stored)
    if KEEP:
        kept_rows = kept + rows.to(tl.int64)[:, None] * stride_kept + columns[None, :]
        probability = exponentials * (1 / total)[:, None]
        tl.store(kept_rows, probability.to(kept.dtype.element_ty), mask=is_stored[:, None])


# num_rows is not specialised, so that every T runs the same instructions.
@triton.jit(do_not_specialize=["num_rows", "vocab_start", "ignore_index"])
def forward_kernel(
    hidden,  # descriptor or pointer: [T, H]
    weight,  # the same: [V, H]
    target,  # [T] int64
    tile_lse,  # [tiles, T]
    tile_mean,  # [tiles, T] if ENTROPY
    target_logit,  # [T], zero at the start
    kept,  # [T, 128 tiles] if KEEP
    num_rows,
    num_entries,
    hidden_size,
    stride_hidden,
    stride_weight,
    stride_kept,
    vocab_start,
    ignore_index,
    inverse_temperature,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    IS_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Store the log-sum-exp, and mean logit, of each row and tile of 128 entries of one block."""
    row_block, vocab_block = grouped_block(
        tl.program_id(0), tl.cdiv(num_rows, BLOCK_T), tl.cdiv(num_entries, BLOCK_V), GROUP
    )
    first_row, first = row_block * BLOCK_T, vocab_block * BLOCK_V
    rows = first_row + tl.arange(0, BLOCK_T)
    chosen = tl.load(target + rows, mask=rows < num_rows, other=ignore_index)
    # A block of ignored rows, such as a prompt, skips its product and stores its zeros.
    depth = tl.where(tl.max((chosen != ignore_index).to(tl.int32), axis=0) == 1, hidden_size, 0)
    logits = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    for start in range(0, depth, BLOCK_H):
        a = load_block(
            hidden, first_row, start, num_rows, hidden_size, stride_hidden, BLOCK_T, BLOCK_H, IS_TMA
        )
        b = load_block(
            weight, first, start, num_entries, hidden_size, stride_weight, BLOCK_V, BLOCK_H, IS_TMA
        )
        logits = tl.dot(a, b.T, logits, input_precision=PRECISION)

    # Loaded again rather than held through the loop, which has no register to spare.
    chosen = tl.load(target + rows, mask=rows < num_rows, other=ignore_index)
    is_ignored = chosen == ignore_index
    local_target = shard_column(chosen, vocab_start, num_entries, is_ignored)
    tile = first // TILE
    tl.static_assert(BLOCK_V == TILE or BLOCK_V == 2 * TILE)
    if BLOCK_V == TILE:
        _finish_tile(
            logits, tile, rows, local_target, is_ignored, tile_lse, tile_mean, target_logit, kept,
            num_rows, num_entries, stride_kept, inverse_temperature, ENTROPY, KEEP,
        )  # fmt: skip
    else:
        left, right = split_tiles(logits, BLOCK_T)
        _finish_tile(
            left, tile, rows, local_target, is_ignored, tile_lse, tile_mean, target_logit, kept,
            num_rows, num_entries, stride_kept, inverse_temperature, ENTROPY, KEEP,
        )  # fmt: skip
        _finish_tile(
            right, tile + 1, rows, local_target, is_ignored, tile_lse, tile_mean, target_logit,
            kept, num_rows, num_entries, stride_kept, inverse_temperature, ENTROPY, KEEP,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def finalise_kernel(
    tile_lse,  # [tiles, T]
    tile_mean,  # [tiles, T] if ENTROPY
    target,  # [T] int64
    lse,  # [T]
    mean_logit,  # [T] if ENTROPY
    num_rows,
    num_tiles,
    ignore_index,
    ENTROPY: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Merge the tiles of each row, BLOCK_N at a time in their order."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_row = rows < num_rows
    chosen = tl.load(target + rows, mask=is_row, other=ignore_index)
    rows = tl.minimum(rows, num_rows - 1)  # the padding repeats the last row and stores nothing
    tiles = tl.arange(0, BLOCK_N)
    first = tiles.to(tl.int64)[:, None] * num_rows + rows[None, :]
    step = tl.full((), BLOCK_N, tl.int64) * num_rows

    offsets = first
    tops = tl.full((BLOCK_N, BLOCK_T), float("-inf"), tl.float32)
    for start in range(0, num_tiles, BLOCK_N):
        is_inside = (start + tiles < num_tiles)[:, None]
        tops = tl.maximum(tops, tl.load(tile_lse + offsets, mask=is_inside, other=float("-inf")))
        offsets += step
    top = tl.max(tops, axis=0)

    offsets = first
    totals = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for start in range(0, num_tiles, BLOCK_N):
        is_inside = (start + tiles < num_tiles)[:, None]
        one = tl.load(tile_lse + offsets, mask=is_inside, other=float("-inf"))
        totals += tl.exp2((one - top[None, :]) * LOG2_E)
        offsets += step
    row_lse = top + LN_2 * tl.log2(tl.sum(totals, axis=0))
    is_ignored = chosen == ignore_index
    tl.store(lse + rows, tl.where(is_ignored, 0, row_lse), mask=is_row)

    if ENTROPY:
        offsets = first
        means = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for start in range(0, num_tiles, BLOCK_N):
            is_inside = (start + tiles < num_tiles)[:, None]
            one = tl.load(tile_lse + offsets, mask=is_inside, other=float("-inf"))
            mean = tl.load(tile_mean + offsets, mask=is_inside, other=0)
            share = tl.exp2((one - row_lse[None, :]) * LOG2_E)
            # Relative to the row's lse, so that large logits do not cancel in the entropy.
            means += share * (mean - row_lse[None, :])
            offsets += step
        row_mean = row_lse + tl.sum(means, axis=0)
        tl.store(mean_logit + rows, tl.where(is_ignored, 0, row_mean), mask=is_row)
