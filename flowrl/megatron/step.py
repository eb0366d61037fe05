"""What Megatron's pipeline schedules call: the forward pass of a micro-batch and its loss.

The head, Z and the objective run inside the last stage, on its post-norm hidden states [n, H]:
this context-parallel rank's tokens, and of them this tensor-parallel rank's part under sequence
parallelism. Gradients come out right by these factors:

    head     sums its hidden gradient over tp; token sums are added over cp, backward too
    Z        reads states of its own, adds over tp with an identity as backward, over cp with a sum
    counts   each cp rank reports the whole count, so Megatron divides by cp times the true one,
             which is the number of ranks that repeat the loss
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import unwrap_model
from torch import Tensor

from flowrl.batch import PackedBatch
from flowrl.interface import Objective, TokenOutputs
from flowrl.kernels.segment_mean import segment_sum
from flowrl.megatron.collectives import sum_over_context_ranks, sum_over_tensor_ranks
from flowrl.megatron.layout import context_group, tensor_group
from flowrl.megatron.model import FlowModel
from flowrl.megatron.output_layer import output_layer_logprob
from flowrl.megatron.shard import ShardedBatch
from flowrl.objectives.output import Normalizer, ObjectiveOutput
from flowrl.partition import PartitionNetwork


@dataclass(frozen=True)
class StepSettings:
    """How the last stage reads its hidden states."""

    temperature: float
    detach_z: bool  # True: Z's gradient stops at its input
    drop_mass: float
    memory_budget: int = 0  # bytes that the head may keep of a micro-batch


@dataclass
class Readout:
    """The output of the last stage."""

    tokens: TokenOutputs
    log_z: Tensor | None  # [B]


@dataclass
class Record:
    """What the last stage remembers of a micro-batch; `readout` holds no graph."""

    batch: ShardedBatch
    readout: Readout
    output: ObjectiveOutput | None  # None in a pass without objective


def pool_prompts(hidden: Tensor, batch: ShardedBatch, is_sequence_parallel: bool) -> Tensor:
    """Mean of the prompts' states over all ranks: local rows [n, H] -> [B, H] float32."""
    group = tensor_group()
    num_rows = hidden.shape[0]
    first = group.rank() * num_rows if is_sequence_parallel else 0
    sums, _ = segment_sum(
        hidden,
        (batch.cu_seqlens - first).clamp(0, num_rows),
        batch.prompt_mask[first : first + num_rows],
    )
    if is_sequence_parallel:
        sums = sum_over_tensor_ranks(sums, group)
    if context_group().size() > 1:
        sums = sum_over_context_ranks(sums, context_group())
    return sums / batch.num_prompt_tokens.clamp(min=1)[:, None]


def read_out(
    model: FlowModel, hidden: Tensor, batch: ShardedBatch, settings: StepSettings
) -> Readout:
    """Log-probs, entropy and log Z of a micro-batch, from the last stage's states [n, 1, H].

    In a pass without gradient neither entropy nor Z is computed.
    """
    hidden = hidden.squeeze(1)
    is_training = torch.is_grad_enabled()
    is_sequence_parallel = model.config.sequence_parallel
    dropped_mass = None
    if is_training and settings.drop_mass > 0:
        dropped_mass = torch.zeros(len(batch.target), device=hidden.device)
    logprobs, entropy = output_layer_logprob(
        model,
        hidden,
        batch.target,
        settings.temperature,
        vocab_size=model.hf_config.vocab_size,
        entropy=is_training,
        drop_mass=settings.drop_mass,
        memory_budget=settings.memory_budget,
        dropped_mass=dropped_mass,
        rows=batch.rows,
    )
    log_z = None
    if is_training and model.partition is not None:
        states = hidden.detach() if settings.detach_z else hidden
        pooled = pool_prompts(states, batch, is_sequence_parallel)
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            torch.manual_seed(batch.dropout_seed)  # the same mask on ranks that repeat Z
            log_z = cast(PartitionNetwork, model.partition)(pooled)
    if entropy is None:
        entropy = torch.zeros_like(logprobs)
    return Readout(TokenOutputs(logprobs, entropy, hidden, dropped_mass), log_z)


