"""PPO's critic spread over many ranks, behind the interface of one process.

The value head [H -> 1] is the same on all ranks and reads the last stage's post-norm states, of
which every rank reads the rows that it holds. The factors of its gradient are those of step.py:

    tp  every rank computes the same loss of all values, so its gradient is whole already; under
        sequence parallelism values are gathered, backward passes each rank the rows it gave, and
        the head is marked so that Megatron adds its parts over tp
    cp  the objective adds sums over tokens, backward too; all ranks report the whole count
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from flowrl.batch import PackedBatch, Sample
from flowrl.interface import ValueObjective, normalizer_count
from flowrl.megatron.head import IGNORE_INDEX
from flowrl.megatron.layout import Layout
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
from flowrl.megatron.step import counted_loss, run_chunk
from flowrl.objectives.output import ObjectiveOutput


@dataclass
class ValueRecord:
    """What the last stage remembers of a micro-batch; `values` [N] hold no graph."""

    batch: ShardedBatch
    values: Tensor
    output: ObjectiveOutput | None  # None in a pass without objective


def read_values(model: FlowModel, hidden: Tensor, batch: ShardedBatch) -> Tensor:
    """Values [N] of a micro-batch from the last stage's states [n, 1, H]; 0 outside `rows`."""
    head = model.value_head
    assert head is not None
    values = head(hidden.squeeze(1).to(head.weight.dtype))[:, 0]
    if model.config.sequence_parallel:
        values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
    return values.masked_fill(batch.target == IGNORE_INDEX, 0)


def value_loss(
    batch: ShardedBatch, objective: ValueObjective | None, num_filled: int, values: Tensor
) -> tuple[Tensor, Tensor, ValueRecord]:
    """Megatron's (loss sum, count, anything) of one micro-batch."""
    output = None
    if objective is not None and batch.num_sequences > 0:
        output = objective(cast(PackedBatch, batch), values)
    loss, count, output = counted_loss(batch, output, num_filled, 0 * values.sum())
    return loss, count, ValueRecord(batch, values.detach(), output)


def value_step(
    batches: Iterator[ShardedBatch],
    model: torch.nn.Module,
    *,
    objective: ValueObjective | None,
    num_filled: int,
) -> tuple[object, Callable[[Tensor], tuple[Tensor, Tensor, ValueRecord]]]:
    """Megatron's forward_step_func of the critic."""
    batch, output = run_chunk(batches, model, read_values)
    return output, partial(value_loss, batch, objective, num_filled)


@dataclass
class MegatronCritic:
    """V(s) of the state in which a token is chosen. Every rank makes every call with all samples.

    Replaces flowrl.policy.critic.TorchCritic; the chunks are built with its value head.
    """

    chunks: list[DistributedDataParallel]
    optimizer: MegatronAdamW
    layout: Layout
    max_tokens: int  # cap of the tokens that one rank has of a micro-batch; see micro_batches

    def __post_init__(self) -> None:
        prepare_training(self.chunks)

    def _run(
        self, samples: Sequence[Sample], objective: ValueObjective | None
    ) -> list[ValueRecord]:
        batches, num_filled = micro_batches(samples, self.layout, self.max_tokens)
        step = partial(value_step, objective=objective, num_filled=num_filled)
        return run_pipeline(self.chunks, batches, step, is_forward_only=objective is None)

    @torch.no_grad()
    def set_values(self, samples: Sequence[Sample]) -> None:
        """Give every sample the values of its tokens, [|y|]; collective."""
        for chunk in self.chunks:
            chunk.eval()
        records = self._run(samples, None)
        lengths = [len(s.response_ids) for s in samples]
        values = torch.zeros(sum(lengths), dtype=self._dtype, device=torch.cuda.current_device())
        for record in records:
            values[record.batch.response_slots] = record.values[record.batch.rows]
        for sample, value in zip(samples, everywhere(values).split(lengths), strict=True):
            sample.values = value

    def accumulate_gradients(self, samples: Sequence[Sample], objective: ValueObjective) -> float:
        """Leave the gradient of the objective over one mini-batch in main_grad; return its loss.

        What was there is cleared. Collective.
        """
        self.optimizer.zero_grad()
        for chunk in self.chunks:
            chunk.train()
        records = self._run(samples, objective)
        filled = [(r.batch, None, r.output) for r in records if r.output is not None]
        output, _ = sequence_values(filled, len(samples), self._dtype)
        return float(output.loss_sum) / normalizer_count(output.normalizer, samples)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.chunks[0].config.params_dtype, torch.float32)


def critic_name(name: str) -> str:
    """The name in a checkpoint of one of the critic's parameters, as one process gives it.

    `model.*` of Hugging Face, of which it has the trunk alone, becomes `critic.*`, and
    `value_head.*` becomes `critic.head.*`.
    """
    if name.startswith("value_head."):
        return "critic.head." + name.removeprefix("value_head.")
    assert name.startswith("model."), name
    return "critic." + name.removeprefix("model.")
