"""The compiled head's kept softmax: the same gradients without multiplying for the logits again."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from flowrl.kernels.linear_logprob import linear_logprob, live_implementation

if live_implementation("cpu") == "reference":
    pytest.skip("needs the C++ kernels, run `make install`", allow_module_level=True)

FORWARD = torch.ops.flowrl.linear_logprob_forward.default
BACKWARD = torch.ops.flowrl.linear_logprob_backward.default
IGNORE = -100
TEMPERATURE = 0.8
# In bfloat16 the share and the gradient of a logit are each rounded, by 2^-9 at most.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2 * 2**-8}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def peaked(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype):
    """Rows whose target has anything from a small probability to all but 1e-4 of it."""
    hidden = torch.randn(num_rows, hidden_size)
    weight = torch.randn(vocab_size, hidden_size) / hidden_size**0.5
    target = torch.randint(vocab_size, (num_rows,))
    hidden += torch.linspace(0, 14, num_rows)[:, None] * weight[target]
    target[::7] = IGNORE
    return hidden.to(dtype), weight.to(dtype), target


def upstream(num_rows: int) -> Tensor:
    grad = torch.linspace(-1, 2, num_rows)
    grad[3::5] = 0
    return grad


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """logprob and both gradients."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    logprob, _ = linear_logprob(*leaves, target, TEMPERATURE, **options)
    return logprob.detach(), *torch.autograd.grad(
        logprob, leaves, upstream(len(target)).to(logprob)
    )