def reported_count(
    normalizer: Normalizer, batch: ShardedBatch, num_filled: int
) -> tuple[float, int]:
    """(factor of the loss, count reported to Megatron) of a micro-batch that is not empty.

    Megatron divides the gradients by the sum of the counts over micro-batches, data-parallel and
    context-parallel ranks. A constant divisor is had by counting the micro-batches, of which all
    data-parallel ranks together fill `num_filled`.
    """
    if normalizer == "sequences":
        return 1.0, batch.num_sequences
    if normalizer == "tokens":
        return 1.0, batch.num_loss_tokens
    return num_filled / normalizer, 1


def _without_graph(readout: Readout) -> Readout:
    tokens = replace(
        readout.tokens,
        logprobs=readout.tokens.logprobs.detach(),
        entropy=readout.tokens.entropy.detach(),
        hidden=readout.tokens.hidden.new_empty(0),  # a view would keep the states alive
    )
    return Readout(tokens, None if readout.log_z is None else readout.log_z.detach())


def counted_loss(
    batch: ShardedBatch, output: ObjectiveOutput | None, num_filled: int, zero: Tensor
) -> tuple[Tensor, Tensor, ObjectiveOutput | None]:
    """Megatron's (loss sum, count) of one micro-batch, and its output without the graph.

    A micro-batch without an output counts nothing, but its `zero` reaches every parameter, for
    which data-parallel reduction waits.
    """
    loss, count = zero, 0
    if output is not None:
        factor, count = reported_count(output.normalizer, batch, num_filled)
        loss = factor * output.loss_sum
        output = replace(output, loss_sum=output.loss_sum.detach())
    return loss, torch.tensor(count, dtype=torch.int, device=loss.device), output


def loss_func(
    batch: ShardedBatch, objective: Objective | None, num_filled: int, readout: Readout
) -> tuple[Tensor, Tensor, Record]:
    """Megatron's (loss sum, count, anything) of one micro-batch."""
    tokens, log_z = readout.tokens, readout.log_z
    zero = 0 * tokens.logprobs.sum()
    if log_z is not None:
        zero = zero + 0 * log_z.sum()
    output = None
    if objective is not None and batch.num_sequences > 0:
        # ShardedBatch has the fields of a PackedBatch that are not about the trunk.
        output = objective(cast(PackedBatch, batch), tokens, log_z)
    loss, count, output = counted_loss(batch, output, num_filled, zero)
    return loss, count, Record(batch, _without_graph(readout), output)


def packed_seq_params(batch: ShardedBatch) -> PackedSeqParams:
    """Borders of the padded sequences for attention and rotary positions.

    Padding stands behind the tokens of its sequence, so causal attention never shows it to them.
    """
    borders = batch.padded_cu_seqlens
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        cu_seqlens_q_padded=borders,
        cu_seqlens_kv_padded=borders,
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
    )


def run_chunk(
    batches: Iterator[ShardedBatch], model: torch.nn.Module, read: Callable[..., object]
) -> tuple[ShardedBatch, object]:
    """Run one chunk on the next micro-batch, which is returned with the chunk's output.

    Of the last stage that is `read(chunk, hidden, batch=batch)` of its states [n, 1, H].
    """
    batch = next(batches)
    chunk = unwrap_model(model)
    assert isinstance(chunk, FlowModel)
    chunk.postprocess = partial(read, batch=batch)
    output = model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        packed_seq_params=packed_seq_params(batch),
    )
    return batch, output


def forward_step(
    batches: Iterator[ShardedBatch],
    model: torch.nn.Module,
    *,
    settings: StepSettings,
    objective: Objective | None,
    num_filled: int,
) -> tuple[object, Callable[[Readout], tuple[Tensor, Tensor, Record]]]:
    """Megatron's forward_step_func of the policy."""
    batch, output = run_chunk(batches, model, partial(read_out, settings=settings))
    return output, partial(loss_func, batch, objective, num_filled)
