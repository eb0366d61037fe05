"""What each rank is given of a batch, and that nothing is lost or doubled."""

import pytest
import torch

from flowrl.batch import Sample
from flowrl.megatron.shard import padded_length, response_starts, shard, zigzag_positions

SIZES = [(1, 1), (1, 3), (2, 4), (2, 8), (4, 8)]  # context ranks, multiple of the padding


def make_samples() -> list[Sample]:
    """Lengths around the multiples of 4 and 8; an empty and a one-token response."""
    generator = torch.Generator().manual_seed(2)
    samples = []
    for number, (num_prompt, num_response) in enumerate([(3, 4), (1, 7), (5, 0), (9, 1), (2, 15)]):
        prompt, response = (
            torch.randint(1, 1000, (n,), generator=generator).tolist()
            for n in (num_prompt, num_response)
        )
        old, ref, rollout, advantages = torch.rand(4, num_response, generator=generator) + 0.1
        samples.append(
            Sample(
                prompt,
                response,
                rollout.tolist(),
                group_id=number // 2,
                reward=0.5 * number,
                old_logprobs=old,
                ref_logprobs=ref,
                advantages=advantages,
                vargrad_log_z=0.1 * number,
            )
        )
    return samples


@pytest.mark.parametrize(("size", "multiple"), SIZES, ids=str)
def test_chunks_are_dealt_early_and_late(size: int, multiple: int) -> None:
    length = 3 * multiple
    shares = [zigzag_positions(length, rank, size) for rank in range(size)]
    assert torch.cat(shares).sort().values.tolist() == list(range(length))
    if size > 1:  # the causal work of a rank is the sum of its positions
        assert len({int(share.sum()) for share in shares}) == 1


def test_padded_length() -> None:
    assert [padded_length(n, 8) for n in (0, 1, 8, 9)] == [0, 8, 8, 16]
    assert padded_length(7, 1) == 7


@pytest.mark.parametrize("pooling", ["all", "without_last"])
@pytest.mark.parametrize(("size", "multiple"), SIZES, ids=str)
def test_every_token_stands_on_one_rank(size: int, multiple: int, pooling) -> None:
    samples, members = make_samples(), [4, 0, 2, 1]
    shares = [shard(samples, members, rank, size, multiple, pooling) for rank in range(size)]
    for place, member in enumerate(members):
        sample = samples[member]
        tokens = torch.tensor(sample.prompt_ids + sample.response_ids)
        first = len(sample.prompt_ids)
        found = {}  # position -> (token, target, old, ref, rollout, advantage)
        num_pooled = 0
        for batch in shares:
            rows = slice(int(batch.cu_seqlens[place]), int(batch.cu_seqlens[place + 1]))
            assert rows.stop - rows.start == padded_length(len(tokens), multiple) // size
            assert batch.advantages is not None
            assert batch.old_logprobs is not None and batch.ref_logprobs is not None
            columns = (
                batch.input_ids,
                batch.target,
                batch.old_logprobs,
                batch.ref_logprobs,
                batch.rollout_logprobs,
                batch.advantages,
            )
            values = zip(*(column[rows].tolist() for column in columns), strict=True)
            found |= dict(zip(batch.position_ids[rows].tolist(), values, strict=True))
            pooled = batch.position_ids[rows][batch.prompt_mask[rows]]
            num_pooled += len(pooled)
            assert (pooled < first - (pooling == "without_last")).all()
            assert int(batch.num_prompt_tokens[place]) == first - (pooling == "without_last")
        assert len(found) == padded_length(len(tokens), multiple)
        assert num_pooled == first - (pooling == "without_last")
        for position, (token, target, *logprobs) in found.items():
            assert token == (tokens[position] if position < len(tokens) else 0)
            predicts = first - 1 <= position < len(tokens) - 1
            assert target == (tokens[position + 1] if predicts else -100)
            i = position + 1 - first
            expected = [0.0] * 4
            if predicts:
                expected = [
                    float(values[i])
                    for values in (
                        sample.old_logprobs,
                        sample.ref_logprobs,
                        torch.tensor(sample.rollout_logprobs),
                        sample.advantages,
                    )
                ]
            assert logprobs == expected


@pytest.mark.parametrize(("size", "multiple"), SIZES, ids=str)
def test_response_values_find_their_way_back(size: int, multiple: int) -> None:
    samples = make_samples()
    flat = torch.zeros(sum(len(s.response_ids) for s in samples))
    for members in ([3, 1], [4], [0, 2]):
        for rank in range(size):
            batch = shard(samples, members, rank, size, multiple)
            assert batch.old_logprobs is not None
            assert torch.equal(batch.loss_mask.nonzero()[:, 0], batch.rows)
            flat[batch.response_slots] += batch.old_logprobs[batch.rows]
    expected = torch.cat([s.old_logprobs for s in samples if s.old_logprobs is not None])
    assert torch.equal(flat, expected)
    assert response_starts(samples) == [0, 4, 11, 11, 12]


def test_per_sequence_values_keep_the_order_of_the_members() -> None:
    batch = shard(make_samples(), [4, 0, 2], 1, 2, 4)
    assert batch.num_sequences == 3 and batch.num_loss_tokens == 19
    assert batch.rewards.tolist() == [2.0, 0.0, 1.0]
    assert batch.group_ids.tolist() == [2, 0, 1]
    assert batch.vargrad_log_z.tolist() == pytest.approx([0.4, 0.0, 0.2])
    assert batch.padded_cu_seqlens.tolist() == [0, 20, 28, 36]
    assert batch.cu_seqlens.tolist() == [0, 10, 14, 18]
    assert batch.longest == 20


@pytest.mark.parametrize(("size", "multiple"), SIZES, ids=str)
def test_a_micro_batch_without_sequences_is_padding(size: int, multiple: int) -> None:
    batch = shard(make_samples(), [], size - 1, size, multiple)
    assert batch.num_sequences == 0 and batch.num_loss_tokens == 0
    assert len(batch.input_ids) == multiple // size
    assert batch.cu_seqlens.tolist() == [0, multiple // size]
    assert not batch.loss_mask.any() and not batch.prompt_mask.any()
    assert len(batch.rows) == 0 and (batch.target == -100).all()


def test_missing_logprobs_stay_missing_and_empty_prompts_are_refused() -> None:
    samples = make_samples()
    samples[1].old_logprobs = None
    assert shard(samples, [0, 1]).old_logprobs is None
    assert shard(samples, [0]).old_logprobs is not None
    samples[2].prompt_ids = []
    with pytest.raises(ValueError, match="empty prompt"):
        shard(samples, [0, 2])
