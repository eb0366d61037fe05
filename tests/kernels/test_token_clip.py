"""The clipped policy loss over packed tokens: its sums and its token gradients."""

import math

import pytest
import torch

from flowrl.kernels import _native
from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.token_clip import (
    CLIPPED,
    CLIPPED_LOWER,
    LOSS,
    NUM_COLUMNS,
    OLD_KL,
    RATIO,
    REF_KL,
    TOKENS,
    token_clip,
)

# None is what the dispatcher picks, with the registered backward; "reference" is plain autograd.
IMPLEMENTATIONS = [None, "reference"] + (["cpu"] if _native.load() else [])
IMPLEMENTATIONS += ["triton"] if IS_INTERPRETED else []
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
F64 = torch.float64
SETTINGS = {
    "ppo": {},
    "dapo": {"clip_low": 0.2, "clip_high": 0.28, "clip_ratio_c": 1.25},
    "grpo": {"kl_coef": 0.3, "clip_low": 0.1},
    "reinforce": {"clip_low": 1.0, "clip_high": math.inf},
}
each_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def _tokens(dtype=F64, lengths=(3, 0, 5, 1, 7, 2), seed=0):
    """Return the eight tensors of token_clip, a hole in every mask; the last sequence is masked."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(lengths)

    def normal(scale):
        return scale * torch.randn(num_tokens, generator=generator, dtype=F64)

    policy = -torch.rand(num_tokens, generator=generator, dtype=F64)
    old, ref, advantages = policy + normal(0.4), policy + normal(0.4), normal(1.0)
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    mask[num_tokens - lengths[-1] :] = False
    weights = torch.rand(num_tokens, generator=generator, dtype=F64) + 0.5
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    policy, old, advantages, weights, ref = (
        x.to(dtype) for x in (policy, old, advantages, weights, ref)
    )
    return policy, old, advantages, mask, cu_seqlens, weights, ref


def _formula(policy, old, advantages, weight, ref, clip_low, clip_high, clip_ratio_c, kl_coef):
    """Return (weighted loss, ratio, kl, clipped, clipped lower) [N] as the papers write it."""
    ratio = (policy - old).clamp(-20, 20).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    has_dual = advantages < 0 if clip_ratio_c is not None else torch.zeros_like(ratio).bool()
    dual = -advantages * (clip_ratio_c or 0)
    is_lower = has_dual & (loss > dual)
    loss = torch.where(has_dual, torch.minimum(loss, dual), loss)
    difference = (ref - policy).clamp(-20, 20)
    kl = difference.exp() - difference - 1
    return weight * (loss + kl_coef * kl), ratio, kl, clipped > unclipped, is_lower


def _truth(
    tensors, has_weights, has_ref, clip_low=0.2, clip_high=0.2, clip_ratio_c=None, kl_coef=0.0
):
    """Return (sums [B, 7], gradient [N] of the sum of the losses), by autograd in float64."""
    policy, old, advantages, mask, cu_seqlens, weights, ref = tensors
    leaf = policy.double().requires_grad_()
    loss, ratio, kl, clipped, lower = _formula(
        leaf,
        old.double(),
        advantages.double(),
        weights.double() if has_weights else torch.ones(len(mask), dtype=F64),
        ref.double() if has_ref else leaf.detach(),
        clip_low,
        clip_high,
        clip_ratio_c,
        kl_coef,
    )
    (grad,) = torch.autograd.grad(loss[mask].sum(), leaf)
    columns = [None] * NUM_COLUMNS
    columns[LOSS], columns[TOKENS] = loss, torch.ones_like(loss)
    columns[CLIPPED], columns[CLIPPED_LOWER] = clipped.double(), lower.double()
    columns[OLD_KL], columns[REF_KL], columns[RATIO] = (old.double() - leaf), kl, ratio
    rows = []
    for begin, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        kept = mask[begin:end]
        rows.append([math.fsum(c.detach()[begin:end][kept].tolist()) for c in columns])
    return torch.tensor(rows, dtype=F64), grad


def _run(tensors, has_weights, has_ref, implementation, options):
    """Return (sums, gradient of the sum of the losses)."""
    policy, old, advantages, mask, cu_seqlens, weights, ref = tensors
    leaf = policy.clone().requires_grad_()
    sums = token_clip(
        leaf,
        old,
        advantages,
        mask,
        cu_seqlens,
        weights if has_weights else None,
        ref if has_ref else None,
        **options,
        implementation=implementation,
    )
    (grad,) = torch.autograd.grad(sums[:, LOSS].sum(), leaf)
    return sums.detach(), grad


@each_implementation
@each_dtype
@each_setting
@pytest.mark.parametrize("has_weights", [False, True], ids=["equal", "weighted"])
def test_sums_and_gradient_match_the_formula(implementation, dtype, options, has_weights):
    tensors = _tokens(dtype, lengths=(3, 0, 5, 1, 40, 2))
    has_ref = has_weights or "kl_coef" in options
    truth, true_grad = _truth(tensors, has_weights, has_ref, **options)
    sums, grad = _run(tensors, has_weights, has_ref, implementation, options)
    assert (sums.dtype, grad.dtype) == (F64, dtype)
    torch.testing.assert_close(sums, truth, rtol=1e-13, atol=1e-13)
    # The gradient is rounded once to the dtype of the log-probs.
    torch.testing.assert_close(grad, true_grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-15)
    assert (truth[:, CLIPPED].sum() > 0) == ("clip_high" not in options or options["clip_low"] < 1)
    assert (truth[:, CLIPPED_LOWER].sum() > 0) == ("clip_ratio_c" in options)
    assert (truth[:, REF_KL].sum() > 0) == has_ref


# (ratio, advantage) -> (loss, gradient, clipped, dual clip), clip 0.5 / 0.25, dual clip at 2. All
# numbers but the ratio's logarithm are exact in binary.
BY_HAND = [
    ((1.0, 3.0), (-3.0, -3.0, 0, 0)),
    ((1.5, 2.0), (-2.5, 0.0, 1, 0)),
    ((0.25, 2.0), (-0.5, -0.5, 0, 0)),
    ((1.5, -2.0), (3.0, 3.0, 0, 0)),
    ((0.25, -2.0), (1.0, 0.0, 1, 0)),
    ((4.0, -2.0), (4.0, 0.0, 0, 1)),
    ((4.0, 0.0), (0.0, 0.0, 0, 0)),
]


@each_implementation
@pytest.mark.parametrize(("token", "expected"), BY_HAND, ids=str)
def test_one_token_by_hand(implementation, token, expected):
    (ratio, advantage), (loss, slope, clipped, lower) = token, expected
    policy = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    old = policy.detach() - math.log(ratio)
    sums = token_clip(
        policy, old, torch.tensor([advantage], dtype=F64), torch.ones(1), torch.tensor([0, 1]),
        clip_low=0.5, clip_high=0.25, clip_ratio_c=2.0, implementation=implementation,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(sums[0, LOSS], policy)
    row = [loss, 1, clipped, lower, -math.log(ratio), 0, ratio]
    assert sums[0].tolist() == pytest.approx(row, rel=1e-15, abs=1e-15)
    assert grad.item() == pytest.approx(slope, rel=1e-15)


@each_implementation
def test_bounds_are_not_rounded_to_float32(implementation):
    # float32 has 1.2000000477, 0.8000000119 and 1.2999999523.
    ratio = torch.tensor([1.2 + 2e-8, 0.8 + 5e-9, 1.3 - 2e-8], dtype=F64)
    advantages = torch.tensor([1.0, -1.0, -1.0], dtype=F64)
    zeros, ones = torch.zeros(3, dtype=F64), torch.ones(3)
    sums = token_clip(
        ratio.log(), zeros, advantages, ones, torch.arange(4), clip_ratio_c=1.3,
        implementation=implementation,
    )  # fmt: skip
    assert sums[:, CLIPPED].tolist() == [1, 0, 0]
    assert sums[:, CLIPPED_LOWER].tolist() == [0, 0, 0]


@each_implementation
@each_dtype
def test_far_apart_log_probs(implementation, dtype):
    # 20 is the last difference with a gradient; beyond it value and gradient stop growing.
    policy = torch.tensor([0.0, -21.0, 0.0, -1000.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-20.0, -1.0, -20.5, 0.0], dtype=dtype)
    ref = torch.tensor([-20.5, -1.0, -math.inf, 0.0], dtype=dtype)
    ones, cu_seqlens = torch.ones(4, dtype=dtype), torch.arange(5)
    sums = token_clip(
        policy, old, -ones, ones, cu_seqlens, None, ref, 0.2, 0.2, None, 1.0, implementation
    )
    (grad,) = torch.autograd.grad(sums[:, LOSS].sum(), policy)
    large, small = math.exp(20), math.exp(-20)
    assert sums[:, RATIO].tolist() == pytest.approx([large, small, large, small], rel=1e-14)
    assert sums[:, OLD_KL].tolist() == [-20, 20, -20.5, 1000]
    ref_kl = [small + 19, large - 21, small + 19, large - 21]
    assert sums[:, REF_KL].tolist() == pytest.approx(ref_kl, rel=1e-14)
    assert sums[:, CLIPPED].tolist() == [0, 1, 0, 1]
    loss = [large + small + 19, 0.8 + large - 21, large + small + 19, 0.8 + large - 21]
    assert sums[:, LOSS].tolist() == pytest.approx(loss, rel=1e-14)
    relative = 1e-7 if dtype == torch.float32 else 1e-14
    assert grad.tolist() == pytest.approx([large, 1 - large, 0, 0], rel=relative)


@each_implementation
@each_setting
def test_gradcheck(implementation, options):
    policy, old, advantages, mask, cu_seqlens, weights, ref = _tokens()
    policy.requires_grad_()
    # 1e-6 steps do not carry a ratio of these data over a bound.
    assert torch.autograd.gradcheck(
        lambda p: token_clip(
            p, old, advantages, mask, cu_seqlens, weights, ref, **options,
            implementation=implementation,
        )[:, LOSS],
        policy,
        fast_mode=implementation == "triton",  # one random direction instead of every element
    )  # fmt: skip


@each_implementation
@each_dtype
def test_upstream_gradient_is_one_number_a_sequence(implementation, dtype):
    tensors = _tokens(dtype)
    policy, old, advantages, mask, cu_seqlens, weights, ref = tensors
    _, unit = _run(tensors, True, True, implementation, {"kl_coef": 0.1})
    policy.requires_grad_()
    sums = token_clip(
        policy, old, advantages, mask, cu_seqlens, weights, ref, kl_coef=0.1,
        implementation=implementation,
    )  # fmt: skip
    upstream = torch.arange(1.0, 7.0, dtype=F64)
    (grad,) = torch.autograd.grad(sums[:, LOSS], policy, upstream)
    spread = torch.repeat_interleave(upstream, cu_seqlens.diff())
    # atol: autograd adds the gradients of both terms, which nearly cancel, after the upstream.
    torch.testing.assert_close(
        grad.double(), spread * unit.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-15
    )


@each_implementation
@each_dtype
def test_nan_under_the_mask_does_no_harm(implementation, dtype):
    tensors = _tokens(dtype)
    options = {"kl_coef": 0.1, "clip_ratio_c": 2.0}
    clean, clean_grad = _run(tensors, True, True, implementation, options)
    mask = tensors[3]
    poison = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).repeat(6)[: len(mask)]
    spoiled = [torch.where(mask, x, poison) if x.is_floating_point() else x for x in tensors]
    sums, grad = _run(spoiled, True, True, implementation, options)
    assert torch.equal(sums, clean) and torch.equal(grad, clean_grad)
    assert grad[~mask].tolist() == [0.0] * int((~mask).sum())
    assert clean[-1].tolist() == [0.0] * NUM_COLUMNS  # all of it is masked


@each_implementation
@pytest.mark.parametrize("spoiled", [0, 1, 2, 5, 6], ids=["policy", "old", "adv", "weight", "ref"])
def test_nan_in_one_sequence_stays_there_and_shows(implementation, spoiled):
    tensors = list(_tokens())
    tensors[3] = torch.ones_like(tensors[3])
    tensors[spoiled] = tensors[spoiled].index_fill(0, torch.tensor([4]), math.nan)
    sums, grad = _run(tensors, True, True, implementation, {"kl_coef": 0.1})
    assert sums[:, LOSS].isnan().tolist() == [False, False, True, False, False, False]
    assert grad.isnan().nonzero().flatten().tolist() == [4]


@each_implementation
def test_reference_log_probs_have_no_effect_without_a_coefficient(implementation):
    tensors = list(_tokens())
    clean, clean_grad = _run(tensors, True, False, implementation, {})
    tensors[6] = torch.full_like(tensors[6], math.nan)
    sums, grad = _run(tensors, True, True, implementation, {})
    assert torch.equal(sums[:, LOSS], clean[:, LOSS]) and torch.equal(grad, clean_grad)


@each_implementation
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
def test_few_or_no_tokens(implementation, lengths):
    num_tokens = sum(lengths)
    policy = torch.zeros(num_tokens, requires_grad=True)
    ones = torch.ones(num_tokens)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sums = token_clip(policy, policy, 2 * ones, ones, cu_seqlens, implementation=implementation)
    assert sums.tolist() == [[-2.0 * n, n, 0, 0, 0, 0, n] for n in lengths]
    (grad,) = torch.autograd.grad(sums[:, LOSS].sum(), policy)
    assert grad.tolist() == [-2.0] * num_tokens


@each_implementation
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_mask_and_index_dtypes_and_strides(implementation, mask_dtype, index_dtype):
    tensors = list(_tokens())
    truth, true_grad = _truth(tensors, True, True, kl_coef=0.1)
    tensors[3], tensors[4] = tensors[3].to(mask_dtype), tensors[4].to(index_dtype)
    strided = [torch.stack([x, x], dim=1)[:, 0] for x in tensors]
    assert not strided[0].is_contiguous()
    sums, grad = _run(strided, True, True, implementation, {"kl_coef": 0.1})
    torch.testing.assert_close(sums, truth, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, true_grad, rtol=1e-13, atol=1e-13)


@each_implementation
def test_sums_of_shards_add_up_to_those_of_the_whole(implementation):
    tensors = _tokens(lengths=(6, 4, 8))
    whole, grad = _run(tensors, True, True, implementation, {"kl_coef": 0.1})
    is_first = torch.arange(18) % 4 < 2
    total, grads = 0, torch.zeros_like(grad)
    for rows in (is_first, ~is_first):
        cu_seqlens = torch.stack([rows[:end].sum() for end in tensors[4].tolist()])
        shard = [cu_seqlens if x is tensors[4] else x[rows] for x in tensors]
        sums, grads[rows] = _run(shard, True, True, implementation, {"kl_coef": 0.1})
        total = total + sums
    torch.testing.assert_close(total, whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grads, grad, rtol=0, atol=0)


@each_implementation
def test_bits_do_not_depend_on_threads_or_neighbours(implementation):
    lengths = (700, 1, 0, 3000, 33)
    tensors = _tokens(torch.float32, lengths)
    options = {"kl_coef": 0.1}
    before = torch.get_num_threads()
    runs = []
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        runs.append(_run(tensors, True, True, implementation, options))
    torch.set_num_threads(before)
    for one, three in zip(*runs, strict=True):
        assert torch.equal(one, three)
    start, end = tensors[4][3:5].tolist()
    alone = [x[start:end] for x in tensors]
    alone[4] = torch.tensor([0, end - start])
    sums, grad = _run(alone, True, True, implementation, options)
    assert torch.equal(sums[0], runs[0][0][3]) and torch.equal(grad, runs[0][1][start:end])


@each_implementation
def test_long_float32_sequence_against_float64(implementation):
    generator = torch.Generator().manual_seed(1)
    num_tokens = 131_072
    policy = -torch.rand(num_tokens, generator=generator)
    old = policy + 0.2 * torch.randn(num_tokens, generator=generator)
    advantages = torch.randn(num_tokens, generator=generator)
    mask, cu_seqlens = torch.ones(num_tokens, dtype=torch.bool), torch.tensor([0, num_tokens])
    tensors = (policy, old, advantages, mask, cu_seqlens, advantages.abs(), old)
    truth, true_grad = _truth(tensors, True, True, kl_coef=0.1)
    sums, grad = _run(tensors, True, True, implementation, {"kl_coef": 0.1})
    torch.testing.assert_close(sums, truth, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(grad, true_grad.float(), rtol=1.2e-7, atol=1e-15)


@each_implementation
def test_outputs_are_fully_written(implementation, nan_filled_empty):
    tensors = _tokens(torch.float32, lengths=(3, 0, 300, 1, 7, 2))
    sums, grad = _run(tensors, True, True, implementation, {"kl_coef": 0.1})
    assert sums.isfinite().all() and grad.isfinite().all()
    assert grad[~tensors[3]].count_nonzero() == 0


@each_dtype
@pytest.mark.parametrize("has_both", [False, True], ids=["plain", "weights and ref"])
def test_opcheck(dtype, has_both):
    policy, old, advantages, mask, cu_seqlens, weights, ref = _tokens(dtype)
    policy.requires_grad_()
    optional = (weights, ref) if has_both else (None, None)
    scalars = (0.2, 0.28, 3.0, 0.1 * has_both)
    torch.library.opcheck(
        torch.ops.flowrl.token_clip.default,
        (policy, old, advantages, mask, cu_seqlens, *optional, *scalars),
    )
    torch.library.opcheck(
        torch.ops.flowrl.token_clip_backward.default,
        (torch.linspace(-1, 1, 6, dtype=F64), policy.detach(), cu_seqlens),
    )


def test_compiles_without_a_graph_break():
    policy, *rest = _tokens()
    compiled = torch.compile(token_clip, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (token_clip, compiled):
        leaf = policy.clone().requires_grad_()
        sums = function(leaf, *rest, kl_coef=0.1)
        runs.append((sums, *torch.autograd.grad(sums[:, LOSS].sum(), leaf)))
    for eager, traced in zip(*runs, strict=True):
        assert torch.equal(eager, traced)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@each_dtype
def test_triton_on_the_gpu(dtype):
    tensors = _tokens(dtype, lengths=(3, 0, 5000, 1, 131_072, 2))
    truth, true_grad = _truth(tensors, True, True, kl_coef=0.1)
    on_gpu = [x.cuda() for x in tensors]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    runs = [_run(on_gpu, True, True, "triton", {"kl_coef": 0.1}) for _ in range(2)]
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
    torch.testing.assert_close(runs[0][0].cpu(), truth, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(
        runs[0][1].cpu(), true_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-15
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"policy_logprobs": torch.zeros(3, 6)}, r"packed to \[N\], got \[3, 6\]"),
        ({"policy_logprobs": torch.zeros(18).bfloat16()}, "float32 or float64, got torch.bf"),
        ({"old_logprobs": torch.zeros(17, dtype=F64)}, r"shape \[18\], got \[17\]"),
        ({"advantages": torch.zeros(6, dtype=F64)}, r"advantages must have .* got \[6\]"),
        ({"advantages": torch.zeros(18)}, "advantages is torch.float32 but"),
        ({"token_weights": torch.zeros(18)}, "token_weights is torch.float32 but"),
        ({"ref_logprobs": torch.zeros(18, dtype=F64, device="meta")}, "ref_logprobs is on meta"),
        ({"loss_mask": torch.full((18,), 0.5)}, "0 and 1 only, got 0.5"),
        ({"cu_seqlens": torch.tensor([0, 17])}, "got 0 to 17"),
        ({"clip_low": 1.5}, "clip_low must be in .* got 1.5"),
        ({"clip_low": math.nan}, "clip_low .* got nan"),
        ({"clip_high": -0.1}, "clip_high must be >= 0, got -0.1"),
        ({"clip_high": math.nan}, "clip_high .* got nan"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c must be > 1, .* got 1.0"),
        ({"kl_coef": -0.1}, "kl_coef .* got -0.1"),
        ({"kl_coef": math.inf}, "kl_coef .* got inf"),
        ({"kl_coef": 0.1, "ref_logprobs": None}, "kl_coef is 0.1 but ref_logprobs is None"),
        ({"implementation": "gpu"}, "implementation is 'gpu'"),
    ],
)
def test_errors(change, message):
    names = ("policy_logprobs", "old_logprobs", "advantages", "loss_mask", "cu_seqlens",
             "token_weights", "ref_logprobs")  # fmt: skip
    arguments = dict(zip(names, _tokens(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        token_clip(**arguments)
