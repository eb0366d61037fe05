"""Forward and backward of `linear_logprob` in plain PyTorch: any device, any float dtype.

It defines what the other implementations must compute, and it is the oracle of their tests. Memory
is bounded like theirs: logits exist only as ROW_BLOCK x VOCAB_SLICE blocks in the promoted dtype
(float32, or float64 for float64 inputs), whatever T and V are.

Legend: T rows, H hidden size, V entries of this shard of the vocabulary; z logits divided by the
temperature; p = exp(z - lse); tile = TILE consecutive vocabulary entries of the shard.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.kernels.linear_logprob.checks import TILE, check_backward, check_inputs

# Measured on two CPU cores at H = 576, V = 49152: 64 to 128 rows x 1024 to 4096 columns run alike,
# 256 rows are slower. The small end keeps the block (0.5 MB) in the second-level cache.
ROW_BLOCK = 128
VOCAB_SLICE = 8 * TILE
ALIGNMENT = 16  # elements; 64 bytes in float32
# Finite, because exp(-inf) * -inf would be NaN in the mean logit of a padded tile.
PADDING_LOGIT = -1e30
# The forward promises logarithms within 1e-4 (of logits within 200); masses are raised by a little
# more than that, so that the dropped mass is an upper bound of the true one and still within the
# budget.
MASS_SLACK = 1 + 2**-13
# Floor of 1 - p_target in the budget: about what float32 resolves of a log-prob of a few tens.
MIN_TAIL = 2**-16


def forward(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    ignore_index: int = -100,
    entropy: bool = False,
    kept_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (lse [T], target_logit [T], mean_logit [T], tile_lse [T, tiles]) of one shard.

    Rows are processed in blocks of exactly ROW_BLOCK rows, the last one padded: matrix products
    and reductions then have shapes that do not depend on T, so neither do the bits of a row.
    """
    check_inputs(hidden, weight_shard, target, temperature)
    _refuse_kept_logits(kept_logits)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        rows = (target != ignore_index).nonzero().squeeze(1)
        num_rows = rows.numel()
        num_padding = -num_rows % ROW_BLOCK
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Whole blocks, tiles and vectors: with ragged edges or rows that start at odd addresses the
        # matrix product chooses its order of summation by the position of the row.
        hidden_padding = -hidden.shape[1] % ALIGNMENT
        scaled_hidden = hidden[rows].to(dtype) / temperature
        scaled_hidden = F.pad(scaled_hidden, (0, hidden_padding, 0, num_padding))
        local_target = F.pad(target[rows] - vocab_start, (0, num_padding), value=-1)

        num_tiles = -(-weight_shard.shape[0] // TILE)
        tile_lse = scaled_hidden.new_zeros(num_rows + num_padding, num_tiles)
        tile_mean = torch.zeros_like(tile_lse) if entropy else None
        target_logit = scaled_hidden.new_zeros(num_rows + num_padding)
        for start, weight in _vocab_slices(weight_shard, dtype):
            width = weight.shape[0]
            weight = F.pad(weight, (0, hidden_padding, 0, -width % TILE))
            tiles = slice(start // TILE, (start + weight.shape[0]) // TILE)
            for block in _row_blocks(scaled_hidden):
                logits = scaled_hidden[block] @ weight.t()
                logits[:, width:] = PADDING_LOGIT
                column, is_here = _target_column(local_target[block] - start, width)
                found = logits.gather(1, column).squeeze(1)
                target_logit[block] = torch.where(is_here, found, target_logit[block])
                lse, mean = _tile_statistics(logits, entropy)
                tile_lse[block, tiles] = lse
                if tile_mean is not None and mean is not None:
                    tile_mean[block, tiles] = mean

        lse = scaled_hidden.new_zeros(num_rows + num_padding)
        mean_logit = torch.zeros_like(lse)
        for block in _row_blocks(scaled_hidden):
            lse[block] = torch.logsumexp(tile_lse[block], dim=1)
            if tile_mean is not None:
                # Relative to lse, so that large logits do not cancel in the entropy.
                share = (tile_lse[block] - lse[block, None]).exp_()
                mean_logit[block] = lse[block] + (
                    share * (tile_mean[block] - lse[block, None])
                ).sum(1)
        return (
            _scatter_rows(lse[:num_rows], rows, hidden.shape[0]),
            _scatter_rows(target_logit[:num_rows], rows, hidden.shape[0]),
            _scatter_rows(mean_logit[:num_rows], rows, hidden.shape[0]),
            _scatter_rows(tile_lse[:num_rows], rows, hidden.shape[0]),
        )


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
) -> tuple[Tensor, Tensor]:
    """Return (grad_hidden [T, H], grad_weight [V, H] or [0, H]) of one shard.

    The gradient of the logits is g (1[v = y] - p_v) - g_e p_v (z_v - mean_logit), the second term
    being that of the entropy: log p_v + entropy = z_v - mean_logit. The tiles that `drop_mass`
    leaves out are zeroed after a dense computation: an oracle of the rule, not a faster path.
    """
    check_inputs(hidden, weight_shard, target, temperature)
    check_backward(
        *(hidden, weight_shard, lse, mean_logit, tile_lse, grad_logprob, grad_entropy),
        *(logprob, dropped_mass, weight_grad),
    )
    _refuse_kept_logits(kept_logits)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        has_gradient = grad_logprob != 0
        if grad_entropy is not None:
            has_gradient = has_gradient | (grad_entropy != 0)
        rows = (has_gradient & (target != ignore_index)).nonzero().squeeze(1)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scaled_hidden = hidden[rows].to(dtype) / temperature
        local_target = target[rows] - vocab_start
        lse, mean_logit, tile_lse = lse[rows], mean_logit[rows], tile_lse[rows]
        grad_logprob = grad_logprob[rows].to(dtype)
        grad_entropy = None if grad_entropy is None else grad_entropy[rows].to(dtype)

        keep = None
        if dropped_mass is not None:
            dropped_mass.zero_()
        if drop_mass > 0 and grad_entropy is None:
            keep, dropped = select_tiles(
                tile_lse, lse, None if logprob is None else logprob[rows], local_target, drop_mass
            )
            if dropped_mass is not None:
                dropped_mass[rows] = dropped.to(dropped_mass.dtype)

        grad_hidden = torch.zeros_like(scaled_hidden)
        has_result = needs_grad_weight and weight_grad is None
        grad_weight = scaled_hidden.new_zeros(
            weight_shard.shape[0] if has_result else 0,
            hidden.shape[1],
            dtype=grad_weight_dtype or dtype,
        )
        accumulator = grad_weight if has_result else weight_grad
        for start, weight in _vocab_slices(weight_shard, dtype):
            stop = start + weight.shape[0]
            grad_slice = None if accumulator is None else torch.zeros_like(weight)
            for block in _row_blocks(scaled_hidden):
                grad_logits = _grad_logits(
                    scaled_hidden[block] @ weight.t(),
                    lse[block],
                    mean_logit[block],
                    _target_column(local_target[block] - start, weight.shape[0]),
                    grad_logprob[block],
                    None if grad_entropy is None else grad_entropy[block],
                )
                if keep is not None:
                    is_kept = keep[block, start // TILE : -(-stop // TILE)]
                    is_kept = is_kept.repeat_interleave(TILE, dim=1)[:, : stop - start]
                    grad_logits.masked_fill_(~is_kept, 0)
                grad_hidden[block].addmm_(grad_logits, weight, alpha=1 / temperature)
                if grad_slice is not None:
                    grad_slice.addmm_(grad_logits.t(), scaled_hidden[block])
            if accumulator is not None and grad_slice is not None:
                accumulator[start:stop].add_(grad_slice)
        return _scatter_rows(grad_hidden, rows, hidden.shape[0]), grad_weight


def select_tiles(
    tile_lse: Tensor, lse: Tensor, logprob: Tensor | None, local_target: Tensor, drop_mass: float
) -> tuple[Tensor, Tensor]:
    """Return (keep [T, tiles] bool, dropped [T]): per row the fewest tiles that the budget allows.

    budget = drop_mass * min(1, 8 max(1 - p_target, 2^-16)); a tile's mass is exp(tile_lse - lse).
    Dropping in order of mass leaves the fewest tiles. `dropped` bounds the mass left out from
    above and is within the budget. A row with NaN keeps every tile, because no comparison with NaN
    holds. Without `logprob`, 1 - p_target is replaced by a lower bound of it, the shard's mass
    outside the target's tile, which never drops more than the rule.
    """
    # The smallest normal number replaces a mass that underflows, to remain an upper bound.
    mass = (tile_lse - lse[:, None]).exp_().mul_(MASS_SLACK)
    mass = mass.clamp_(min=torch.finfo(mass.dtype).tiny)
    tile_ids = torch.arange(tile_lse.shape[1], device=tile_lse.device)
    is_target_tile = local_target[:, None].div(TILE, rounding_mode="floor") == tile_ids
    if logprob is None:
        tail = mass.masked_fill(is_target_tile, 0).sum(1) / MASS_SLACK
    else:
        tail = -torch.expm1(logprob.to(mass.dtype))
    budget = drop_mass * (8 * tail.clamp(min=MIN_TAIL)).clamp(max=1)
    ascending, order = mass.masked_fill(is_target_tile, torch.inf).sort(dim=1, stable=True)
    total = ascending.cumsum(dim=1)
    is_dropped = total <= budget[:, None]
    dropped = torch.where(is_dropped, total, 0).amax(1)
    keep = torch.empty_like(is_dropped).scatter_(1, order, ~is_dropped)
    return keep, dropped


def _refuse_kept_logits(kept_logits: Tensor | None) -> None:
    if kept_logits is not None:
        raise ValueError(
            f"kept_logits is a buffer of shape {tuple(kept_logits.shape)}, but the reference "
            "implementation recomputes the logits; pass kept_logits=None"
        )


def _row_blocks(rows: Tensor) -> Iterator[slice]:
    for start in range(0, rows.shape[0], ROW_BLOCK):
        yield slice(start, start + ROW_BLOCK)


def _vocab_slices(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    # Upcasting a slice makes products of bf16 or fp16 numbers exact and their sums float32.
    for start in range(0, weight.shape[0], VOCAB_SLICE):
        yield start, weight[start : start + VOCAB_SLICE].to(dtype)


def _target_column(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    is_here = (column >= 0) & (column < width)
    return column.clamp(0, width - 1)[:, None], is_here


def _tile_statistics(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Return each tile's log-sum-exp and, if asked for, mean under softmax; uses up `logits`."""
    tiles = logits.view(logits.shape[0], -1, TILE)
    maximum = tiles.amax(dim=2)
    centred = tiles.sub_(maximum[:, :, None])
    exponential = centred.exp() if entropy else centred.exp_()
    total = exponential.sum(dim=2)
    lse = maximum + total.log()
    if not entropy:
        return lse, None
    return lse, maximum + exponential.mul_(centred).sum(dim=2) / total


def _grad_logits(
    logits: Tensor,
    lse: Tensor,
    mean_logit: Tensor,
    target_column: tuple[Tensor, Tensor],
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of the block of logits; uses up `logits` when the entropy has none."""
    if grad_entropy is None:
        centred, probability = None, logits.sub_(lse[:, None]).exp_()
    else:
        centred, probability = logits - mean_logit[:, None], (logits - lse[:, None]).exp_()
        centred.mul_(probability).mul_(grad_entropy[:, None])
    column, is_here = target_column
    # p_y - 1 before the product with g: subtracting g from g p_y would lose the small 1 - p_y.
    grad = probability.scatter_add_(1, column, -is_here.to(logits.dtype)[:, None])
    grad.mul_(-grad_logprob[:, None])
    return grad if centred is None else grad.sub_(centred)


def _scatter_rows(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    return values.new_zeros(num_rows, *values.shape[1:]).index_copy_(0, rows, values)
