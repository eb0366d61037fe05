"""Advantages of the baselines against plain loops, values by hand, and their edge cases."""

import math
import statistics

import pytest
import torch
from objective_samples import F64, each_dtype

from flowrl.objectives.advantages import (
    gae,
    group_center,
    masked_whiten,
    overlong_penalty,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    spread_to_tokens,
    token_rewards,
)
from flowrl.rewards import group_normalize


def _batch(dtype=F64, lengths=(6, 0, 9, 1, 4, 40), seed=0):
    """Return (values [N], rewards [N], mask, cu_seqlens): prompts, holes, and one empty mask."""
    generator = torch.Generator().manual_seed(seed)
    values, rewards = torch.randn(2, sum(lengths), generator=generator, dtype=F64)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask[int(cu_seqlens[4]) : int(cu_seqlens[5])] = False
    mask[cu_seqlens[1:4] - 1] = True
    return values.to(dtype), rewards.to(dtype), mask, cu_seqlens


def _kept(mask, cu_seqlens):
    """The positions of the mask's tokens, sequence by sequence."""
    spans = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    return [[i for i in range(start, end) if mask[i]] for start, end in spans]


def _tolerance(dtype):
    return {"rtol": 1e-12, "atol": 1e-13} if dtype == F64 else {"rtol": 1e-6, "atol": 1e-6}


@each_dtype
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("seed", [0, 1])
def test_gae_is_the_backward_recursion(dtype, gamma, lam, seed):
    values, rewards, mask, cu_seqlens = _batch(dtype, seed=seed)
    expected, expected_returns = torch.zeros_like(values), torch.zeros_like(values)
    for rows in _kept(mask, cu_seqlens):
        next_value, advantage = 0.0, 0.0
        for i in reversed(rows):
            value = values[i].item()
            delta = rewards[i].item() + gamma * next_value - value
            advantage = delta + gamma * lam * advantage
            next_value = value
            expected[i], expected_returns[i] = advantage, advantage + value
    advantages, returns = gae(values, rewards, mask, cu_seqlens, gamma, lam)
    assert advantages.dtype == returns.dtype == dtype
    torch.testing.assert_close(advantages, expected, **_tolerance(dtype))
    torch.testing.assert_close(returns, expected_returns, **_tolerance(dtype))


def test_gae_by_hand():
    # gamma = lam = 1/2; the masked token between the two is as if it were not there.
    values = torch.tensor([1.0, 99.0, 2.0], dtype=F64)
    rewards = torch.tensor([0.0, 99.0, 4.0], dtype=F64)
    mask, cu_seqlens = torch.tensor([1, 0, 1]), torch.tensor([0, 3])
    advantages, returns = gae(values, rewards, mask, cu_seqlens, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [0.0 + 0.5 * 2 - 1 + 0.25 * 2, 0.0, 2.0]
    assert returns.tolist() == [1.5, 0.0, 4.0]


def test_gae_with_gamma_and_lam_one_returns_the_reward_to_go():
    values, _, mask, cu_seqlens = _batch()
    scores = torch.tensor([1.0, 1.0, -1.0, 0.5, 1.0, 2.0], dtype=F64)
    rewards = token_rewards(scores, mask, cu_seqlens)
    _, returns = gae(values, rewards, mask, cu_seqlens)
    torch.testing.assert_close(returns, spread_to_tokens(scores, mask, cu_seqlens))


def test_gae_of_a_long_sequence():
    # 128k tokens of reward 1 and value 0: A_t is a geometric series.
    num_tokens, discount = 131072, 0.999
    ones = torch.ones(num_tokens, dtype=F64)
    advantages, _ = gae(0 * ones, ones, ones, torch.tensor([0, num_tokens]), 1.0, discount)
    left = torch.arange(num_tokens, 0, -1, dtype=F64)
    expected = (1 - discount**left) / (1 - discount)
    torch.testing.assert_close(advantages, expected, rtol=1e-12, atol=0)


@each_dtype
def test_whitening(dtype):
    values, _, mask, _ = _batch(dtype)
    white = masked_whiten(values, mask)
    kept = values[mask].tolist()
    root = math.sqrt(statistics.variance(kept) + 1e-8)
    expected = [(x - statistics.fmean(kept)) / root for x in kept]
    tolerance = _tolerance(dtype)
    torch.testing.assert_close(white[mask].tolist(), expected, **tolerance)
    assert white.dtype == dtype and white[~mask].count_nonzero() == 0


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([0, 0], [0.0, 0.0]), ([0, 1], [0.0, 0.0]), ([1, 1], [-math.sqrt(0.5), math.sqrt(0.5)])],
)
def test_whitening_of_few_tokens(mask, expected):
    white = masked_whiten(torch.tensor([1.0, 3.0], dtype=F64), torch.tensor(mask))
    assert white.tolist() == pytest.approx(expected, rel=1e-8)


