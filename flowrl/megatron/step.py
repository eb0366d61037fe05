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


def loss_func(
    batch: ShardedBatch, objective: Objective | None, num_filled: int, readout: Readout
) -> tuple[Tensor, Tensor, Record]:
    """Megatron's (loss sum, count, anything) of one micro-batch.

    A micro-batch without sequences counts nothing, but its zero reaches every parameter, for
    which data-parallel reduction waits.
    """
    tokens, log_z = readout.tokens, readout.log_z
    output, count = None, 0
    if objective is None or batch.num_sequences == 0:
        loss = 0 * tokens.logprobs.sum()
        if log_z is not None:
            loss = loss + 0 * log_z.sum()
    else:
        # ShardedBatch has the fields of a PackedBatch that are not about the trunk.
        output = objective(cast(PackedBatch, batch), tokens, log_z)
        factor, count = reported_count(output.normalizer, batch, num_filled)
        loss = factor * output.loss_sum
        output = replace(output, loss_sum=output.loss_sum.detach())
    reported = torch.tensor(count, dtype=torch.int, device=loss.device)
    return loss, reported, Record(batch, _without_graph(readout), output)


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


def forward_step(
    batches: Iterator[ShardedBatch],
    model: torch.nn.Module,
    *,
    settings: StepSettings,
    objective: Objective | None,
    num_filled: int,
) -> tuple[object, Callable[[Readout], tuple[Tensor, Tensor, Record]]]:
    """Megatron's forward_step_func: run one chunk on the next micro-batch."""
    batch = next(batches)
    chunk = unwrap_model(model)
    assert isinstance(chunk, FlowModel)
    chunk.postprocess = partial(read_out, batch=batch, settings=settings)
    output = model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        attention_mask=None,
        packed_seq_params=packed_seq_params(batch),
    )
    return output, partial(loss_func, batch, objective, num_filled)
