"""The two ops under the flow-balance objective: sums over tokens, residuals from the sums."""

import math
import os
import subprocess
import sys

import pytest
import torch

from flowrl.kernels import _native
from flowrl.kernels._packed import check_implementation
from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.flow_balance import (
    DROPPED,
    LOG_RATIO,
    NUM_COLUMNS,
    POLICY,
    REF,
    TOKENS,
    WEIGHTINGS,
    residual_from_sums,
    sequence_sums,
)

# None is what the dispatcher picks, with the registered backward; "reference" is plain autograd.
IMPLEMENTATIONS = [None, "reference"] + (["cpu"] if _native.load() else [])
IMPLEMENTATIONS += ["triton"] if IS_INTERPRETED else []
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
F64 = torch.float64


@pytest.fixture
def nan_filled_allocations():
    """Every torch.empty, in Python and in C++, starts as NaN (integers: the largest value)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _tokens(dtype=F64, lengths=(3, 0, 5, 1, 7), seed=0):
    """Return (policy, old, ref, mask, cu_seqlens, rewards) with holes in the mask."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)
    policy = -torch.rand(num_tokens, generator=generator, dtype=F64)
    old = policy + 0.4 * torch.randn(num_tokens, generator=generator, dtype=F64)
    ref = policy + 0.4 * torch.randn(num_tokens, generator=generator, dtype=F64)
    mask = torch.rand(num_tokens, generator=generator) < 0.7
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rewards = torch.randn(len(lengths), generator=generator, dtype=F64)
    return policy.to(dtype), old.to(dtype), ref.to(dtype), mask, cu_seqlens, rewards.to(dtype)


def _sums_by_hand(policy, old, ref, mask, cu_seqlens, rewards, weighting, clip_low, clip_high):
    rows = []
    for b in range(len(rewards)):
        row = [0.0] * NUM_COLUMNS
        for i in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])):
            if not mask[i]:
                continue
            log_ratio = policy[i].item() - old[i].item()
            ratio, reward = math.exp(log_ratio), rewards[b].item()
            too_far = (reward > 0 and ratio > 1 + clip_high) or (
                reward < 0 and ratio < 1 - clip_low
            )
            if weighting == "cispo" and too_far:
                row[DROPPED] += 1
                continue
            row[POLICY] += policy[i].item()
            row[REF] += ref[i].item()
            row[LOG_RATIO] += log_ratio
            row[TOKENS] += 1
        rows.append(row)
    return torch.tensor(rows, dtype=F64)


@each_implementation
@each_dtype
@pytest.mark.parametrize("weighting", ["clip", "cispo"])
def test_sums_match_a_loop(implementation, dtype, weighting):
    inputs = _tokens(dtype)
    sums = sequence_sums(*inputs, weighting, 0.2, 0.28, implementation)
    truth = _sums_by_hand(*inputs, weighting, 0.2, 0.28)
    assert sums.dtype == F64
    torch.testing.assert_close(sums, truth, rtol=1e-13, atol=1e-13)
    assert (truth[:, DROPPED].sum() > 0) == (weighting == "cispo")


@each_implementation
def test_cispo_drops_by_the_sign_of_the_reward(implementation):
    log_ratios = torch.tensor([1.5, 1.25, 1.0, 0.85, 0.7], dtype=F64).log()
    policy = torch.full((15,), -1.0, dtype=F64)
    old, ref = policy - log_ratios.repeat(3), policy * 2
    mask, cu_seqlens = torch.ones(15, dtype=torch.bool), torch.tensor([0, 5, 10, 15])
    rewards = torch.tensor([1.0, 0.0, -1.0], dtype=F64)
    policy.requires_grad_()
    sums = sequence_sums(
        policy, old, ref, mask, cu_seqlens, rewards, "cispo", 0.2, 0.28, implementation
    )
    assert sums[:, DROPPED].tolist() == [1, 0, 1]  # 1.5 with r > 0, none, 0.7 with r < 0
    assert sums[:, TOKENS].tolist() == [4, 5, 4]
    upstream = torch.tensor([2.0, 3.0, 4.0], dtype=F64)
    (grad,) = torch.autograd.grad(sums[:, POLICY], policy, upstream)
    assert grad.tolist() == [0, 2, 2, 2, 2] + [3] * 5 + [4, 4, 4, 4, 0]