def test_whitening_of_equal_values():
    assert masked_whiten(torch.full((3,), 0.1, dtype=F64), torch.ones(3)).abs().max() < 1e-9


@each_dtype
@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_token_rewards(dtype, kl_coef):
    old, ref, mask, cu_seqlens = _batch(dtype)
    scores = torch.tensor([1.0, 5.0, -1.0, 0.5, 7.0, 2.0], dtype=dtype)
    rewards = token_rewards(scores, mask, cu_seqlens, old, ref, kl_coef)
    expected = torch.zeros_like(old)
    for score, rows in zip(scores, _kept(mask, cu_seqlens), strict=True):
        for i in rows:
            expected[i] = -kl_coef * (old[i] - ref[i]) + (score if i == rows[-1] else 0)
    torch.testing.assert_close(rewards, expected, **_tolerance(dtype))
    assert rewards.dtype == dtype


@each_dtype
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp(dtype, gamma):
    _, rewards, mask, cu_seqlens = _batch(dtype)
    returns = torch.zeros(len(rewards), dtype=F64)
    for rows in _kept(mask, cu_seqlens):
        total = 0.0
        for i in reversed(rows):
            total = rewards[i].item() + gamma * total
            returns[i] = total
    kept = returns[mask]
    expected = torch.zeros_like(rewards)
    expected[mask] = ((kept - kept.mean()) / (kept.var() + 1e-8).sqrt()).to(dtype)
    advantages = reinforce_pp_advantages(rewards, mask, cu_seqlens, gamma)
    torch.testing.assert_close(advantages, expected, **_tolerance(dtype))


@each_dtype
def test_reinforce_pp_baseline_by_hand(dtype):
    # Group 4 has rewards 1 and 3 on two and one tokens, group 9 one reward of 2 on one token:
    # centred -1, -1, 1 and 2: mean 0.25, variance (2 * 1.5625 + 0.5625 + 3.0625) / 3 = 2.25.
    rewards = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    mask, cu_seqlens = torch.tensor([0, 1, 1, 1, 1]), torch.tensor([0, 3, 4, 5])
    advantages = reinforce_pp_baseline_advantages(
        rewards, torch.tensor([4, 9, 4]), mask, cu_seqlens
    )
    expected = [0.0, -1.25 / 1.5, -1.25 / 1.5, 1.75 / 1.5, 0.75 / 1.5]
    assert advantages.tolist() == pytest.approx(expected, rel=1e-6)
    assert advantages.dtype == dtype


def test_group_center():
    rewards = torch.tensor([0.1, 1.0, 0.1, 2.0, 0.1, 5.0], dtype=F64)
    ids = torch.tensor([3, -1, 3, -1, 3, 8])
    assert group_center(rewards, ids).tolist() == [0.0, -0.5, 0.0, 0.5, 0.0, 5.0]
    scaled = group_normalize(rewards, ids)
    std = math.sqrt(0.5)
    torch.testing.assert_close(scaled[[1, 3]], torch.tensor([-0.5, 0.5], dtype=F64) / (std + 1e-6))


def test_spread_to_tokens():
    spread = spread_to_tokens(
        torch.tensor([1.5, 2.5, -3.0]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 2, 2, 4])
    )
    assert spread.tolist() == [0.0, 1.5, -3.0, -3.0]


def test_overlong_penalty_is_the_soft_punishment():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 30000])
    penalty = overlong_penalty(lengths, 20480, 4096)
    assert penalty.tolist() == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, 20480, 4096, 0.5).tolist()[3:] == [-0.25, -0.5, -0.5]


