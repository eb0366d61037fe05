"""PPO's value loss against autograd of the written formula, and its edge cases."""

import math

import pytest
import torch
from objective_samples import F64, each_dtype, each_implementation, each_mode

from flowrl.objectives.aggregation import LOSS_AGG_MODES
from flowrl.objectives.ppo import ppo_value_loss


def _batch(dtype=F64):
    """Return (values, old values, returns, mask, cu_seqlens); sequences 1 and 3 have no token."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 0, 7, 3, 1)
    values, old, returns = torch.randn(3, sum(lengths), generator=generator, dtype=F64)
    mask = torch.rand(sum(lengths), generator=generator) < 0.7
    mask[12:15], mask[15] = False, True
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    return *(x.to(dtype) for x in (values, old, returns)), mask, cu_seqlens


def _written_formula(values, old, returns, mask, cu_seqlens, cliprange_value, mode, scale):
    """Return (loss_sum in float64, clipped tokens), token by token."""
    total, num_clipped = torch.zeros((), dtype=F64), 0
    for b in range(len(cu_seqlens) - 1):
        rows = [i for i in range(int(cu_seqlens[b]), int(cu_seqlens[b + 1])) if mask[i]]
        for i in rows:
            v, o, r = values[i].double(), old[i].double(), returns[i].double()
            error = (v - r) ** 2
            clipped_error = (o + (v - o).clamp(-cliprange_value, cliprange_value) - r) ** 2
            divisor = {"seq-mean-token-mean": len(rows), "seq-mean-token-sum-norm": scale}
            total = total + 0.5 * max(error, clipped_error) / divisor.get(mode, 1)
            num_clipped += bool(clipped_error > error + 1e-12)
    return total, num_clipped


@each_implementation
@each_dtype
@each_mode
@pytest.mark.parametrize("cliprange_value", [0.5, math.inf])
def test_written_formula(implementation, dtype, mode, cliprange_value):
    values, *rest = _batch(dtype)
    values.requires_grad_()
    total, num_clipped = _written_formula(values, *rest, cliprange_value, mode, 4.0)
    (truth,) = torch.autograd.grad(total, values)
    out = ppo_value_loss(values, *rest, cliprange_value, mode, 4.0, implementation=implementation)
    (grad,) = torch.autograd.grad(out.loss_sum, values)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == F64 else {"rtol": 1e-6, "atol": 1e-7}
    assert out.normalizer == ("tokens" if mode == "token-mean" else "sequences")
    assert out.loss_sum.dtype == dtype
    torch.testing.assert_close(out.loss_sum.double(), total, **tolerance)
    torch.testing.assert_close(grad, truth, **tolerance)
    assert grad[~rest[2]].count_nonzero() == 0
    assert out.diagnostics["num_clipped_tokens"].sum().item() == num_clipped
    assert num_clipped > 0 or cliprange_value == math.inf


@each_implementation
def test_by_hand(implementation):
    # Old value 0, clip 0.5. V = 2, R = 3: errors 1 and 2.5^2, the clip decides and has no gradient.
    # V = 2, R = -1: errors 9 and 1.5^2, the value decides. V = 0.25, R = 1: inside, 0.75^2.
    values = torch.tensor([9.0, 2.0, 2.0, 0.25], dtype=F64, requires_grad=True)
    old = torch.zeros(4, dtype=F64)
    returns = torch.tensor([0.0, 3.0, -1.0, 1.0], dtype=F64)
    out = ppo_value_loss(
        values, old, returns, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 3, 4]),
        implementation=implementation,
    )  # fmt: skip
    assert out.diagnostics["loss"].tolist() == [3.125 + 4.5, 0.28125]
    assert out.diagnostics["num_tokens"].tolist() == [2, 1]
    assert out.diagnostics["num_clipped_tokens"].tolist() == [1, 0]
    assert out.diagnostics["value"].tolist() == [4.0, 0.25]
    assert not any(x.requires_grad for x in out.diagnostics.values())
    (grad,) = torch.autograd.grad(out.loss_sum, values)
    assert grad.tolist() == [0.0, 0.0, 3.0, -0.75]


@each_implementation
@each_mode
def test_micro_batches_add_up(implementation, mode):
    *floats, mask, cu_seqlens = _batch()
    floats[0].requires_grad_()
    options = {"loss_agg_mode": mode, "loss_scale_factor": 4.0, "implementation": implementation}
    whole = ppo_value_loss(*floats, mask, cu_seqlens, **options)
    total = torch.zeros((), dtype=F64)
    for first, last in ((0, 1), (1, 2), (2, 5)):
        rows = slice(int(cu_seqlens[first]), int(cu_seqlens[last]))
        offsets = cu_seqlens[first : last + 1] - cu_seqlens[first]
        part = ppo_value_loss(*(x[rows] for x in floats), mask[rows], offsets, **options)
        assert part.normalizer == whole.normalizer
        total = total + part.loss_sum
    torch.testing.assert_close(total, whole.loss_sum, rtol=1e-14, atol=0)
    (got,) = torch.autograd.grad(total, floats[0])
    (expected,) = torch.autograd.grad(whole.loss_sum, floats[0])
    assert torch.equal(got, expected)


@each_implementation
@each_dtype
def test_poison_under_the_mask(implementation, dtype):
    *floats, mask, cu_seqlens = _batch(dtype)
    runs = []
    for poison in (0.0, math.nan, math.inf):
        values, old, returns = (torch.where(mask, x, poison) for x in floats)
        values.requires_grad_()
        out = ppo_value_loss(values, old, returns, mask, cu_seqlens, implementation=implementation)
        runs.append((out.loss_sum.detach(), *torch.autograd.grad(out.loss_sum, values)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_no_token_counts():
    values, old, returns, mask, cu_seqlens = _batch()
    values.requires_grad_()
    for mode in LOSS_AGG_MODES:
        out = ppo_value_loss(
            values, old, returns, torch.zeros_like(mask), cu_seqlens,
            loss_agg_mode=mode, loss_scale_factor=2.0,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss_sum, values)
        assert out.loss_sum.item() == 0 and grad.count_nonzero() == 0


def test_sums_are_reduced_before_they_are_divided():
    *floats, mask, cu_seqlens = _batch()
    options = {"loss_agg_mode": "seq-mean-token-mean"}
    once = ppo_value_loss(*floats, mask, cu_seqlens, **options)
    doubled = ppo_value_loss(*floats, mask, cu_seqlens, **options, reduce_sums=lambda x: 2 * x)
    assert torch.equal(doubled.loss_sum, once.loss_sum)  # twice the loss over twice the tokens
    assert torch.equal(doubled.diagnostics["num_tokens"], 2 * once.diagnostics["num_tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(4, 4, dtype=F64)}, "values must be packed"),
        ({"old_values": torch.zeros(15, dtype=F64)}, r"old_values must have .*\[16\], got \[15\]"),
        ({"returns": torch.zeros(16)}, "returns is torch.float32"),
        ({"loss_mask": torch.ones(15)}, r"mask must have shape \[16\]"),
        ({"cliprange_value": 0.0}, "must be > 0, got 0.0: use math.inf"),
        ({"cliprange_value": math.nan}, "must be > 0, got nan"),
        ({"loss_agg_mode": "sum"}, "unknown loss_agg_mode 'sum'"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_errors(change, message):
    names = ("values", "old_values", "returns", "loss_mask", "cu_seqlens")
    with pytest.raises(ValueError, match=message):
        ppo_value_loss(**(dict(zip(names, _batch(), strict=True)) | change))


def test_half_precision_is_refused():
    tensors = [x.bfloat16() if x.is_floating_point() else x for x in _batch()]
    with pytest.raises(ValueError, match="must be float32 or float64, got torch.bfloat16"):
        ppo_value_loss(*tensors)
