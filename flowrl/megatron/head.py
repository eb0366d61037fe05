"""Token log-probs when the vocabulary, and with sequence parallelism the tokens, are sharded.

One gather of four numbers per token is all that the forward exchanges, and one sum of the hidden
states' gradients all that the backward does; logits never exist, as in flowrl.kernels.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl.kernels.linear_logprob import kept_logits_buffer

IGNORE_INDEX = -100
# Of the rows, in the backward: while the gradients of one part's hidden states are summed over the
# ranks, the next part is computed. More parts would hide more and multiply smaller matrices.
PARTS = 2


def _operators(weight: Tensor):
    ops = torch.ops.flowrl
    # No other implementation takes float64, or a shard that got no entries.
    if weight.dtype == torch.float64 or weight.shape[0] == 0:
        return ops.linear_logprob_forward_reference, ops.linear_logprob_backward_reference
    return ops.linear_logprob_forward, ops.linear_logprob_backward


def _gather_rows(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    whole = shard.new_empty(shard.shape[0] * group.size(), *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    return whole


def merge_shards(partials: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge (lse, target_logit, mean_logit, is_here), [shards, 4, R], in the order of the shards.

    Returns lse, target_logit, mean_logit and whether the target is in any shard, each [R].
    """
    lse, target_logit, mean_logit, is_here = partials.unbind(1)
    total = torch.logsumexp(lse, dim=0)
    # Relative to the total, so that large logits do not cancel in the entropy. A shard without
    # entries has lse = -inf and no mean.
    share = (lse - total).exp()
    mean = total + torch.where(share > 0, share * (mean_logit - total), 0).sum(0)
    return total, target_logit.sum(0), mean, is_here.sum(0) > 0