def _every_token_function():
    scores = torch.tensor([1.0, 2.0, -1.0, 0.5, 1.0, 2.0], dtype=F64)
    return {
        "gae": lambda a, b, m, c: torch.stack(gae(a, b, m, c, 0.9, 0.8)),
        "token_rewards": lambda a, b, m, c: token_rewards(scores[: len(c) - 1], m, c, a, b, 0.1),
        "masked_whiten": lambda a, b, m, c: masked_whiten(a, m),
        "reinforce_pp": lambda a, b, m, c: reinforce_pp_advantages(a, m, c, 0.9),
    }


@pytest.mark.parametrize("name", _every_token_function())
def test_poison_under_the_mask_and_no_gradients(name):
    function = _every_token_function()[name]
    first, second, mask, cu_seqlens = _batch()
    clean = function(first.requires_grad_(), second.requires_grad_(), mask, cu_seqlens)
    assert not clean.requires_grad
    for poison in (math.nan, math.inf):
        dirty = [torch.where(mask, x, poison) for x in (first, second)]
        assert torch.equal(function(*dirty, mask, cu_seqlens), clean)


@pytest.mark.parametrize("name", _every_token_function())
def test_nothing_to_train_on(name):
    function = _every_token_function()[name]
    first, second, mask, cu_seqlens = _batch()
    result = function(first, second, torch.zeros_like(mask), cu_seqlens)
    assert result.shape[-1] == len(mask) and result.count_nonzero() == 0
    empty = torch.zeros(0, dtype=F64)
    result = function(empty, empty, empty, torch.tensor([0]))
    assert result.numel() == 0


@pytest.mark.parametrize("name", ["gae", "token_rewards"])
def test_packing_does_not_matter(name):
    function = _every_token_function()[name]
    first, second, mask, cu_seqlens = _batch()
    whole = function(first, second, mask, cu_seqlens)
    first, second, mask = first[:15], second[:15], mask[:15]
    part = function(first, second, mask, cu_seqlens[:4])
    assert torch.equal(part, whole[..., :15])


def test_errors():
    values, rewards, mask, cu_seqlens = _batch()
    tokens = len(mask)
    scores, ids = torch.zeros(6, dtype=F64), torch.zeros(6, dtype=torch.int64)
    cases = [
        (lambda: gae(values, rewards, mask, cu_seqlens, gamma=1.1), r"gamma must be .* got 1.1"),
        (lambda: gae(values, rewards, mask, cu_seqlens, lam=-0.1), r"lam must be .* got -0.1"),
        (lambda: gae(values[1:], rewards, mask, cu_seqlens), "values must have the mask's shape"),
        (lambda: gae(values, rewards.float(), mask, cu_seqlens), "rewards is torch.float32"),
        (lambda: gae(values.half(), rewards, mask, cu_seqlens), "float32 or float64, got"),
        (lambda: gae(values, rewards, mask, cu_seqlens[:-1]), f"number of tokens {tokens}"),
        (lambda: token_rewards(scores[1:], mask, cu_seqlens), r"scores must be .*\[6\]"),
        (lambda: token_rewards(scores, mask, cu_seqlens, kl_coef=0.1), "kl_coef is 0.1: give"),
        (
            lambda: token_rewards(scores, mask, cu_seqlens, values[1:], values, 0.1),
            "old_logprobs must have the mask's shape",
        ),
        (lambda: spread_to_tokens(ids, mask, cu_seqlens), "values must be floating point"),
        (lambda: group_center(scores, scores), "group_ids must be integers"),
        (lambda: group_center(scores, ids[1:]), r"group_ids must be integers of shape \[6\]"),
        (lambda: group_center(ids, ids), "rewards must be floating point"),
        (lambda: masked_whiten(values, mask[1:]), "loss_mask must have values' shape"),
        (lambda: reinforce_pp_advantages(values, mask, cu_seqlens, 2.0), "gamma must be"),
        (lambda: overlong_penalty(ids, 8, 9), r"max_response_length = 8\], got 9"),
        (lambda: overlong_penalty(ids, 8, 0), "got 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