@each_implementation
@pytest.mark.parametrize("weighting", ["clip", "cispo"])
def test_gradient_of_every_column(implementation, weighting):
    policy, *rest = _tokens()
    policy.requires_grad_()
    # 1e-6 steps do not carry a ratio of these data over a cispo bound.
    assert torch.autograd.gradcheck(
        lambda p: sequence_sums(p, *rest, weighting, 0.2, 0.2, implementation),
        policy,
        fast_mode=implementation == "triton",  # one random direction instead of every element
    )


@each_implementation
@each_dtype
@pytest.mark.parametrize("weighting", ["clip", "cispo"])
def test_nan_under_the_mask_does_no_harm(implementation, dtype, weighting):
    policy, old, ref, mask, cu_seqlens, rewards = _tokens(dtype)
    clean = sequence_sums(policy, old, ref, mask, cu_seqlens, rewards, weighting)
    poison = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype).repeat(6)[: len(mask)]
    policy, old, ref = (torch.where(mask, x, poison) for x in (policy, old, ref))
    policy.requires_grad_()
    sums = sequence_sums(
        policy, old, ref, mask, cu_seqlens, rewards, weighting, implementation=implementation
    )
    torch.testing.assert_close(sums, clean, rtol=0, atol=0)
    (grad,) = torch.autograd.grad(sums[:, POLICY].sum(), policy)
    assert grad[~mask].tolist() == [0.0] * int((~mask).sum())
    assert grad[mask].sum() == clean[:, TOKENS].sum()


@each_implementation
def test_nan_in_one_sequence_stays_there(implementation):
    policy, old, ref, _, cu_seqlens, rewards = _tokens()
    mask = torch.ones(len(policy), dtype=torch.bool)
    policy[4] = math.nan
    sums = sequence_sums(policy, old, ref, mask, cu_seqlens, rewards, implementation=implementation)
    assert sums.isnan().any(dim=1).tolist() == [False, False, True, False, False]


@each_implementation
@each_dtype
def test_sums_of_shards_give_the_loss_of_the_whole(implementation, dtype):
    policy, old, ref, mask, cu_seqlens, rewards = _tokens(dtype, lengths=(6, 4, 8))
    log_z = torch.tensor([0.3, -0.2, 0.1], dtype=dtype)
    options = {"weighting": "cispo", "implementation": implementation}

    def run(parts):
        p, z = policy.clone().requires_grad_(), log_z.clone().requires_grad_()
        sums = 0
        for rows in parts:
            lengths = torch.stack([(rows >= a) & (rows < b) for a, b in zip(
                cu_seqlens[:-1], cu_seqlens[1:], strict=True)]).sum(1)  # fmt: skip
            cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            sums = sums + sequence_sums(
                p[rows], old[rows], ref[rows], mask[rows], cu, rewards, **options
            )
        loss = residual_from_sums(sums, z, rewards, **options).loss
        return loss, *torch.autograd.grad(loss.sum(), [p, z])

    index = torch.arange(len(policy))
    whole, split = run([index]), run([index[index % 4 < 2], index[index % 4 >= 2]])
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12 if dtype == F64 else 1e-6, atol=0)


def _sums_row(policy=-6.0, ref=-8.0, log_ratio=0.1, tokens=4, dropped=0):
    return [policy, ref, log_ratio, tokens, dropped]


