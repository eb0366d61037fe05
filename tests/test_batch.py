"""Packing and micro-batch plans: hand cases, and properties over random ones."""

import random

import pytest
import torch

from flowrl.batch import Sample, pack, plan_micro_batches, response_values, sequence_cost


def sample(prompt: list[int], response: list[int], group: int = 0, **known: object) -> Sample:
    logprobs = [-0.5 * token for token in response]
    return Sample(prompt, response, logprobs, group, **known)  # pyright: ignore[reportArgumentType]


# Micro-batch plans


@pytest.mark.parametrize("seed", range(40))
def test_plan_keeps_every_promise(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(15):
        max_tokens = draw.randint(1, 300)
        shortest = draw.choice([1, max(1, max_tokens // 2), max_tokens])
        lengths = [draw.randint(shortest, max_tokens) for _ in range(draw.randint(1, 60))]
        num_ranks, multiple = draw.randint(1, 5), draw.randint(1, 4)
        group_ids = draw.choice([None, [draw.randint(0, 9) for _ in lengths]])
        plan = plan_micro_batches(lengths, max_tokens, num_ranks, multiple, group_ids)
        assert len(plan) == num_ranks
        assert len({len(rank) for rank in plan}) == 1
        assert len(plan[0]) % multiple == 0 and len(plan[0]) > 0
        batches = [members for rank in plan for members in rank]
        assert sorted(i for members in batches for i in members) == list(range(len(lengths)))
        assert max(sum(lengths[i] for i in members) for members in batches) <= max_tokens
        # First fit leaves no two bins that would fit into one, so it is within twice the optimum.
        fewest = -(-sum(lengths) // max_tokens)
        slots = num_ranks * multiple
        assert len(batches) < 2 * fewest + slots
        assert plan == plan_micro_batches(lengths, max_tokens, num_ranks, multiple, group_ids)
        for group in set(group_ids or ()):
            members = {i for i, other in enumerate(group_ids or ()) if other == group}
            homes = sum(not members.isdisjoint(batch) for batch in batches)
            assert homes == 1 or sum(lengths[i] for i in members) > max_tokens


def test_plan_keeps_groups_together_where_they_fit() -> None:
    # Groups of 9, 7 and 12 tokens under a cap of 10: the last is split into its sequences, 8 and 4.
    # In order of tokens: 9 | 8 | 7, and the 4 fits nowhere beside them, so a fourth bin.
    lengths, group_ids = [5, 3, 8, 4, 4, 4], [0, 1, 2, 0, 1, 2]
    plan = plan_micro_batches(lengths, 10, group_ids=group_ids)
    assert sorted(plan[0]) == [[0, 3], [1, 4], [2], [5]]


def test_plan_of_a_hand_case_is_balanced() -> None:
    # 8, 7, 6, 5, 4, 3 under a cap of 20: 33 tokens need two bins. By falling length onto the bin
    # that costs less: 8 | 7, then 6 beside 7, 5 beside 8, and of two bins of 13 tokens 7 + 6 costs
    # less than 8 + 5, so 4 joins it: 7 + 6 + 4 = 17 and 8 + 5 + 3 = 16.
    lengths = [3, 4, 5, 6, 7, 8]
    assert plan_micro_batches(lengths, 20) == [[[1, 3, 4], [0, 2, 5]]]
    assert plan_micro_batches(lengths, 20, num_ranks=2) == [[[1, 3, 4]], [[0, 2, 5]]]


def test_plan_falls_back_to_first_fit_where_spreading_breaks_the_cap() -> None:
    # Two bins of 10 hold 20 tokens exactly. Spreading reaches 4 + 3 + 2 | 4 + 3 + 2 and has no
    # room for the last 2; first fit gives 4 + 4 + 2 | 3 + 3 + 2 + 2.
    assert plan_micro_batches([4, 4, 3, 3, 2, 2, 2], 10) == [[[0, 1, 4], [2, 3, 5, 6]]]


def test_plan_of_equal_lengths_gives_every_rank_the_same_tokens() -> None:
    plan = plan_micro_batches([10] * 24, 40, num_ranks=3, multiple=2)
    assert [[len(members) for members in rank] for rank in plan] == [[4, 4]] * 3


def test_plan_balances_ranks_within_the_costliest_sequence() -> None:
    draw = random.Random(7)
    for _ in range(50):
        lengths = [draw.randint(50, 400) for _ in range(64)]
        plan = plan_micro_batches(lengths, 2000, num_ranks=4)
        cost = [sum(sequence_cost(lengths[i]) for m in rank for i in m) for rank in plan]
        assert max(cost) - min(cost) <= sequence_cost(max(lengths))


def test_plan_may_leave_micro_batches_empty() -> None:
    plan = plan_micro_batches([5], 10, num_ranks=2, multiple=2)
    assert plan == [[[0], []], [[], []]]


def test_plan_refuses_a_sequence_over_the_cap() -> None:
    with pytest.raises(ValueError, match=r"11 tokens exceeds the micro-batch cap of 10.*raise"):
        plan_micro_batches([3, 11], 10)


def test_cost_counts_attention() -> None:
    # (24 L H^2 + 4 L^2 H) / 4 H = L (6 H + L)
    assert sequence_cost(10, hidden_size=4) == 10 * (6 * 4 + 10)


# Packing


def test_pack_of_a_hand_case() -> None:
    samples = [
        sample([5, 6], [7], group=3, reward=0.5, vargrad_log_z=2.0),
        sample([8], [], group=4, reward=-1.0),
        sample([5, 6], [9, 7], group=3, reward=0.25),
        sample([5, 6, 7], [1], group=5),  # begins with the first one's tokens, yet is another
    ]
    batch = pack(samples)
    assert batch.num_sequences == 4
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 5, 6, 9, 7, 5, 6, 7, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    t, f = True, False
    assert batch.loss_mask.tolist() == [f, f, t, f, f, f, t, t, f, f, f, t]
    assert batch.prompt_mask.tolist() == [t, t, f, t, t, t, f, f, t, t, t, f]
    assert batch.last_prompt_token.tolist() == [1, 3, 5, 10]
    assert batch.trunk_rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9]
    assert batch.owns_row.tolist() == [t, t, t, t, f, f, t, t, t, t, t, t]
    assert batch.trunk_ids.tolist() == [5, 6, 7, 8, 9, 7, 5, 6, 7, 1]
    assert batch.trunk_positions.tolist() == [0, 1, 2, 0, 2, 3, 0, 1, 2, 3]
    assert batch.rollout_logprobs.tolist() == [0, 0, -3.5, 0, 0, 0, -4.5, -3.5, 0, 0, 0, -0.5]
    assert batch.old_logprobs is None and batch.ref_logprobs is None
    assert batch.rewards.tolist() == [0.5, -1.0, 0.25, 0.0]
    assert batch.group_ids.tolist() == [3, 4, 3, 5]
    assert batch.vargrad_log_z.tolist() == [2.0, 0.0, 0.0, 0.0]


def test_pack_shares_equal_prompts_across_groups_but_never_responses() -> None:
    batch = pack([sample([4], [5], group=0), sample([4], [5], group=1)])
    assert batch.trunk_rows.tolist() == [0, 1, 0, 2]
    assert batch.trunk_ids.tolist() == [4, 5, 5]


def test_every_trunk_row_holds_its_token() -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(9) for _ in range(draw.randint(1, 6))] for _ in range(4)]
    samples = [
        sample(draw.choice(prompts), [draw.randrange(9) for _ in range(draw.randint(0, 5))])
        for _ in range(30)
    ]
    batch = pack(samples)
    assert torch.equal(batch.trunk_ids[batch.trunk_rows], batch.input_ids)
    starts = batch.cu_seqlens[:-1].repeat_interleave(batch.cu_seqlens.diff())
    positions = torch.arange(len(batch.input_ids)) - starts
    assert torch.equal(batch.trunk_positions[batch.trunk_rows], positions)
    assert torch.equal(batch.trunk_rows[batch.owns_row], torch.arange(len(batch.trunk_ids)))
    num_prompt_rows = sum({tuple(s.prompt_ids): len(s.prompt_ids) for s in samples}.values())
    num_response_tokens = sum(len(s.response_ids) for s in samples)
    assert len(batch.trunk_ids) == num_prompt_rows + num_response_tokens


def test_response_values_undo_packing() -> None:
    known = [torch.tensor([-1.0, -2.0]), torch.empty(0), torch.tensor([-3.0])]
    samples = [
        sample([1, 2], [3, 4], old_logprobs=known[0], ref_logprobs=2 * known[0]),
        sample([1], [], old_logprobs=known[1], ref_logprobs=2 * known[1]),
        sample([1, 2, 3], [5], old_logprobs=known[2], ref_logprobs=2 * known[2]),
    ]
    batch = pack(samples)
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    for values, factor in ((batch.old_logprobs, 1), (batch.ref_logprobs, 2)):
        pieces = response_values(batch, values)
        assert [p.tolist() for p in pieces] == [(factor * k).tolist() for k in known]
    assert batch.old_logprobs[~batch.loss_mask].abs().max() == 0


def test_response_values_share_no_memory_with_the_batch() -> None:
    batch = pack([sample([1], [2, 3])])
    values = torch.tensor([0.0, -1.0, -2.0], requires_grad=True)
    (piece,) = response_values(batch, values)
    assert not piece.requires_grad
    piece.zero_()
    assert values.tolist() == [0.0, -1.0, -2.0]


def test_pack_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        pack([sample([1], [2]), sample([], [2])])
