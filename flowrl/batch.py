"""Packed batches: the only place that knows packing, masks and counts.

Sequences lie end to end in one row of N tokens; `cu_seqlens` holds their borders. A sequence is
never split over micro-batches, so a sequence-level loss needs no state between them.

The responses of a group share their prompt, so the trunk runs on U <= N rows in which a prompt
that several sequences of the batch begin with stands once: 3.5 times fewer for 8 answers of 4
tokens to a prompt of 18. Losses see the N tokens; `trunk_rows` leads from them to the U rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Sample:
    """One prompt with one response, and everything known about it."""

    prompt_ids: list[int]
    response_ids: list[int]
    rollout_logprobs: list[float]  # [|y|] of the distribution that was sampled from
    group_id: int
    is_truncated: bool = False  # the length limit ended it
    score: float = 0.0  # as the verifier gave it
    overlong_penalty: float = 0.0  # at most 0, added to the score before all else
    reward: float = 0.0  # group-normalised score
    old_logprobs: Tensor | None = None  # [|y|] float32
    ref_logprobs: Tensor | None = None  # [|y|] float32
    advantages: Tensor | None = None  # [|y|] float32, of the objectives that need one
    values: Tensor | None = None  # [|y|] float32, the critic's before its update
    returns: Tensor | None = None  # [|y|] float32, what the critic should have said
    vargrad_log_z: float = 0.0
    loss_mask: Tensor | None = None  # [|y|] bool, tokens that count in the loss; None: all
    token_weights: Tensor | None = None  # [|y|] float32, importance weights of a token's loss
    sequence_weight: float = 1.0  # the same for a loss of the whole response

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def shaped_score(self) -> float:
        """What advantages and normalised rewards are made of."""
        return self.score + self.overlong_penalty

    @property
    def kept_tokens(self) -> Tensor:
        """[|y|] bool, the loss mask."""
        if self.loss_mask is None:
            return torch.ones(len(self.response_ids), dtype=torch.bool)
        return self.loss_mask

    @property
    def num_loss_tokens(self) -> int:
        return len(self.response_ids) if self.loss_mask is None else int(self.loss_mask.sum())


@dataclass
class PackedBatch:
    """Sequences end to end. N tokens, B sequences, U rows of the trunk."""

    input_ids: Tensor  # [N] int64
    trunk_rows: Tensor  # [N] int64, the trunk row that holds each token's state
    owns_row: Tensor  # [N] bool, whether the row was made for this token and not shared
    trunk_ids: Tensor  # [U] int64, tokens of the trunk
    trunk_positions: Tensor  # [U] int64, their positions in their sequence
    cu_seqlens: Tensor  # [B + 1] int32
    response_mask: Tensor  # [N] bool, response tokens
    loss_mask: Tensor  # [N] bool, those of them that count in the loss
    prompt_mask: Tensor  # [N] bool, prompt tokens
    last_prompt_token: Tensor  # [B] int64, index into N
    rollout_logprobs: Tensor  # [N] float32, 0 outside responses
    old_logprobs: Tensor | None  # [N] float32, likewise
    ref_logprobs: Tensor | None  # [N] float32, likewise
    advantages: Tensor | None  # [N] float32, likewise
    values: Tensor | None  # [N] float32, likewise
    returns: Tensor | None  # [N] float32, likewise
    token_weights: Tensor | None  # [N] float32, likewise
    sequence_weights: Tensor  # [B] float32
    rewards: Tensor  # [B] float32, group-normalised
    group_ids: Tensor  # [B] int64
    vargrad_log_z: Tensor  # [B] float32
    # The all-reduce of per-sequence sums, for a batch that holds a part of each sequence.
    reduce_sums: Callable[[Tensor], Tensor] | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1


def _scatter(samples: Sequence[Sample], values: list[Tensor], num_tokens: int) -> Tensor:
    out = torch.zeros(num_tokens)
    start = 0
    for sample, value in zip(samples, values, strict=True):
        start += len(sample.prompt_ids)
        out[start : start + len(value)] = value
        start += len(value)
    return out


def _share_prompts(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Assign trunk rows in order of appearance: (row of each token [N], is it the first [N])."""
    rows: list[int] = []
    owns: list[bool] = []
    prompt_start: dict[tuple[int, ...], int] = {}
    num_rows = 0
    for sample in samples:
        prompt = tuple(sample.prompt_ids)
        is_new = prompt not in prompt_start
        start = prompt_start.setdefault(prompt, num_rows)
        rows += range(start, start + len(prompt))
        owns += [is_new] * len(prompt)
        num_rows += len(prompt) if is_new else 0
        rows += range(num_rows, num_rows + len(sample.response_ids))
        owns += [True] * len(sample.response_ids)
        num_rows += len(sample.response_ids)
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(owns, dtype=torch.bool)


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay samples end to end. Raises ValueError for a sample without a prompt token."""
    if any(len(s.prompt_ids) == 0 for s in samples):
        raise ValueError("a sample has an empty prompt; its first token would have no log-prob")
    for sample in samples:  # a shorter or longer list would shift all that follows
        assert len(sample.rollout_logprobs) == len(sample.response_ids)
    lengths = torch.tensor([s.num_tokens for s in samples], dtype=torch.int32)
    prompt_lengths = torch.tensor([len(s.prompt_ids) for s in samples], dtype=torch.int64)
    num_tokens = int(lengths.sum())
    cu_seqlens = torch.zeros(len(samples) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    starts = cu_seqlens[:-1].long()
    input_ids = torch.tensor(
        [t for s in samples for t in (*s.prompt_ids, *s.response_ids)], dtype=torch.int64
    )
    position_ids = torch.arange(num_tokens) - starts.repeat_interleave(lengths)
    prompt_mask = position_ids < prompt_lengths.repeat_interleave(lengths)
    trunk_rows, owns_row = _share_prompts(samples)

    def gather(name: str) -> Tensor | None:
        values = [getattr(s, name) for s in samples]
        return None if values[0] is None else _scatter(samples, values, num_tokens)

    batch = PackedBatch(
        input_ids=input_ids,
        trunk_rows=trunk_rows,
        owns_row=owns_row,
        trunk_ids=input_ids[owns_row],
        trunk_positions=position_ids[owns_row],
        cu_seqlens=cu_seqlens,
        response_mask=~prompt_mask,
        loss_mask=_scatter(samples, [s.kept_tokens for s in samples], num_tokens) != 0,
        prompt_mask=prompt_mask,
        last_prompt_token=starts + prompt_lengths - 1,
        rollout_logprobs=_scatter(
            samples, [torch.tensor(s.rollout_logprobs) for s in samples], num_tokens
        ),
        old_logprobs=gather("old_logprobs"),
        ref_logprobs=gather("ref_logprobs"),
        advantages=gather("advantages"),
        values=gather("values"),
        returns=gather("returns"),
        token_weights=gather("token_weights"),
        sequence_weights=torch.tensor([s.sequence_weight for s in samples]),
        rewards=torch.tensor([s.reward for s in samples]),
        group_ids=torch.tensor([s.group_id for s in samples]),
        vargrad_log_z=torch.tensor([s.vargrad_log_z for s in samples]),
    )
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(device))
    return batch


def response_values(batch: PackedBatch, values: Tensor) -> list[Tensor]:
    """Cut a per-token tensor [N] into one tensor [|y|] per sequence, on the CPU."""
    lengths = batch.cu_seqlens.diff().tolist()
    pieces = values.detach().cpu().split(lengths)
    masks = batch.response_mask.cpu().split(lengths)
    return [piece[mask].clone() for piece, mask in zip(pieces, masks, strict=True)]


def sequence_cost(num_tokens: int, hidden_size: int = 4096) -> int:
    """Relative training cost of one sequence: linear layers plus attention.

    A transformer layer costs about 24 L H^2 + 4 L^2 H FLOPs forward, so one token of a sequence
    of length L costs as much as 1 + L / (6 H) tokens of a short one.
    """
    return num_tokens * (6 * hidden_size + num_tokens)


def _first_fit(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in order:
        home = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if home is None:
            bins.append([])
            room.append(max_tokens)
            home = len(bins) - 1
        bins[home].append(i)
        room[home] -= lengths[i]
    return bins


def _units(
    lengths: Sequence[int], group_ids: Sequence[int] | None, max_tokens: int
) -> list[list[int]]:
    """What is placed as a whole: a group that fits a micro-batch, else each sequence."""
    if group_ids is None:
        return [[i] for i in range(len(lengths))]
    groups: dict[int, list[int]] = {}
    for i, group in enumerate(group_ids):
        groups.setdefault(group, []).append(i)
    units = []
    for members in groups.values():
        fits = sum(lengths[i] for i in members) <= max_tokens
        units += [members] if fits else [[i] for i in members]
    return units


def plan_micro_batches(
    lengths: Sequence[int],
    max_tokens: int,
    num_ranks: int = 1,
    multiple: int = 1,
    group_ids: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Assign sequences to micro-batches: `plan[rank][micro_batch]` lists sequence indices.

    No micro-batch exceeds `max_tokens`; no sequence is split; every rank gets the same number of
    micro-batches, a multiple of `multiple` (an interleaved pipeline needs that), with balanced
    cost. With `group_ids` a group that fits stays together, so that its prompt is shared. A
    micro-batch may be empty when there are fewer sequences than micro-batches. Deterministic.
    Raises ValueError for a sequence longer than the cap.
    """
    too_long = [n for n in lengths if n > max_tokens]
    if too_long:
        raise ValueError(
            f"a sequence of {max(too_long)} tokens exceeds the micro-batch cap of {max_tokens}; "
            "raise actor.ppo_max_token_len_per_gpu"
        )
    units = _units(lengths, group_ids, max_tokens)
    unit_tokens = [sum(lengths[i] for i in unit) for unit in units]
    unit_cost = [sum(sequence_cost(lengths[i]) for i in unit) for unit in units]
    order = sorted(range(len(units)), key=lambda u: (-unit_tokens[u], units[u]))
    slots = num_ranks * multiple
    num_bins = max(len(_first_fit(order, unit_tokens, max_tokens)), 1)
    num_bins = -(-num_bins // slots) * slots
    # Spread over the bins by cost; where that breaks the cap, fall back to first fit, which held.
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    tokens, cost = [0] * num_bins, [0] * num_bins
    for u in order:
        fitting = [b for b in range(num_bins) if tokens[b] + unit_tokens[u] <= max_tokens]
        if not fitting:
            bins = _first_fit(order, unit_tokens, max_tokens)
            bins += [[] for _ in range(num_bins - len(bins))]
            break
        lightest = min(fitting, key=lambda b: (cost[b], b))
        bins[lightest].append(u)
        tokens[lightest] += unit_tokens[u]
        cost[lightest] += unit_cost[u]
    bins.sort(key=lambda b: -sum(unit_cost[u] for u in b))
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for place, members in enumerate(bins):  # snake order keeps the ranks' totals close
        lap, rank = divmod(place, num_ranks)
        rank = rank if lap % 2 == 0 else num_ranks - 1 - rank
        plan[rank].append(sorted(i for u in members for i in units[u]))
    return plan


def micro_batches(
    samples: Sequence[Sample], max_tokens: int, device: torch.device
) -> Iterator[tuple[list[int], PackedBatch]]:
    """Yield the micro-batches of one process: (which samples, packed)."""
    plan = plan_micro_batches(
        [s.num_tokens for s in samples], max_tokens, group_ids=[s.group_id for s in samples]
    )
    for members in plan[0]:
        if members:
            yield members, pack([samples[i] for i in members], device)
