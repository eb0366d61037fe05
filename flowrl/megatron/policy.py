"""The policy spread over many ranks by Megatron-core, behind the interface of one process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flowrl.batch import Sample, pack, plan_micro_batches
from flowrl.interface import MicroBatchResult, Objective
from flowrl.megatron.collectives import sum_over_context_ranks
from flowrl.megatron.layout import (
    Layout,
    context_group,
    data_rank,
    data_size,
    is_last_stage,
    pipeline_group,
    tensor_group,
)
from flowrl.megatron.model import FlowModel
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.shard import ShardedBatch, padded_length, shard
from flowrl.megatron.step import Record, StepSettings, forward_step
from flowrl.megatron.weights import export_hf_weights
from flowrl.objectives.output import ObjectiveOutput
from flowrl.partition import Pooling


@dataclass
class MegatronPolicy:
    """A trainable policy. Every rank holds all samples, makes every call and gets every result.

    Replaces flowrl.policy.torch_policy.TorchPolicy; the partition network is part of the chunks.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronAdamW
    layout: Layout
    temperature: float
    max_tokens: int  # strict cap of the tokens that one rank has of a micro-batch
    pooling: Pooling
    detach_z: bool
    drop_mass: float

    def __post_init__(self) -> None:
        config = self.chunks[0].config
        config.finalize_model_grads_func = finalize_model_grads
        # Without it, overlapped reduction would start with the first micro-batch.
        no_sync = [chunk.no_sync for chunk in self.chunks]
        config.no_sync_func = (  # pyright: ignore[reportAttributeAccessIssue]
            no_sync if len(no_sync) > 1 else no_sync[0]
        )

    def _micro_batches(self, samples: Sequence[Sample]) -> tuple[list[ShardedBatch], int]:
        """This rank's micro-batches, as many on every rank, and how many all ranks fill."""
        cp, multiple = self.layout.context, self.layout.sequence_multiple
        plan = plan_micro_batches(
            [padded_length(s.num_tokens, multiple) for s in samples],
            padded_length(self.max_tokens * cp, multiple),
            num_ranks=data_size(),
            multiple=self.layout.pipeline if self.layout.virtual_pipeline > 1 else 1,
        )
        batches = []
        for members in plan[data_rank()]:
            batch = shard(
                samples,
                members,
                context_group().rank(),
                cp,
                multiple,
                self.pooling,
                torch.cuda.current_device(),  # the CPU where there is no GPU, see cpu.py
            )
            if cp > 1:
                batch.reduce_sums = partial(sum_over_context_ranks, group=context_group())
            batches.append(batch)
        return batches, sum(bool(members) for share in plan for members in share)

    def _run(
        self,
        chunks: Sequence[torch.nn.Module],
        samples: Sequence[Sample],
        objective: Objective | None,
    ) -> list[Record]:
        """Pass all micro-batches through the pipeline; the last stage's records, else none."""
        batches, num_filled = self._micro_batches(samples)
        if objective is not None:
            _set_dropout_seeds(batches)
        settings = StepSettings(self.temperature, self.detach_z, self.drop_mass)
        step = partial(forward_step, settings=settings, objective=objective, num_filled=num_filled)
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=1,  # unused: stages tell each other their shapes
            micro_batch_size=1,
            forward_only=objective is None,
        )

    def logprobs(
        self, samples: Sequence[Sample], chunks: Sequence[FlowModel] | None = None
    ) -> list[Tensor]:
        """Response log-probs [|y|] per sample, without gradient; `chunks` may be the reference."""
        modules = self.chunks if chunks is None else chunks
        for module in modules:
            module.eval()
        with torch.no_grad():
            records = self._run(modules, samples, None)
        tokens = _token_values(records, samples, self._dtype, 1)
        return list(tokens[0].split([len(s.response_ids) for s in samples]))

    def accumulate_gradients(
        self, samples: Sequence[Sample], objective: Objective
    ) -> list[MicroBatchResult]:
        """Leave the gradient of the objective over one mini-batch in the parameters' main_grad.

        What was there is cleared. The only result covers the mini-batch, in the order of samples.
        """
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.train()
        records = self._run(self.chunks, samples, objective)
        logprobs, entropy, dropped_mass = _token_values(records, samples, self._dtype, 3)
        output, log_z = _sequence_values(records, samples, self._dtype)
        batch = pack(samples)
        zeros = logprobs.new_zeros(len(batch.input_ids))
        return [
            MicroBatchResult(
                batch=batch,
                output=output,
                log_z=log_z,
                logprobs=zeros.masked_scatter(batch.response_mask, logprobs),
                entropy=zeros.masked_scatter(batch.response_mask, entropy),
                dropped_mass=dropped_mass if self.drop_mass > 0 else None,
            )
        ]

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights a rollout engine samples from, by HF name; collective."""
        for chunk in self.chunks:
            if chunk.ddp_config.overlap_param_gather:  # else the next forward pass brings them
                chunk.start_param_sync(force_sync=True)
        return export_hf_weights([cast(FlowModel, chunk.module) for chunk in self.chunks])

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.chunks[0].config.params_dtype, torch.float32)


def _set_dropout_seeds(batches: Sequence[ShardedBatch]) -> None:
    """Give each micro-batch a seed from rank 0's generator, the same on all ranks that share it.

    The ranks' own generators may have diverged: rank 0 samples the responses.
    """
    seed = torch.randint(2**31, (), device=torch.cuda.current_device())
    dist.broadcast(seed, src=0)
    for index, batch in enumerate(batches):
        batch.dropout_seed = int(seed) + index * data_size() + data_rank()


def _everywhere(values: Tensor) -> Tensor:
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


def _token_values(
    records: Sequence[Record], samples: Sequence[Sample], dtype: torch.dtype, num_rows: int
) -> Tensor:
    """Log-prob, entropy and dropped mass (the first num_rows) of all response tokens [rows, R]."""
    num_tokens = sum(len(s.response_ids) for s in samples)
    values = torch.zeros(num_rows, num_tokens, dtype=dtype, device=torch.cuda.current_device())
    for record in records:
        batch, tokens = record.batch, record.readout.tokens
        columns = [tokens.logprobs, tokens.entropy, tokens.dropped_mass]
        for row, column in zip(values, columns, strict=False):
            if column is not None:
                row[batch.response_slots] = column[batch.rows].to(dtype)
    if num_rows == 3:  # each shard of the vocabulary left out its own part
        dist.all_reduce(values[2], group=tensor_group())
    return _everywhere(values)


def _sequence_values(
    records: Sequence[Record], samples: Sequence[Sample], dtype: torch.dtype
) -> tuple[ObjectiveOutput, Tensor | None]:
    """The mini-batch's output and log Z [B].

    What the objective reports is known only where it ran: on the last stage, and there only on
    ranks with sequences.
    """
    filled = [(r.batch, r.readout.log_z, r.output) for r in records if r.output is not None]
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
        len(kinds) + 2, len(samples), dtype=dtype, device=torch.cuda.current_device()
    )
    if context_group().rank() == 0:  # all context-parallel ranks have the same
        for batch, log_z, output in filled:
            for row, diagnostic in zip(values, output.diagnostics.values(), strict=False):
                row[batch.members] = diagnostic.to(dtype)
            if log_z is not None:
                values[-2, batch.members] = log_z.to(dtype)
            values[-1, batch.members[0]] = output.loss_sum.to(dtype)
    values = _everywhere(values)
    diagnostics = {
        name: row.to(kind) for (name, kind), row in zip(kinds.items(), values, strict=False)
    }
    output = ObjectiveOutput(values[-1].sum(), normalizer, diagnostics)
    return output, values[-2] if has_log_z else None
