"""Importance weights and rejection against plain loops in float64, and their edge cases."""

import math

import pytest
import torch
from objective_samples import F64, each_dtype

from flowrl.objectives.correction import (
    LEVELS,
    effective_sample_size,
    kept_tokens,
    truncated_importance_weights,
)
from flowrl.objectives.flow_balance import flow_balance_loss

INF, NAN = math.inf, math.nan
each_level = pytest.mark.parametrize("level", LEVELS)


def batch(dtype=F64, lengths=(6, 0, 9, 1, 4, 300), seed=0):
    """(old [N], rollout [N], mask, cu_seqlens): prompts, holes, an empty and an all-masked one."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(lengths), generator=generator, dtype=F64) * 3
    rollout = old + 0.3 * torch.randn(sum(lengths), generator=generator, dtype=F64)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask[int(cu_seqlens[4]) : int(cu_seqlens[5])] = False
    return old.to(dtype), rollout.to(dtype), mask, cu_seqlens


def ratios(old, rollout, mask, cu_seqlens, level):
    """The ratio of every token by a loop, None under the mask."""
    expected: list[float | None] = [None] * len(mask)
    spans = zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    for start, end in spans:
        rows = [i for i in range(start, end) if mask[i]]
        logs = [old[i].item() - rollout[i].item() for i in rows]
        for i, log in zip(rows, logs, strict=True):
            total = {"token": log, "sequence": sum(logs), "geometric": sum(logs) / len(logs)}[level]
            expected[i] = math.exp(total)
    return expected


@each_dtype
@each_level
@pytest.mark.parametrize("seed", [0, 1])
def test_against_a_loop(dtype, level, seed):
    arguments = batch(dtype, seed=seed)
    weights = truncated_importance_weights(*arguments, level, threshold=1.2)
    kept = kept_tokens(*arguments, level, low=0.9, high=1.2)
    assert weights.dtype == dtype and kept.dtype == torch.bool
    expected = ratios(*arguments, level)
    bound = 1e-12 if dtype == F64 else 1e-6
    for ratio, weight, is_kept in zip(expected, weights.tolist(), kept.tolist(), strict=True):
        if ratio is None:
            assert weight == 0 and not is_kept
        else:
            assert weight == pytest.approx(min(ratio, 1.2), rel=bound)
            assert is_kept == (0.9 <= ratio <= 1.2)
    if level != "sequence":  # of 200 tokens the product is far out of both
        assert 0 < kept.sum() < arguments[2].sum()


def test_by_hand():
    # Sequence 1: ratios 2 and 1/4, product 1/2, geometric mean 1/sqrt(2). Sequence 2: ratio 3.
    old = torch.tensor([9.0, math.log(0.5), math.log(0.1), 9.0, math.log(0.6)], dtype=F64)
    rollout = torch.tensor([9.0, math.log(0.25), math.log(0.4), 9.0, math.log(0.2)], dtype=F64)
    mask, borders = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 3, 5], dtype=torch.int32)
    for level, expected in {
        "token": [0, 2, 0.25, 0, 3],
        "sequence": [0, 0.5, 0.5, 0, 3],
        "geometric": [0, 0.5**0.5, 0.5**0.5, 0, 3],
    }.items():
        arguments = (old, rollout, mask, borders, level)
        assert truncated_importance_weights(*arguments, INF).tolist() == pytest.approx(expected)
        capped = [min(x, 2.0) for x in expected]
        assert truncated_importance_weights(*arguments).tolist() == pytest.approx(capped)
    kept = kept_tokens(old, rollout, mask, borders, "token", 0.5, 5.0)
    assert kept.tolist() == [False, True, False, False, True]
    kept = kept_tokens(old, rollout, mask, borders, "geometric", 0.7, 2.0)
    assert kept.tolist() == [False, True, True, False, False]
    kept = kept_tokens(old, rollout, mask, borders, "sequence", 0.0, 2.0)
    assert kept.tolist() == [False, True, True, False, False]


@each_level
@pytest.mark.parametrize(
    ("old", "rollout", "ratio"),
    [
        (-1.0, -INF, None),  # the engine sampled what it gives no probability
        (-1.0, NAN, None),
        (NAN, -1.0, None),
        (INF, -1.0, None),
        (-INF, -INF, None),
        (-INF, -1.0, 0.0),  # the trainer gives it none
        (1e4, -1.0, INF),
        (-1e4, -1.0, 0.0),
    ],
)
def test_what_is_not_finite_has_weight_0_and_is_rejected(level, old, rollout, ratio):
    olds = torch.tensor([-1.0, old, -1.0, -1.0], dtype=F64)
    rollouts = torch.tensor([-1.0, rollout, -1.0, -1.0], dtype=F64)
    arguments = (olds, rollouts, torch.ones(4), torch.tensor([0, 3, 4]), level)
    weights = truncated_importance_weights(*arguments)
    kept = kept_tokens(*arguments)
    shares = level == "token"  # else the tokens of a sequence share its fate
    weight = 0.0 if ratio is None else min(ratio, 2.0)
    assert weights.tolist() == pytest.approx([1, weight, 1, 1] if shares else [weight] * 3 + [1])
    assert kept.tolist() == ([True, False, True, True] if shares else [False] * 3 + [True])


@each_level
def test_poison_under_the_mask_and_no_gradients(level):
    old, rollout, mask, cu_seqlens = batch()
    for function in (truncated_importance_weights, kept_tokens):
        clean = function(old.clone().requires_grad_(), rollout, mask, cu_seqlens, level)
        assert not clean.requires_grad
        for poison in (NAN, INF, -INF):
            dirty = [torch.where(mask, x, poison) for x in (old, rollout)]
            assert torch.equal(function(*dirty, mask, cu_seqlens, level), clean)


@each_level
def test_packing_does_not_matter_and_nothing_is_nothing(level):
    old, rollout, mask, cu_seqlens = batch()
    empty = torch.zeros(0, dtype=F64)
    for function in (truncated_importance_weights, kept_tokens):
        whole = function(old, rollout, mask, cu_seqlens, level)
        part = function(old[:15], rollout[:15], mask[:15], cu_seqlens[:4], level)
        assert torch.equal(part, whole[:15])
        assert function(empty, empty, empty, torch.tensor([0]), level).numel() == 0


def test_effective_sample_size():
    assert effective_sample_size(torch.full((7,), -900.0)) == pytest.approx(1.0)
    log_ratios = torch.tensor([800.0, -800.0, 0.0])  # one weight is all
    assert effective_sample_size(log_ratios) == pytest.approx(1 / 3)
    weights = torch.tensor([0.5, 1.0, 2.5], dtype=F64)
    assert effective_sample_size(weights.log()) == pytest.approx(16 / (3 * 7.5), rel=1e-12)
    assert effective_sample_size(torch.zeros(0)) == 0


def test_errors():
    old, rollout, mask, cu_seqlens = batch()
    tokens = (old, rollout, mask, cu_seqlens)
    cases = [
        (lambda: truncated_importance_weights(*tokens, "group"), "unknown level 'group': use one"),
        (lambda: truncated_importance_weights(*tokens, threshold=0.0), "threshold must be > 0"),
        (lambda: truncated_importance_weights(*tokens, threshold=NAN), "got nan"),
        (lambda: kept_tokens(*tokens, low=2.0, high=1.0), "low <= high .* got 2.0 and 1.0"),
        (lambda: kept_tokens(*tokens, low=0.0, high=0.0), "got 0.0 and 0.0"),
        (lambda: kept_tokens(*tokens, low=-1.0), "got -1.0"),
        (lambda: kept_tokens(old[1:], rollout, mask, cu_seqlens), "old_logprobs must have the"),
        (lambda: kept_tokens(old, rollout[1:], mask, cu_seqlens), "rollout_logprobs must have the"),
        (lambda: kept_tokens(old, rollout.float(), mask, cu_seqlens), "rollout_logprobs is torch"),
        (lambda: kept_tokens(old.half(), rollout.half(), mask, cu_seqlens), "float32 or float64"),
        (lambda: kept_tokens(old, rollout, mask, cu_seqlens[:-1]), "cu_seqlens must run from 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


# The weight of a sequence in FlowRL's loss


@each_dtype
def test_sequence_weights_scale_loss_and_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    cu_seqlens = torch.tensor([0, 4, 4, 9, 12])
    policy, old, ref = -3 * torch.rand(3, 12, generator=generator, dtype=F64).to(dtype)
    mask = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 1])
    rewards, log_z = torch.randn(2, 4, generator=generator, dtype=F64).to(dtype)
    weights = torch.tensor([0.5, 3.0, 0.0, 2.0], dtype=dtype, requires_grad=True)

    def run(sequence_weights, rows=None):
        inputs = policy.clone().requires_grad_(), log_z.clone().requires_grad_()
        out = flow_balance_loss(
            inputs[0], old, ref, mask, cu_seqlens, rewards, inputs[1], weighting="cap",
            sequence_weights=sequence_weights,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss_sum, inputs)
        return out, *grads

    plain, plain_policy, plain_z = run(None)
    out, grad_policy, grad_z = run(weights)
    factor = weights.detach()
    rtol = 1e-12 if dtype == F64 else 1e-6
    torch.testing.assert_close(out.diagnostics["loss"], factor * plain.diagnostics["loss"])
    torch.testing.assert_close(out.loss_sum, (factor * plain.diagnostics["loss"]).sum())
    torch.testing.assert_close(grad_z, factor * plain_z, rtol=rtol, atol=0)
    spread = factor.repeat_interleave(cu_seqlens.diff())
    torch.testing.assert_close(grad_policy, spread * plain_policy, rtol=rtol, atol=0)
    torch.testing.assert_close(out.weight, factor * plain.weight, rtol=rtol, atol=0)
    assert torch.equal(out.log_weight, plain.log_weight)
    ones, *gradients = run(torch.ones(4, dtype=dtype))
    assert torch.equal(ones.loss_sum, plain.loss_sum)
    assert torch.equal(gradients[0], plain_policy) and torch.equal(gradients[1], plain_z)


def test_sequence_weights_of_the_wrong_kind_are_refused():
    zeros = torch.zeros(2, dtype=F64)
    arguments = (zeros, zeros, zeros, torch.ones(2), torch.tensor([0, 1, 2]), zeros, zeros)
    with pytest.raises(ValueError, match=r"sequence_weights must have rewards' shape \[2\]"):
        flow_balance_loss(*arguments, sequence_weights=torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="sequence_weights is torch.float32"):
        flow_balance_loss(*arguments, sequence_weights=torch.ones(2))
