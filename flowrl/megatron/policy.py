"""The policy spread over many ranks by Megatron-core, behind the interface of one process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from flowrl.batch import Sample, pack
from flowrl.interface import MicroBatchResult, Objective
from flowrl.megatron.layout import Layout, data_rank, data_size, tensor_group
from flowrl.megatron.model import FlowModel
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.pipeline import (
    everywhere,
    micro_batches,
    prepare_training,
    run_pipeline,
    sequence_values,
)
from flowrl.megatron.shard import ShardedBatch
from flowrl.megatron.step import Record, StepSettings, forward_step
from flowrl.megatron.weights import export_hf_weights
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
    max_tokens: int  # cap of the tokens that one rank has of a micro-batch; see micro_batches
    pooling: Pooling
    detach_z: bool
    drop_mass: float
    memory_budget: int = 0  # bytes that the head may keep of a micro-batch

    def __post_init__(self) -> None:
        prepare_training(self.chunks)

    def _run(
        self,
        chunks: Sequence[torch.nn.Module],
        samples: Sequence[Sample],
        objective: Objective | None,
    ) -> list[Record]:
        """Pass all micro-batches through the pipeline; the last stage's records, else none."""
        batches, num_filled = micro_batches(samples, self.layout, self.max_tokens, self.pooling)
        if objective is not None:
            _set_dropout_seeds(batches)
        settings = StepSettings(self.temperature, self.detach_z, self.drop_mass, self.memory_budget)
        step = partial(forward_step, settings=settings, objective=objective, num_filled=num_filled)
        return run_pipeline(chunks, batches, step, is_forward_only=objective is None)

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
        filled = [(r.batch, r.readout.log_z, r.output) for r in records if r.output is not None]
        output, log_z = sequence_values(filled, len(samples), self._dtype)
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
    return everywhere(values)
