"""The FlowRL objective against autograd of the written formula, and its edge cases."""

import math

import pytest
import torch

from flowrl.kernels import _native
from flowrl.kernels.flow_balance import WEIGHTINGS
from flowrl.objectives import OBJECTIVES
from flowrl.objectives.flow_balance import PRESETS, flow_balance_loss, vargrad_log_z

IMPLEMENTATIONS = [None, "reference"] + (["cpu"] if _native.load() else [])
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)
F64 = torch.float64


def _batch(dtype=F64, lengths=(6, 0, 9, 1, 4, 12), seed=0, spread=0.3):
    """Return the seven tensors of flow_balance_loss: leading zeros, holes and one empty mask."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_sequences = sum(lengths), len(lengths)

    def normal(n):
        return torch.randn(n, generator=generator, dtype=F64)

    policy = -normal(num_tokens).abs()
    old, ref = policy + spread * normal(num_tokens), policy + 0.3 * normal(num_tokens)
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    for b, length in enumerate(lengths):
        start = int(cu_seqlens[b])
        mask[start : start + length // 3] = False  # the prompt
        if b == 4:
            mask[start : start + length] = False
        elif length:
            mask[start + length - 1] = True
    rewards, log_z = normal(num_sequences), 0.5 * normal(num_sequences)
    floats = [x.to(dtype) for x in (policy, old, ref, rewards, log_z)]
    return floats[0], floats[1], floats[2], mask, cu_seqlens, floats[3], floats[4]


def _written_formula(
    policy, old, ref, mask, cu_seqlens, rewards, log_z,
    beta=15.0, weighting="clip", clip_low=0.2, clip_high=0.2, weight_cap=10.0,
):  # fmt: skip
    """Return (sum of w d^2, residuals, weights) in float64, sequence by sequence."""
    total, residuals, weights = torch.zeros((), dtype=F64), [], []
    for b in range(len(rewards)):
        span = slice(int(cu_seqlens[b]), int(cu_seqlens[b + 1]))
        p, o, r = (x[span][mask[span]].double() for x in (policy, old, ref))
        reward = rewards[b].double()
        if weighting == "cispo":
            ratio = (p - o).exp().detach()
            drop = (ratio > 1 + clip_high) if reward > 0 else (ratio < 1 - clip_low)
            p, o, r = (x[~drop] for x in (p, o, r))
        if len(p) == 0:
            residuals.append(0.0)
            weights.append(0.0)
            continue
        residual = log_z[b].double() + p.mean() - beta * reward - r.mean()
        raw = (p - o).sum().exp().detach()
        weight = {
            "clip": raw.clamp(1 - clip_low, 1 + clip_high),
            "cispo": raw.clamp(1 - clip_low, 1 + clip_high),
            "raw": raw,
            "cap": raw.clamp(max=weight_cap),
            "one": torch.ones_like(raw),
        }[weighting]
        total = total + weight * residual**2
        residuals.append(residual.item())
        weights.append(weight.item())
    return total, residuals, weights


@each_implementation
@each_dtype
@each_weighting
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_written_formula(implementation, dtype, weighting, seed):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch(dtype, seed=seed)
    policy.requires_grad_()
    log_z.requires_grad_()
    inputs = (policy, old, ref, mask, cu_seqlens, rewards, log_z)
    options = {"beta": 4.0, "weighting": weighting, "clip_low": 0.3, "clip_high": 0.25}
    total, residuals, weights = _written_formula(*inputs, **options)
    out = flow_balance_loss(*inputs, **options, implementation=implementation)
    truth = torch.autograd.grad(total, [policy, log_z])
    grads = torch.autograd.grad(out.loss_sum, [policy, log_z])
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-4, "atol": 1e-6}
    assert out.loss_sum.dtype == dtype
    torch.testing.assert_close(out.loss_sum.double(), total, **tolerance)
    torch.testing.assert_close(out.residual.tolist(), residuals, **tolerance)
    torch.testing.assert_close(out.weight.tolist(), weights, **tolerance)
    for grad, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, expected, **tolerance)
    assert grads[0][~mask].count_nonzero() == 0
    if weighting == "cispo":
        assert out.diagnostics["num_dropped_tokens"].sum() > 0


@each_implementation
@pytest.mark.parametrize("log_weight", [300.0, -300.0, 1e4, -1e4])
@each_weighting
def test_extreme_log_weights(implementation, weighting, log_weight):
    # Two sequences of four tokens, the first with the extreme weight spread over its tokens.
    policy = torch.full((8,), -1.0, dtype=F64, requires_grad=True)
    old = torch.cat([torch.full((4,), -1.0 - log_weight / 4), torch.full((4,), -1.0)]).to(F64)
    ref, mask = torch.full((8,), -2.0, dtype=F64), torch.ones(8)
    cu_seqlens = torch.tensor([0, 4, 8])
    rewards = torch.tensor([math.copysign(1.0, log_weight), 0.0], dtype=F64)
    log_z = torch.zeros(2, dtype=F64, requires_grad=True)
    out = flow_balance_loss(
        policy, old, ref, mask, cu_seqlens, rewards, log_z, weighting=weighting,
        implementation=implementation,
    )  # fmt: skip
    grad_policy, grad_log_z = torch.autograd.grad(out.loss_sum, [policy, log_z])

    d = 1.0 - 15.0 * math.copysign(1.0, log_weight)
    raw = math.exp(log_weight) if log_weight < 700 else math.inf
    weight = {
        "clip": 1.2 if log_weight > 0 else 0.8,
        "raw": raw if math.isfinite(raw) else 0.0,
        "cap": min(raw, 10.0),
        "one": 1.0,
        "cispo": 0.0,  # every token is dropped
    }[weighting]
    assert out.weight.tolist() == pytest.approx([weight, 1.0], rel=1e-12)
    assert out.residual.tolist() == [0.0 if weighting == "cispo" else d, 1.0]
    assert out.loss_sum.item() == pytest.approx(weight * d * d + 1.0, rel=1e-12)
    slope = 2 * weight * d
    assert grad_log_z.tolist() == pytest.approx([slope, 2.0], rel=1e-12)
    assert grad_policy.tolist() == pytest.approx([slope / 4] * 4 + [0.5] * 4, rel=1e-12)
    skipped = weighting == "raw" and log_weight == 1e4
    clipped = weighting == "clip" or (weighting == "cap" and log_weight > 0)
    assert out.diagnostics["skipped"].tolist() == [skipped, False]
    assert out.diagnostics["clipped"].tolist() == [clipped, False]
    assert out.diagnostics["num_tokens"].tolist() == [0 if weighting == "cispo" else 4, 4]
    assert out.diagnostics["num_dropped_tokens"].tolist() == [4 if weighting == "cispo" else 0, 0]


@each_implementation
@each_dtype
@each_weighting
def test_poison_under_the_mask(implementation, dtype, weighting):
    clean = _batch(dtype)
    mask = clean[3]
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(11)[: len(mask)]
    poisoned = tuple(torch.where(mask, x, poison) for x in clean[:3]) + clean[3:]
    runs = []
    for inputs in (clean, poisoned):
        policy, log_z = inputs[0].clone().requires_grad_(), inputs[6].clone().requires_grad_()
        out = flow_balance_loss(
            policy, *inputs[1:6], log_z, weighting=weighting, implementation=implementation
        )
        grads = torch.autograd.grad(out.loss_sum, [policy, log_z])
        runs.append((out.loss_sum.detach(), out.residual, out.weight, *grads))
    for expected, got in zip(*runs, strict=True):
        assert torch.equal(expected, got)


@each_implementation
@each_weighting
def test_nan_at_a_counted_token(implementation, weighting):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()
    token = int(mask[6:15].nonzero()[0]) + 6  # in the third sequence
    policy[token] = math.nan
    policy.requires_grad_()
    log_z.requires_grad_()
    out = flow_balance_loss(
        policy, old, ref, mask, cu_seqlens, rewards, log_z, weighting=weighting,
        implementation=implementation,
    )  # fmt: skip
    grads = torch.autograd.grad(out.loss_sum, [policy, log_z])
    # raw has a rule for it, skip and count; elsewhere it must show.
    is_raw = weighting == "raw"
    assert out.diagnostics["skipped"].tolist() == [False, False, is_raw, False, False, False]
    assert out.loss_sum.isnan().item() is not is_raw
    assert grads[1].isnan().tolist() == [False, False, not is_raw, False, False, False]
    if is_raw:
        assert out.diagnostics["loss"][2] == out.weight[2] == grads[1][2] == 0
        assert grads[0][6:15].count_nonzero() == 0 and grads[0].isfinite().all()


@each_implementation
def test_no_sequences_and_no_tokens(implementation):
    empty = torch.zeros(0, dtype=F64, requires_grad=True)
    index = torch.zeros(1, dtype=torch.int32)
    out = flow_balance_loss(
        empty, empty, empty, empty, index, empty, empty, implementation=implementation
    )
    assert out.loss_sum.item() == 0 and out.residual.shape == (0,)
    (grad,) = torch.autograd.grad(out.loss_sum, empty)
    assert grad.shape == (0,)
    # Three sequences without a token.
    policy = torch.zeros(0, requires_grad=True)
    log_z = torch.ones(3, requires_grad=True)
    out = flow_balance_loss(
        policy, policy, policy, policy, torch.zeros(4, dtype=torch.int64), torch.ones(3), log_z,
        implementation=implementation,
    )  # fmt: skip
    assert out.residual.tolist() == out.weight.tolist() == [0.0, 0.0, 0.0]
    assert torch.autograd.grad(out.loss_sum, log_z)[0].tolist() == [0.0, 0.0, 0.0]


@each_implementation
@each_weighting
def test_long_float32_sequence_against_float64(implementation, weighting):
    # Drift 1e-6 a token: log S = 0.13, the sum of 131,072 differences of 1e-4.
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(3, 131_072, generator=generator)
    policy = -noise[0].abs()
    old, ref = policy - 1e-6 + 1e-4 * noise[1], policy + 0.1 * noise[2]
    rest = torch.ones(131_072), torch.tensor([0, 131_072])
    rewards, log_z = torch.tensor([0.3]), torch.tensor([0.2])
    results = []
    for dtype in (F64, torch.float32):
        p, o, r, reward, z = (x.to(dtype) for x in (policy, old, ref, rewards, log_z))
        p.requires_grad_()
        z.requires_grad_()
        out = flow_balance_loss(
            p, o, r, *rest, reward, z, 1.0, weighting, implementation=implementation
        )
        grads = torch.autograd.grad(out.loss_sum, [p, z])
        results.append([out.loss_sum, out.residual, out.log_weight, out.weight, *grads])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=0)


@each_implementation
@each_weighting
def test_packing_order_does_not_matter(implementation, weighting):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch(torch.float32)
    order = [3, 0, 5, 4, 2, 1]
    spans = [torch.arange(int(cu_seqlens[b]), int(cu_seqlens[b + 1])) for b in order]
    rows = torch.cat(spans)
    cu_new = torch.tensor([0] + [len(span) for span in spans]).cumsum(0)
    policy.requires_grad_()
    options = {"weighting": weighting, "implementation": implementation}
    one = flow_balance_loss(policy, old, ref, mask, cu_seqlens, rewards, log_z, **options)
    two = flow_balance_loss(
        policy[rows], old[rows], ref[rows], mask[rows], cu_new, rewards[order], log_z[order],
        **options,
    )  # fmt: skip
    assert torch.equal(one.diagnostics["loss"][order], two.diagnostics["loss"])
    (grad_one,) = torch.autograd.grad(one.loss_sum, policy)
    (grad_two,) = torch.autograd.grad(two.loss_sum, policy)
    assert torch.equal(grad_one, grad_two)


@each_implementation
@each_weighting
def test_micro_batches_add_up(implementation, weighting):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()
    policy.requires_grad_()
    log_z.requires_grad_()
    options = {"weighting": weighting, "implementation": implementation}
    whole = flow_balance_loss(policy, old, ref, mask, cu_seqlens, rewards, log_z, **options)
    total = torch.zeros((), dtype=F64)
    for first, last in ((0, 2), (2, 3), (3, 6)):
        rows = slice(int(cu_seqlens[first]), int(cu_seqlens[last]))
        part = flow_balance_loss(
            policy[rows], old[rows], ref[rows], mask[rows],
            cu_seqlens[first : last + 1] - cu_seqlens[first], rewards[first:last],
            log_z[first:last], **options,
        )  # fmt: skip
        total = total + part.loss_sum
    torch.testing.assert_close(total, whole.loss_sum, rtol=1e-14, atol=0)
    for a, b in zip(
        torch.autograd.grad(total, [policy, log_z]),
        torch.autograd.grad(whole.loss_sum, [policy, log_z]),
        strict=True,
    ):
        assert torch.equal(a, b)


@each_implementation
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_mask_and_index_dtypes_and_strides(implementation, mask_dtype, index_dtype):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()
    expected = flow_balance_loss(policy, old, ref, mask, cu_seqlens, rewards, log_z)
    strided = [torch.stack([x, x.flip(0)], dim=1)[:, 0] for x in (policy, old, ref)]
    assert not strided[0].is_contiguous()
    out = flow_balance_loss(
        *strided, mask.to(mask_dtype), cu_seqlens.to(index_dtype), rewards, log_z,
        implementation=implementation,
    )  # fmt: skip
    torch.testing.assert_close(out.loss_sum, expected.loss_sum, rtol=1e-14, atol=0)


@each_implementation
@each_weighting
def test_only_policy_and_log_z_get_gradients(implementation, weighting):
    tensors = [x.requires_grad_() if x.is_floating_point() else x for x in _batch()]
    out = flow_balance_loss(*tensors, weighting=weighting, implementation=implementation)
    assert not any(x.requires_grad for x in out.diagnostics.values())
    out.loss_sum.backward()
    names = ("policy", "old", "ref", "mask", "cu_seqlens", "rewards", "log_z")
    got = {name for name, x in zip(names, tensors, strict=True) if x.grad is not None}
    assert got == {"policy", "log_z"}


@each_implementation
@each_weighting
def test_on_policy_the_old_log_probs_may_be_the_policy_itself(implementation, weighting):
    policy, _, ref, mask, cu_seqlens, rewards, log_z = _batch()
    policy.requires_grad_()
    options = {"weighting": weighting, "implementation": implementation}
    rest = (ref, mask, cu_seqlens, rewards, log_z)  # log_z is a constant here
    grads = []
    for old in (policy, policy.detach()):
        out = flow_balance_loss(policy, old, *rest, **options)
        grads.append(torch.autograd.grad(out.loss_sum, policy)[0])
        assert out.weight.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    assert torch.equal(*grads)
    total, _, _ = _written_formula(policy, policy.detach(), *rest)
    torch.testing.assert_close(grads[0], torch.autograd.grad(total, policy)[0])


@each_implementation
def test_log_z_alone_can_be_trained(implementation):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()
    log_z.requires_grad_()
    out = flow_balance_loss(
        policy, old, ref, mask, cu_seqlens, rewards, log_z, implementation=implementation
    )
    (grad,) = torch.autograd.grad(3.0 * out.loss_sum, log_z)
    torch.testing.assert_close(grad, 6.0 * out.weight * out.residual)


@each_implementation
@pytest.mark.parametrize("weighting", ["one", "clip"])
def test_gradcheck(implementation, weighting):
    # Old log-probs far away saturate the clip: the weight is a constant for differences too.
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()
    policy.requires_grad_()
    log_z.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p, z: flow_balance_loss(
            p, old - 3.0, ref, mask, cu_seqlens, rewards, z, 2.0, weighting,
            implementation=implementation,
        ).loss_sum,
        (policy, log_z),
    )  # fmt: skip


@pytest.mark.parametrize("weighting", ["clip", "cispo"])
def test_compiles_without_a_graph_break(weighting):
    policy, old, ref, mask, cu_seqlens, rewards, log_z = _batch()

    def loss_sum(p, z):
        return flow_balance_loss(
            p, old, ref, mask, cu_seqlens, rewards, z, weighting=weighting
        ).loss_sum

    compiled = torch.compile(loss_sum, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (loss_sum, compiled):
        p, z = policy.clone().requires_grad_(), log_z.clone().requires_grad_()
        loss = function(p, z)
        runs.append((loss, *torch.autograd.grad(loss, [p, z])))
    for eager, traced in zip(*runs, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_logprobs": torch.zeros(2, 5, dtype=F64)}, "packed to"),
        ({"policy_logprobs": torch.zeros(32, dtype=torch.bfloat16)}, "float32 or float64, got"),
        ({"old_logprobs": torch.zeros(31, dtype=F64)}, "old_logprobs must have .* got .31."),
        ({"ref_logprobs": torch.zeros(32)}, "ref_logprobs is torch.float32"),
        ({"rewards": torch.zeros(5, dtype=F64)}, r"rewards must have shape \[6\]"),
        ({"rewards": torch.zeros(6)}, "rewards is torch.float32"),
        ({"log_z": torch.zeros(6, 1, dtype=F64)}, "log_z must have shape"),
        ({"log_z": torch.zeros(6, dtype=torch.bfloat16)}, "log_z is torch.bfloat16"),
        ({"loss_mask": torch.ones(31)}, r"mask must have shape \[32\]"),
        ({"loss_mask": torch.full((32,), 2)}, "0 and 1 only, got 2"),
        ({"loss_mask": torch.full((32,), math.nan)}, "0 and 1 only, got nan"),
        ({"cu_seqlens": torch.tensor([1, 6, 6, 15, 16, 20, 32])}, "got 1 to 32"),
        ({"cu_seqlens": torch.tensor([0, 6, 6, 15, 16, 20, 31])}, "got 0 to 31"),
        ({"cu_seqlens": torch.tensor([0, 6, 5, 15, 16, 20, 32])}, "must not decrease"),
        ({"cu_seqlens": torch.tensor([0.0, 32.0])}, "int32 or int64"),
        ({"old_logprobs": torch.zeros(32, dtype=F64, device="meta")}, "on meta but"),
        ({"log_z": torch.zeros(6, dtype=F64, device="meta")}, "log_z is on meta"),
        ({"beta": -15.0}, "beta must be finite and >= 0, got -15.0"),
        ({"beta": math.inf}, "beta .* got inf"),
        ({"weighting": "ppo"}, "clip, raw, cap, one, cispo"),
        ({"clip_low": -0.1}, "clip_low"),
        ({"clip_high": math.inf}, "clip_high"),
        ({"weight_cap": -1.0}, "weight_cap must be finite and > 0, got -1.0"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_errors(change, message):
    names = ("policy_logprobs", "old_logprobs", "ref_logprobs", "loss_mask", "cu_seqlens",
             "rewards", "log_z")  # fmt: skip
    arguments = dict(zip(names, _batch(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        flow_balance_loss(**arguments)


def test_half_precision_is_refused_with_a_reason():
    tensors = [x.bfloat16() if x.is_floating_point() else x for x in _batch()]
    with pytest.raises(ValueError, match="must be float32 or float64, got torch.bfloat16"):
        flow_balance_loss(*tensors)


def test_presets():
    rows = {
        name: (p.weighting, p.clip_low, p.clip_high, p.pooling, p.z_dropout, p.detach_z)
        for name, p in PRESETS.items()
    }
    assert rows == {
        "paper": ("clip", 0.2, 0.2, "all", 0.0, True),
        "original": ("raw", 0.2, 0.2, "without_last", 0.1, False),
        "recipe": ("cap", 0.2, 0.2, "without_last", 0.1, False),
        "cispo": ("cispo", 0.2, 0.28, "without_last", 0.1, False),
    }
    assert PRESETS["recipe"].weight_cap == 10.0


def test_objectives_by_name():
    assert OBJECTIVES["flow_balance"] is flow_balance_loss


@each_dtype
def test_vargrad_by_hand(dtype):
    # Group 7 is rows 0 and 2: 2 * 1 - 0.5 = 1.5 and 2 * -1 - (-0.25) = -1.75, mean -0.125.
    # Group 3 is rows 1 and 3; row 3 has an empty mask, so row 1 decides: 2 * 0.5 - 1 = 0.
    # Group 9 is row 4, with an empty mask.
    old = torch.tensor([-1.0, -2.0, -1.0, -1.5, -0.5, -4.0, -4.0], dtype=dtype)
    ref = torch.tensor([-1.5, -2.5, -2.0, -1.25, -9.0, -9.0, -9.0], dtype=dtype)
    mask = torch.tensor([1, 1, 1, 1, 0, 0, 0])
    cu_seqlens = torch.tensor([0, 2, 3, 5, 6, 7])
    rewards = torch.tensor([1.0, 0.5, -1.0, 8.0, 2.0], dtype=dtype, requires_grad=True)
    ids = torch.tensor([7, 3, 7, 3, 9])
    log_z = vargrad_log_z(old, ref, mask, cu_seqlens, rewards, ids, beta=2.0)
    assert log_z.tolist() == [-0.125, 0.0, -0.125, 0.0, 0.0]
    assert log_z.dtype == dtype and not log_z.requires_grad


def test_vargrad_makes_on_policy_gradients_of_a_shared_log_z_vanish():
    policy, _, ref, mask, cu_seqlens, rewards, _ = _batch()
    ids = torch.tensor([5, 5, 2, 5, 2, 2])
    log_z = vargrad_log_z(policy, ref, mask, cu_seqlens, rewards, ids).requires_grad_()
    out = flow_balance_loss(policy, policy, ref, mask, cu_seqlens, rewards, log_z)
    (grad,) = torch.autograd.grad(out.loss_sum, log_z)
    assert grad.abs().max() > 1
    for group in (2, 5):
        assert abs(grad[ids == group].sum().item()) < 1e-12


def test_vargrad_leaves_out_what_an_empty_mask_does_not_define():
    """The reward of a sequence without tokens may be anything, NaN too."""
    policy, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5])
    rewards = torch.tensor([0.5, math.nan])
    log_z = vargrad_log_z(
        policy, ref, torch.tensor([1, 0]), torch.tensor([0, 1, 2]), rewards,
        torch.tensor([4, 4]), beta=2.0,
    )  # fmt: skip
    assert log_z.tolist() == [0.5, 0.5]  # 2 * 0.5 - 0.5


def test_vargrad_errors():
    policy, old, ref, mask, cu_seqlens, rewards, _ = _batch()
    good = (old, ref, mask, cu_seqlens, rewards)
    with pytest.raises(ValueError, match="group_ids must be integers"):
        vargrad_log_z(*good, torch.zeros(6))
    with pytest.raises(ValueError, match=r"group_ids must be integers of shape \[6\]"):
        vargrad_log_z(*good, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"group_ids must be integers .* got torch.bool"):
        vargrad_log_z(*good, torch.zeros(6, dtype=torch.bool))
    for beta in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"beta must be finite and >= 0, got {beta}"):
            vargrad_log_z(*good, torch.zeros(6, dtype=torch.int64), beta=beta)
    with pytest.raises(ValueError, match="ref_logprobs must have"):
        vargrad_log_z(old, ref[1:], mask, cu_seqlens, rewards, torch.zeros(6, dtype=torch.int64))