@each_implementation
@each_dtype
def test_residual_by_hand(implementation, dtype):
    # d = 0.25 - 1.5 - 15 * 0.5 + 2 = -6.75; S = exp(0.1); 2 w d / 4.
    sums = torch.tensor([_sums_row()], dtype=F64)
    log_z, rewards = torch.tensor([0.25], dtype=dtype), torch.tensor([0.5], dtype=dtype)
    out = residual_from_sums(sums, log_z, rewards, implementation=implementation)
    weight = math.exp(0.1)
    expected = [weight * 6.75**2, -6.75, 0.1, weight, -1.5, 2 * weight * -6.75 / 4]
    got = [x.item() for x in out[:6]]
    assert all(x.dtype == dtype for x in out[:6])
    assert got == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-14)
    assert not out.clipped.item() and not out.skipped.item()


@each_implementation
@each_dtype
@pytest.mark.parametrize(
    ("weighting", "log_weight", "weight", "clipped"),
    [
        ("clip", 1e4, 1.2, True),
        ("clip", -1e4, 0.8, True),
        ("clip", math.inf, 1.2, True),
        ("cispo", 300.0, 1.2, True),
        ("cispo", -300.0, 0.8, True),
        ("cap", 1e4, 10.0, True),
        ("cap", 300.0, 10.0, True),
        ("cap", -300.0, math.exp(-300), False),
        ("cap", -1e4, 0.0, False),
        ("raw", -1e4, 0.0, False),
        ("raw", 60.0, math.exp(60), False),
        ("one", 1e4, 1.0, False),
        ("one", math.nan, 1.0, False),
    ],
)
def test_weights_far_from_one(implementation, dtype, weighting, log_weight, weight, clipped):
    sums = torch.tensor([_sums_row(log_ratio=log_weight)], dtype=F64, requires_grad=True)
    log_z = torch.tensor([0.25], dtype=dtype, requires_grad=True)
    rewards = torch.tensor([0.5], dtype=dtype)
    out = residual_from_sums(
        sums, log_z, rewards, weighting=weighting, implementation=implementation
    )
    relative = 1e-6 if dtype == torch.float32 else 1e-12
    smallest = torch.finfo(dtype).tiny
    assert out.weight.item() == pytest.approx(weight, rel=relative, abs=smallest)
    assert out.loss.item() == pytest.approx(weight * 6.75**2, rel=relative, abs=smallest)
    assert (out.clipped.item(), out.skipped.item()) == (clipped, False)
    grad_sums, grad_log_z = torch.autograd.grad(out.loss.sum(), [sums, log_z])
    slope = 2 * weight * -6.75
    assert grad_log_z.item() == pytest.approx(slope, rel=relative, abs=smallest)
    assert grad_sums[0, POLICY].item() == pytest.approx(slope / 4, rel=relative, abs=smallest)
    assert grad_sums[0, REF:].tolist() == [0.0] * 4


@each_implementation
@pytest.mark.parametrize(
    ("dtype", "log_weight", "skipped"),
    [
        (torch.float32, 80.0, False),
        (torch.float32, 87.0, True),  # S is finite, S d^2 is not
        (torch.float32, 300.0, True),
        (torch.float32, math.inf, True),
        (torch.float32, math.nan, True),
        (F64, 300.0, False),
        (F64, 708.0, True),  # S is finite, S d^2 is not
        (F64, 1e4, True),
    ],
)
def test_raw_skips_a_non_finite_weight(implementation, dtype, log_weight, skipped):
    rows = [_sums_row(log_ratio=log_weight), _sums_row()]
    sums = torch.tensor(rows, dtype=F64, requires_grad=True)
    log_z = torch.tensor([0.25, 0.25], dtype=dtype, requires_grad=True)
    rewards = torch.tensor([0.5, 0.5], dtype=dtype)
    out = residual_from_sums(sums, log_z, rewards, weighting="raw", implementation=implementation)
    grad_sums, grad_log_z = torch.autograd.grad(out.loss.sum(), [sums, log_z])
    assert out.skipped.tolist() == [skipped, False]
    assert out.residual[0].item() == -6.75
    expected = 0.0 if skipped else math.exp(log_weight)
    assert out.weight[0].item() == pytest.approx(expected, rel=1e-5)
    assert out.loss[0].item() == pytest.approx(expected * 6.75**2, rel=1e-5)
    assert grad_log_z[0].item() == pytest.approx(expected * -13.5, rel=1e-5)
    assert grad_sums[0, POLICY].item() == pytest.approx(expected * -13.5 / 4, rel=1e-5)
    assert out.loss[1].item() == pytest.approx(math.exp(0.1) * 6.75**2, rel=1e-6)


