"""A mini-batch through Megatron's pipeline schedule, whatever the last stage reads from its states.

Policy and critic differ in what `forward_step` does there; micro-batches, the schedule and the way
of the results back to every rank are here.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flowrl.batch import Sample, plan_micro_batches
from flowrl.megatron.collectives import sum_over_context_ranks
from flowrl.megatron.layout import (
    Layout,
    context_group,
    data_rank,
    data_size,
    is_last_stage,
    pipeline_group,
)
from flowrl.megatron.shard import ShardedBatch, padded_length, shard
from flowrl.objectives.output import ObjectiveOutput
from flowrl.partition import Pooling


def prepare_training(chunks: Sequence[DistributedDataParallel]) -> None:
    """Tell the schedule how the gradients of these chunks are finished."""
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    # Without it, overlapped reduction would start with the first micro-batch.
    no_sync = [chunk.no_sync for chunk in chunks]
    config.no_sync_func = (  # pyright: ignore[reportAttributeAccessIssue]
        no_sync if len(no_sync) > 1 else no_sync[0]
    )


def micro_batches(
    samples: Sequence[Sample], layout: Layout, max_tokens: int, pooling: Pooling = "all"
) -> tuple[list[ShardedBatch], int]:
    """This rank's micro-batches, as many on every rank, and how many all ranks fill.

    `max_tokens` caps the tokens that one rank has of a micro-batch. What all context-parallel ranks
    may have together is rounded up to the multiple that sequences are padded to, so that one of
    max_tokens * context tokens fits: up to (multiple - 1) / context tokens a rank more.
    """
    cp, multiple = layout.context, layout.sequence_multiple
    plan = plan_micro_batches(
        [padded_length(s.num_tokens, multiple) for s in samples],
        padded_length(max_tokens * cp, multiple),
        num_ranks=data_size(),
        multiple=layout.pipeline if layout.virtual_pipeline > 1 else 1,
    )
    batches = []
    for members in plan[data_rank()]:
        batch = shard(
            samples,
            members,
            context_group().rank(),
            cp,
            multiple,
            pooling,
            torch.cuda.current_device(),  # the CPU where there is no GPU, see cpu.py
        )
        if cp > 1:
            batch.reduce_sums = partial(sum_over_context_ranks, group=context_group())
        batches.append(batch)
    return batches, sum(bool(members) for share in plan for members in share)


def run_pipeline(
    chunks: Sequence[torch.nn.Module],
    batches: Sequence[ShardedBatch],
    forward_step: Callable[..., object],
    is_forward_only: bool,
) -> list[Any]:
    """Pass all micro-batches through the pipeline; the last stage's records, else none."""
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=1,  # unused: stages tell each other their shapes
        micro_batch_size=1,
        forward_only=is_forward_only,
    )


def everywhere(values: Tensor) -> Tensor:
    """Bring the last stage's values to all ranks, on the CPU.

    Every element was written on one rank and is zero on the others, so the sum is exact.
    """
    if is_last_stage():
        dist.all_reduce(
            values, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
    stages = pipeline_group()
    dist.broadcast(values, group=stages, group_src=stages.size() - 1)
    return values.cpu()


def sequence_values(
    filled: Sequence[tuple[ShardedBatch, Tensor | None, ObjectiveOutput]],
    num_sequences: int,
    dtype: torch.dtype,
) -> tuple[ObjectiveOutput, Tensor | None]:
    """The mini-batch's output and log Z [B] (None without Z), from this rank's micro-batches.

    What the objective reports is known only where it ran: on the last stage, and there only on
    ranks with sequences.
    """
    own = None
    if filled:
        _, log_z, output = filled[0]
        kinds = {name: values.dtype for name, values in output.diagnostics.items()}
        own = (kinds, log_z is not None, output.normalizer)
    reports: list[tuple | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, own)
    kinds, has_log_z, normalizer = next(report for report in reports if report is not None)
    # One row each, then log Z and, in the place of each micro-batch's first sequence, its loss.
    values = torch.zeros(
        len(kinds) + 2, num_sequences, dtype=dtype, device=torch.cuda.current_device()
    )
    if context_group().rank() == 0:  # all context-parallel ranks have the same
        for batch, log_z, output in filled:
            for row, diagnostic in zip(values, output.diagnostics.values(), strict=False):
                row[batch.members] = diagnostic.to(dtype)
            if log_z is not None:
                values[-2, batch.members] = log_z.to(dtype)
            values[-1, batch.members[0]] = output.loss_sum.to(dtype)
    values = everywhere(values)
    diagnostics = {
        name: row.to(kind) for (name, kind), row in zip(kinds.items(), values, strict=False)
    }
    output = ObjectiveOutput(values[-1].sum(), normalizer, diagnostics)
    return output, values[-2] if has_log_z else None
