"""What one context-parallel rank holds of a packed micro-batch, and the way back.

A sequence of n tokens is padded to a multiple of 2 cp (and of tp with sequence parallelism), cut
into 2 cp chunks, and rank r gets chunks r and 2 cp - 1 - r, so that causal attention costs every
rank the same. With cp = 1 the rank holds everything. Prompts are not shared.

Unlike flowrl.batch.PackedBatch, row i carries the log-prob of token i + 1, which the state of
token i gives: shifting comes before cutting, for the next token may lie on another rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.batch import Sample
from flowrl.megatron.head import IGNORE_INDEX
from flowrl.partition import Pooling


@dataclass
class ShardedBatch:
    """One rank's share. N local rows, B sequences, R of the rows with a response token to predict.

    A micro-batch without sequences holds one of padding, so that every rank runs the same passes:
    `members` is then empty and every mask false.
    """

    members: list[int]  # the sequences, as indices into the mini-batch
    input_ids: Tensor  # [N] int64
    position_ids: Tensor  # [N] int64, in their sequences
    padded_cu_seqlens: Tensor  # [B + 1] int32, borders of the padded sequences over all ranks
    longest: int  # of the padded sequences
    cu_seqlens: Tensor  # [B + 1] int32, borders of this rank's rows
    target: Tensor  # [N] int64, the next token; -100 where it is none of a response
    rows: Tensor  # [R] int64, where target is not -100
    response_slots: Tensor  # [R] int64, place among the response tokens of the mini-batch
    num_loss_tokens: int  # that count in the loss; of whole sequences, not of this rank's part
    prompt_mask: Tensor  # [N] bool, prompt tokens that Z reads
    num_prompt_tokens: Tensor  # [B] int64, of whole sequences
    loss_mask: Tensor  # [N] bool, those of `rows` that count in the loss
    rollout_logprobs: Tensor  # [N] float32, 0 outside `rows`
    old_logprobs: Tensor | None  # [N] likewise
    ref_logprobs: Tensor | None  # [N] likewise
    advantages: Tensor | None  # [N] likewise
    values: Tensor | None  # [N] likewise
    returns: Tensor | None  # [N] likewise
    token_weights: Tensor | None  # [N] likewise
    sequence_weights: Tensor  # [B]
    rewards: Tensor  # [B]
    group_ids: Tensor  # [B] int64
    vargrad_log_z: Tensor  # [B]
    # Adds the ranks' parts of per-sequence sums over tokens; None where a rank holds all tokens.
    reduce_sums: Callable[[Tensor], Tensor] | None = None
    dropout_seed: int = 0  # of Z

    @property
    def num_sequences(self) -> int:
        return len(self.members)


def padded_length(num_tokens: int, multiple: int) -> int:
    """The tokens that a sequence occupies."""
    return -(-num_tokens // multiple) * multiple


def zigzag_positions(length: int, rank: int, size: int) -> Tensor:
    """Positions [length / size] of a sequence that context-parallel rank `rank` holds."""
    if size == 1:
        return torch.arange(length)
    chunk = length // (2 * size)
    first, second = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])


def response_starts(samples: Sequence[Sample]) -> list[int]:
    """Where each response begins when all response tokens of a mini-batch stand in one row."""
    starts, total = [], 0
    for sample in samples:
        starts.append(total)
        total += len(sample.response_ids)
    return starts


def _row(values: Sequence[int] | Sequence[float] | Tensor, first: int, length: int) -> Tensor:
    row = torch.zeros(length)
    row[first : first + len(values)] = torch.as_tensor(values, dtype=torch.float32)
    return row


def _cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def shard(
    samples: Sequence[Sample],
    members: list[int],
    rank: int = 0,
    size: int = 1,
    multiple: int = 1,
    pooling: Pooling = "all",
    device: torch.device | str | int = "cpu",
) -> ShardedBatch:
    """Cut the sequences `members` of the mini-batch `samples` for one context-parallel rank.

    multiple: padding of each sequence; a multiple of 2 * size if size > 1.
    Raises ValueError for a sample without a prompt token.
    """
    assert size == 1 or multiple % (2 * size) == 0
    if any(len(samples[i].prompt_ids) == 0 for i in members):
        raise ValueError("a sample has an empty prompt; its first token would have no log-prob")
    starts = response_starts(samples)
    chosen = [samples[i] for i in members] or [Sample([0], [], [], group_id=-1)]
    lengths = [padded_length(s.num_tokens, multiple) for s in chosen]
    positions = [zigzag_positions(length, rank, size) for length in lengths]

    def joined(rows: list[Tensor]) -> Tensor:
        return torch.cat([row[held] for row, held in zip(rows, positions, strict=True)])

    def shifted(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in chosen]
        if any(value is None for value in values):
            return None
        return joined(
            [
                _row(value, len(s.prompt_ids) - 1, length)
                for s, value, length in zip(chosen, values, lengths, strict=True)
            ]
        )

    input_ids, targets, slots, prompts = [], [], [], []
    for index, sample, length in zip(members or [0], chosen, lengths, strict=True):
        num_prompt, num_response = len(sample.prompt_ids), len(sample.response_ids)
        tokens = torch.zeros(length, dtype=torch.int64)
        tokens[: sample.num_tokens] = torch.tensor(sample.prompt_ids + sample.response_ids)
        first = num_prompt - 1  # the row whose next token is the response's first
        target = torch.full((length,), IGNORE_INDEX)
        target[first : first + num_response] = tokens[num_prompt : sample.num_tokens]
        slot = torch.full((length,), -1)
        slot[first : first + num_response] = starts[index] + torch.arange(num_response)
        num_pooled = 0 if not members else num_prompt - (pooling == "without_last")
        input_ids.append(tokens)
        targets.append(target)
        slots.append(slot)
        prompts.append(torch.arange(length) < num_pooled)

    target = joined(targets)
    rows = (target != IGNORE_INDEX).nonzero()[:, 0]
    rollout_logprobs, kept_tokens = shifted("rollout_logprobs"), shifted("kept_tokens")
    assert rollout_logprobs is not None and kept_tokens is not None
    batch = ShardedBatch(
        members=members,
        input_ids=joined(input_ids),
        position_ids=torch.cat(positions),
        padded_cu_seqlens=_cumulated(lengths),
        longest=max(lengths),
        cu_seqlens=_cumulated([length // size for length in lengths]),
        target=target,
        rows=rows,
        response_slots=joined(slots)[rows],
        num_loss_tokens=sum(s.num_loss_tokens for s in chosen),
        prompt_mask=joined(prompts),
        num_prompt_tokens=torch.stack([p.sum() for p in prompts]),
        loss_mask=kept_tokens != 0,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=shifted("old_logprobs"),
        ref_logprobs=shifted("ref_logprobs"),
        advantages=shifted("advantages"),
        values=shifted("values"),
        returns=shifted("returns"),
        token_weights=shifted("token_weights"),
        sequence_weights=torch.tensor([s.sequence_weight for s in chosen]),
        rewards=torch.tensor([s.reward for s in chosen]),
        group_ids=torch.tensor([s.group_id for s in chosen]),
        vargrad_log_z=torch.tensor([s.vargrad_log_z for s in chosen]),
    )
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(device))
    return batch