@each_implementation
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_broken_log_z_is_not_hidden(implementation, weighting):
    sums = torch.tensor([_sums_row()], dtype=F64)
    log_z, rewards = torch.tensor([math.nan], dtype=F64), torch.tensor([0.5], dtype=F64)
    out = residual_from_sums(
        sums, log_z, rewards, weighting=weighting, implementation=implementation
    )
    assert math.isnan(out.loss.item()) and math.isnan(out.residual.item())
    assert not out.skipped.item()


@each_implementation
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_kept_token_gives_zero_everywhere(implementation, weighting):
    sums = torch.tensor([[0.0, 0, 0, 0, 3]], dtype=F64, requires_grad=True)
    log_z = torch.tensor([math.nan], dtype=F64, requires_grad=True)
    rewards = torch.tensor([0.5], dtype=F64)
    # A cap below 1 clips S = 1, which must not count as clipped here.
    out = residual_from_sums(
        sums, log_z, rewards, weighting=weighting, weight_cap=0.5, implementation=implementation
    )
    assert [x.item() for x in out] == [0.0] * 6 + [False, False]
    for grad in torch.autograd.grad(out.loss.sum(), [sums, log_z]):
        assert grad.count_nonzero() == 0


@each_implementation
def test_gradient_of_the_loss(implementation):
    # Weight `one` and a saturated clip: the weight does not move, so that differences see d only.
    rows = [_sums_row(), _sums_row(-1.0, -2.0, 0.2, 3), _sums_row(0, 0, 0, 0)]
    sums = torch.tensor(rows, dtype=F64)
    log_z = torch.tensor([0.3, -0.2, 0.5], dtype=F64, requires_grad=True)
    rewards = torch.tensor([0.1, -0.2, 1.0], dtype=F64)

    def loss(policy_sums, z, weighting, clip_high):
        columns = torch.cat([policy_sums[:, None], sums[:, 1:]], dim=1)
        return residual_from_sums(
            columns, z, rewards, 3.0, weighting, 0.2, clip_high, implementation=implementation
        ).loss

    policy_sums = sums[:, POLICY].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p, z: loss(p, z, "one", 0.2), (policy_sums, log_z))
    assert torch.autograd.gradcheck(lambda p, z: loss(p, z, "clip", 0.01), (policy_sums, log_z))


@each_dtype
@pytest.mark.parametrize("weighting", ["clip", "cispo"])
def test_opcheck(dtype, weighting):
    policy, old, ref, mask, cu_seqlens, rewards = _tokens(dtype)
    policy.requires_grad_()
    tokens = (policy, old, ref, mask, cu_seqlens, rewards, weighting, 0.2, 0.28)
    torch.library.opcheck(torch.ops.flowrl.sequence_sums.default, tokens)
    coefficient = torch.linspace(-1, 1, 5, dtype=F64)
    torch.library.opcheck(
        torch.ops.flowrl.sequence_sums_backward.default,
        (coefficient, policy.detach(), old, *tokens[3:]),
    )
    sums = torch.ops.flowrl.sequence_sums(*tokens).detach().requires_grad_()
    log_z = torch.linspace(-1, 1, 5, dtype=dtype).requires_grad_()
    torch.library.opcheck(
        torch.ops.flowrl.residual_from_sums.default,
        (sums, log_z, rewards, 15.0, weighting, 0.2, 0.28, 10.0),
    )