class _VocabParallelLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        vocab_start: int,
        group: dist.ProcessGroup,
        entropy: bool,
        drop_mass: float,
        dropped_mass: Tensor | None,
        weight_grad: Tensor | None,
        sequence_parallel: bool,
        rows: Tensor,
        kept: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        # Compacted after the gather: each rank's share of the rows has another size.
        whole = _gather_rows(hidden, group) if sequence_parallel else hidden
        whole = whole[rows]
        wanted = target[rows]
        run_forward, _ = _operators(weight)
        lse, target_logit, mean_logit, tile_lse = run_forward(
            whole, weight, wanted, vocab_start, temperature, IGNORE_INDEX, entropy, kept
        )
        is_here = (wanted >= vocab_start) & (wanted < vocab_start + weight.shape[0])
        partials = torch.stack([lse, target_logit, mean_logit, is_here.to(lse.dtype)])
        lse, target_logit, mean_logit, is_found = merge_shards(_gather_rows(partials[None], group))
        if hidden.device.type == "cpu" and not bool(is_found.all()):
            row = int((~is_found).nonzero()[0])
            raise ValueError(
                f"target[{int(rows[row])}] is {int(wanted[row])}, in no shard of the vocabulary; "
                f"mark rows to skip with {IGNORE_INDEX}"
            )
        # On a GPU, where a look would wait for the device, the row and its gradients are NaN.
        lse = lse.masked_fill(~is_found, torch.nan)
        logprob = (target_logit - lse).clamp(max=0)
        ctx.save_for_backward(whole, weight, wanted, rows, lse, mean_logit, tile_lse, logprob, kept)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.vocab_start, ctx.group = temperature, vocab_start, group
        ctx.drop_mass, ctx.dropped_mass, ctx.weight_grad = drop_mass, dropped_mass, weight_grad
        ctx.sequence_parallel, ctx.shape = sequence_parallel, (len(target), hidden.shape[1])
        zeros = logprob.new_zeros(len(target))
        if not entropy:
            return zeros.index_copy(0, rows, logprob), None
        return (
            zeros.index_copy(0, rows, logprob),
            zeros.index_copy(0, rows, (lse - mean_logit).clamp(min=0)),
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, target, rows, lse, mean_logit, tile_lse, logprob, kept = ctx.saved_tensors
        _, run_backward = _operators(weight)
        grad_logprob = torch.zeros_like(lse) if grad_logprob is None else grad_logprob[rows]
        grad_entropy = None if grad_entropy is None else grad_entropy[rows]
        has_weight_grad, weight_grad = ctx.needs_input_grad[1], ctx.weight_grad
        if has_weight_grad and weight_grad is None:
            weight_grad = torch.zeros_like(weight, dtype=lse.dtype)
        dropped_mass: Tensor | None = ctx.dropped_mass
        if dropped_mass is not None:
            dropped_mass.zero_()

        num_ranks, num_rows = ctx.group.size(), ctx.shape[0]
        if ctx.sequence_parallel:  # parts of every rank's share of the rows
            place, num_places = rows % (num_rows // num_ranks), num_rows // num_ranks
        else:
            place, num_places = torch.arange(len(rows), device=rows.device), len(rows)
        num_parts = PARTS if num_ranks > 1 else 1
        borders = [num_places * part // num_parts for part in range(num_parts + 1)]
        reduced = lse.new_empty(num_places, hidden.shape[1])
        sums = []
        for first, end in pairwise(borders):
            # Rows without a gradient cost the operator nothing, so a part costs its own rows only.
            is_elsewhere = (place < first) | (place >= end)
            dropped = None if dropped_mass is None else torch.zeros_like(lse)
            grad_hidden, _ = run_backward(
                hidden,
                weight,
                target,
                ctx.vocab_start,
                ctx.temperature,
                lse,
                mean_logit,
                tile_lse,
                grad_logprob.masked_fill(is_elsewhere, 0),
                None if grad_entropy is None else grad_entropy.masked_fill(is_elsewhere, 0),
                ctx.drop_mass / num_ranks,  # the bound is the row's, over all shards
                logprob,
                IGNORE_INDEX,
                dropped,
                weight_grad,
                kept,
                has_weight_grad,
            )
            if dropped_mass is not None and dropped is not None:
                dropped_mass.index_add_(0, rows, dropped.to(dropped_mass.dtype))
            # Summed in float32 and rounded once after.
            part = reduced[first:end]
            if ctx.sequence_parallel:
                whole = grad_hidden.new_zeros(ctx.shape).index_copy_(0, rows, grad_hidden)
                whole = whole.view(num_ranks, num_places, -1)[:, first:end].flatten(0, 1)
                work = dist.reduce_scatter_tensor(part, whole, group=ctx.group, async_op=True)
            else:
                part.copy_(grad_hidden[first:end])
                work = dist.all_reduce(part, group=ctx.group, async_op=True)
            assert work is not None
            sums.append(work)
        for work in sums:
            work.wait()
        grad_hidden = reduced.to(hidden.dtype)
        if not ctx.sequence_parallel:
            grad_hidden = grad_hidden.new_zeros(ctx.shape).index_copy_(0, rows, grad_hidden)
        if ctx.weight_grad is not None:
            # Not none, because Megatron's data-parallel hooks wait for a gradient, and zero,
            # because they add it to main_grad where the weight is also the embedding's.
            weight_grad = torch.zeros_like(weight)
        return (
            grad_hidden,
            weight_grad.to(weight.dtype) if has_weight_grad else None,
            *(None,) * 11,
        )


def _check_buffer(
    name: str, buffer: Tensor | None, shape: tuple[int, ...], hidden: Tensor, remedy: str
) -> None:
    if buffer is None:
        return
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    is_wide = buffer.dtype in (torch.float32, dtype)
    if tuple(buffer.shape) != shape or buffer.device != hidden.device or not is_wide:
        raise ValueError(
            f"{name} must be {list(shape)}, {dtype}, on {hidden.device}; got "
            f"{list(buffer.shape)}, {buffer.dtype}, on {buffer.device}: {remedy}"
        )


def vocab_parallel_logprob(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    temperature: float,
    vocab_start: int,
    group: dist.ProcessGroup,
    *,
    entropy: bool = False,
    drop_mass: float = 0.0,
    memory_budget: int = 0,
    dropped_mass: Tensor | None = None,
    weight_grad: Tensor | None = None,
    sequence_parallel: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-prob of each target under softmax(hidden weight^T / temperature).

    flowrl.kernels.linear_logprob with the vocabulary spread over `group`: every rank gets the
    same values, the whole gradient of its `hidden` and the gradient of its `weight_shard`. It is
    right when all ranks compute the same loss from the result.

    Args:
        hidden: [T, H], the same on all ranks; with `sequence_parallel` the rank's [T / tp, H].
        weight_shard: [V_rank, H], consecutive entries from `vocab_start` on, in the order of the
            ranks; padding of the vocabulary must be cut off.
        target: [T] int64, -100 in rows to skip, which get logprob 0, entropy 0 and no gradient.
        temperature: divides the logits.
        group: the tensor-parallel ranks.
        entropy: also return the entropy.
        drop_mass: softmax mass that a row's backward may leave out, over all shards together.
        memory_budget: bytes that this rank may keep for the backward, as in linear_logprob.
        dropped_mass: [T] float32 buffer; the backward writes this shard's part, an upper bound.
        weight_grad: [V_rank, H] float32 buffer that the backward adds the weight's gradient to;
            autograd then receives zeros.
        rows: [R] int64, where `target` is not -100; None finds them, which on CUDA waits for the
            device.

    Returns:
        logprob [T], at most 0, and entropy [T] or None; float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes that do not fit, buffers of another dtype or device; on the CPU a target
            in no shard.
    """
    num_rows = hidden.shape[0] * (group.size() if sequence_parallel else 1)
    if hidden.ndim != 2 or target.shape != (num_rows,):
        raise ValueError(
            f"target must be [{num_rows}] for hidden of shape {tuple(hidden.shape)} on "
            f"{group.size()} ranks, sequence_parallel {sequence_parallel}; "
            f"got {tuple(target.shape)}"
        )
    if weight_shard.ndim != 2 or weight_shard.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight_shard must be [V_rank, {hidden.shape[1]}], got {tuple(weight_shard.shape)}"
        )
    _check_buffer("dropped_mass", dropped_mass, (num_rows,), hidden, "make one like this")
    _check_buffer(
        "weight_grad",
        weight_grad,
        tuple(weight_shard.shape),
        hidden,
        # In bfloat16 every addition would round, and small ones would be lost.
        "a main_grad is float32 with DistributedDataParallelConfig(grad_reduce_in_fp32=True)",
    )
    if rows is None:
        rows = (target != IGNORE_INDEX).nonzero()[:, 0]
    return _VocabParallelLogprob.apply(  # pyright: ignore[reportReturnType]
        hidden,
        weight_shard,
        target,
        float(temperature),
        vocab_start,
        group,
        entropy,
        float(drop_mass),
        dropped_mass,
        weight_grad,
        sequence_parallel,
        rows,
        kept_logits_buffer(hidden, weight_shard, len(rows), drop_mass, memory_budget),
    )