def budget(hidden: Tensor, weight: Tensor) -> int:
    return len(hidden) * -(-len(weight) // 128) * 128 * hidden.element_size()


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


# Three chunks of rows with a partial last block; whole and ragged widths, tiles and slices.
@pytest.mark.parametrize(
    "shape", [(2100, 64, 1280), (130, 128, 1300), (1030, 72, 515), (1, 8, 130)], ids=str
)
@each_dtype
@pytest.mark.parametrize("has_instructions", [True, False])
def test_gradients_are_exact(shape, dtype, has_instructions, nan_filled_empty):
    hidden, weight, target = peaked(*shape, dtype)
    if len(target) == 1:
        target[0] = 5
    truth = gradients(hidden.double(), weight.double(), target)
    with torch.backends.mkldnn.flags(enabled=has_instructions):
        recomputed = gradients(hidden, weight, target)
        kept = gradients(hidden, weight, target, memory_budget=budget(hidden, weight))
    assert torch.equal(kept[0], recomputed[0])
    is_dead = (target == IGNORE) | (upstream(len(target)) == 0)
    assert not kept[1][is_dead].any()
    for grad, exact in zip(kept[1:], truth[1:], strict=True):
        assert relative_error(grad, exact) < TOLERANCES[dtype]
    if len(target) > 1:  # of rows whose target has nearly all, 1 - p is as exact as recomputed
        certain = (truth[0] > -0.01) & ~is_dead
        assert certain.any() and truth[0][certain].max() > -1e-3
        found, other = (
            relative_error(g[1][certain], truth[1][certain]) for g in (kept, recomputed)
        )
        assert found < max(TOLERANCES[dtype], 1.5 * other)


@each_dtype
def test_bits_repeat(dtype):
    case = peaked(700, 64, 1300, dtype)
    first, *others = (gradients(*case, memory_budget=2**30) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_backward_multiplies_no_logits(monkeypatch):
    """What the forward kept is what the backward reads: a changed share changes its gradient."""
    hidden, weight, target = peaked(70, 16, 300, torch.float32)
    kept = torch.full((70, 384), torch.nan)
    lse, target_logit, mean_logit, tile_lse = FORWARD(
        hidden, weight, target, 0, TEMPERATURE, IGNORE, False, kept
    )
    is_real = target != IGNORE
    by_tile = kept.view(3, 70, 128)
    assert torch.equal(by_tile.isfinite().all(2), is_real.expand(3, 70))
    shares = by_tile[:, is_real]
    torch.testing.assert_close(shares.sum(2), torch.ones(3, int(is_real.sum())))
    assert not shares[2, :, 300 - 256 :].any()
    rest = (target, 0, TEMPERATURE, lse, mean_logit, tile_lse, upstream(70), None, 0.0)
    logprob = (target_logit - lse).clamp(max=0)
    options = {"logprob": logprob, "kept_logits": kept.zero_()}
    grad_hidden, grad_weight = BACKWARD(hidden, weight, *rest, **options)
    tail = -torch.expm1(logprob.double()) * upstream(70) / TEMPERATURE
    only_targets = torch.where(is_real, tail, 0)[:, None] * weight.double()[target.clamp(min=0)]
    assert relative_error(grad_hidden, only_targets) < 1e-5
    assert not grad_weight[[v for v in range(300) if v not in target]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shards_add_up(dtype):
    hidden, weight, target = peaked(300, 64, 700, dtype)
    truth = gradients(hidden.double(), weight.double(), target)
    parts = [(0, weight[:300]), (300, weight[300:])]
    kept, sums = [], []
    for start, shard in parts:
        kept.append(torch.full((300, 384 if start == 0 else 512), torch.nan, dtype=dtype))
        sums.append(FORWARD(hidden, shard, target, start, TEMPERATURE, IGNORE, False, kept[-1]))
    lse = torch.stack([s[0] for s in sums]).logsumexp(0)
    logprob = (sums[0][1] + sums[1][1] - lse).clamp(max=0)
    grad_hidden = torch.zeros(300, 64)
    for (start, shard), buffer, (_, _, mean_logit, tile_lse) in zip(parts, kept, sums, strict=True):
        part, grad_weight = BACKWARD(
            *(hidden, shard, target, start, TEMPERATURE, lse, mean_logit, tile_lse),
            *(upstream(300), None, 0.0),
            logprob=logprob,
            kept_logits=buffer,
        )
        grad_hidden += part
        exact = truth[2][start : start + len(shard)]
        assert relative_error(grad_weight, exact) < TOLERANCES[dtype]
    assert relative_error(grad_hidden, truth[1]) < TOLERANCES[dtype]


def test_what_recomputes_all_the_same():
    """Too small a budget, drop_mass, float16 and an entropy with a gradient."""
    hidden, weight, target = peaked(200, 64, 1300, torch.float32)
    enough = budget(hidden, weight)
    exact = gradients(hidden, weight, target)
    assert not torch.equal(gradients(hidden, weight, target, memory_budget=enough)[1], exact[1])
    below = gradients(hidden, weight, target, memory_budget=enough - 1)
    assert all(torch.equal(a, b) for a, b in zip(below, exact, strict=True))
    half = hidden.half(), weight.half(), target
    for case, options in ((half, {}), ((hidden, weight, target), {"drop_mass": 0.03})):
        without, given = (gradients(*case, **options, memory_budget=n) for n in (0, 2**30))
        assert all(torch.equal(a, b) for a, b in zip(without, given, strict=True))
    results = []
    for size in (0, enough):
        leaf = hidden.detach().requires_grad_()
        logprob, entropy = linear_logprob(leaf, weight, target, entropy=True, memory_budget=size)
        assert entropy is not None
        results.append(torch.autograd.grad(logprob.sum() + entropy.sum(), leaf)[0])
    assert torch.equal(*results)


def test_no_buffer_without_a_backward():
    hidden, weight, target = peaked(2000, 16, 12800, torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        linear_logprob(hidden.requires_grad_(), weight, target, memory_budget=2**30)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < budget(hidden, weight) / 8


ERRORS = {
    "shape": ({"kept_logits": torch.empty(20, 300)}, r"shape \[20, 384\], got \[20, 300\]"),
    "dtype": ({"kept_logits": torch.empty(20, 384, dtype=torch.bfloat16)}, "got BFloat16"),
    "strides": ({"kept_logits": torch.empty(384, 20).t()}, "contiguous"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_buffers_are_refused(name):
    hidden, weight, target = peaked(20, 16, 300, torch.float32)
    replacement, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        FORWARD(hidden, weight, target, 0, 1.0, **replacement)
    lse, _, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0)
    rest = (target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(20), None, 0.0)
    with pytest.raises(ValueError, match=message):
        BACKWARD(hidden, weight, *rest, logprob=lse, **replacement)


def test_kept_shares_need_the_logprob_and_no_float16():
    hidden, weight, target = peaked(20, 16, 300, torch.float32)
    lse, _, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0)
    rest = (target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(20), None, 0.0)
    with pytest.raises(ValueError, match="without logprob"):
        BACKWARD(hidden, weight, *rest, kept_logits=torch.empty(20, 384))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        kept = torch.empty(20, 384, dtype=torch.half)
        FORWARD(hidden.half(), weight.half(), target, 0, 1.0, kept_logits=kept)


def test_operators_with_a_buffer_are_well_formed():
    hidden, weight, target = peaked(20, 16, 300, torch.float32)
    kept = torch.zeros(20, 384)
    opcheck(FORWARD, (hidden, weight, target, 0, 1.0, IGNORE, False, kept))
    lse, _, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0, IGNORE, False, kept)
    rest = (target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(20), None, 0.0)
    opcheck(BACKWARD, (hidden, weight, *rest), {"logprob": lse * 0, "kept_logits": kept})