@each_implementation
def test_outputs_are_fully_written(implementation, nan_filled_allocations):
    policy, old, ref, mask, cu_seqlens, rewards = _tokens(torch.float32)
    policy.requires_grad_()
    sums = sequence_sums(
        policy, old, ref, mask, cu_seqlens, rewards, "cispo", implementation=implementation
    )
    out = residual_from_sums(
        sums, torch.zeros(5), rewards, weighting="cispo", implementation=implementation
    )
    (grad,) = torch.autograd.grad(out.loss.sum(), policy)
    assert all(x.isfinite().all() for x in (sums, *out, grad))
    assert grad[~mask].count_nonzero() == 0


@each_implementation
def test_bits_do_not_depend_on_threads_or_neighbours(implementation):
    lengths = (700, 1, 0, 4000, 33)
    inputs = _tokens(torch.float32, lengths)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = sequence_sums(*inputs, "cispo", implementation=implementation)
    torch.set_num_threads(3)
    three = sequence_sums(*inputs, "cispo", implementation=implementation)
    torch.set_num_threads(before)
    assert torch.equal(one, three)
    policy, old, ref, mask, cu_seqlens, rewards = inputs
    start, end = int(cu_seqlens[3]), int(cu_seqlens[4])
    alone = sequence_sums(
        policy[start:end], old[start:end], ref[start:end], mask[start:end],
        torch.tensor([0, end - start]), rewards[3:4], "cispo", implementation=implementation,
    )  # fmt: skip
    assert torch.equal(alone[0], one[3])


@each_implementation
def test_long_float32_sequence_against_float64(implementation):
    generator = torch.Generator().manual_seed(1)
    policy = -torch.rand(131_072, generator=generator)
    old = policy + 1e-4 * torch.randn(131_072, generator=generator)
    mask, cu_seqlens = torch.ones(131_072), torch.tensor([0, 131_072])
    sums = sequence_sums(
        policy, old, policy, mask, cu_seqlens, torch.ones(1), implementation=implementation
    )
    exact_policy = math.fsum(policy.tolist())
    exact_ratio = math.fsum((policy.double() - old.double()).tolist())
    assert sums[0, POLICY].item() == pytest.approx(exact_policy, rel=1e-12)
    assert sums[0, LOG_RATIO].item() == pytest.approx(exact_ratio, rel=1e-9)


def test_errors():
    policy, old, ref, mask, cu_seqlens, rewards = _tokens()
    good = (policy, old, ref, mask, cu_seqlens, rewards)
    sums = sequence_sums(*good)
    log_z = torch.zeros(5, dtype=F64)

    def refuses(message, call, *arguments, **options):
        with pytest.raises(ValueError, match=message):
            call(*arguments, **options)

    refuses("clip, raw, cap, one, cispo", sequence_sums, *good, weighting="sum")
    refuses("clip_low .* got 1.5", sequence_sums, *good, clip_low=1.5)
    refuses("clip_low .* got nan", sequence_sums, *good, clip_low=math.nan)
    refuses("clip_high .* got -0.1", sequence_sums, *good, clip_high=-0.1)
    refuses("implementation is 'gpu'", sequence_sums, *good, implementation="gpu")
    refuses(r"\[B, 5\]", residual_from_sums, sums[:4], log_z, rewards)
    refuses(r"\[B, 5\]", residual_from_sums, sums.float(), log_z, rewards)
    refuses("log_z must have shape", residual_from_sums, sums, log_z[:, None], rewards)
    refuses("log_z is torch.float32", residual_from_sums, sums, log_z.float(), rewards)
    refuses("beta .* got -1", residual_from_sums, sums, log_z, rewards, beta=-1.0)
    refuses("beta .* got nan", residual_from_sums, sums, log_z, rewards, beta=math.nan)
    refuses("weight_cap .* got 0", residual_from_sums, sums, log_z, rewards, weight_cap=0)
    refuses("unknown weighting", residual_from_sums, sums, log_z, rewards, weighting="Clip")


@pytest.mark.parametrize(("implementation", "device"), [("cpu", "cpu"), ("triton", "cuda")])
def test_an_explicit_implementation_never_falls_back(implementation, device):
    library = torch.library.Library("flowrl_test", "FRAGMENT")
    library.define("without_kernels(Tensor x) -> Tensor")
    library.impl("without_kernels", lambda x: x, "CompositeExplicitAutograd")
    with pytest.raises(ValueError, match=f"'{implementation}' of .* is not available"):
        check_implementation("flowrl_test::without_kernels", implementation, torch.device(device))
    check_implementation("flowrl_test::without_kernels", "reference", torch.device("cpu"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@each_dtype
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_triton_on_the_gpu(dtype, weighting):
    inputs = _tokens(dtype, lengths=(3, 0, 5000, 1, 131_072))
    log_z = torch.linspace(-1, 1, 5, dtype=dtype)

    def run(tensors, implementation):
        policy, *rest, z = tensors
        policy, z = policy.detach().requires_grad_(), z.detach().requires_grad_()
        options = {"weighting": weighting, "implementation": implementation}
        sums = sequence_sums(policy, *rest, **options)
        out = residual_from_sums(sums, z, rest[-1], **options)
        return sums.detach(), *out[1:], *torch.autograd.grad(out.loss.sum(), [policy, z])

    truth = run((*inputs, log_z), "reference")
    on_gpu = [x.cuda() for x in (*inputs, log_z)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    one, two = run(on_gpu, "triton"), run(on_gpu, "triton")
    torch.cuda.set_sync_debug_mode("default")
    for got, again, exact in zip(one, two, truth, strict=True):
        assert torch.equal(got, again)
        tolerance = 1e-12 if got.dtype == F64 else 1e-6
        torch.testing.assert_close(got.cpu(), exact, rtol=tolerance, atol=tolerance)


@each_implementation
def test_implementations_know_their_device(implementation):
    tensors = [x.to("meta") for x in _tokens()]
    if implementation in ("cpu", "triton"):
        with pytest.raises(ValueError, match="runs on (cpu|cuda) tensors, got meta"):
            sequence_sums(*tensors, implementation=implementation)
    else:
        assert sequence_sums(*tensors, implementation=implementation).device.type == "meta"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels are there")
@pytest.mark.parametrize("hide", ["", "sys.modules['triton'] = None"], ids=["", "no triton"])
def test_triton_is_optional_and_named_where_it_is_missing(hide):
    lines = [
        "import sys",
        hide,
        "import torch",
        "from flowrl.kernels.flow_balance import sequence_sums",
        "from flowrl.kernels.segment_mean import segment_sum",
        "from flowrl.kernels.token_clip import token_clip",
        "x, cu = torch.ones(2), torch.tensor([0, 2])",
        "def clip(name): return token_clip(x, x, x, x, cu, implementation=name)[0, 0]",
        "def sums(name): return sequence_sums(x, x, x, x, cu, x[:1], implementation=name)[0, 0]",
        "def rows(name): return segment_sum(x[:, None], cu, x, name)[0][0, 0]",
        "for call in (clip, sums, rows):",
        "    print(call(None).item())",
        "    try: call('triton')",
        "    except ValueError as error: print(error)",
    ]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environ, capture_output=True, text=True, check=True,
    )  # fmt: skip
    values, errors = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    assert values == ["-2.0", "2.0", "2.0"]
    assert len(errors) == 3
    for error in errors:
        assert "is not available: it needs triton and a CUDA device or TRITON_INTERPRET=1" in error
