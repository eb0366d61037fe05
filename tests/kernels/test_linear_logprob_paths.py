"""The paths of the compiled linear_logprob: sizes, layouts, dtypes and fills that take each.

Small inputs all take one path; here are several chunks of rows and slices of the vocabulary,
weights read in place and copied, and lists of kept pairs from nearly empty to nearly full.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flowrl.kernels.linear_logprob import linear_logprob, live_implementation, reference

IMPLEMENTATION = live_implementation("cpu")
# The gradient of a logit is rounded to bfloat16, by 2^-9 at most, where products are bfloat16, and
# that of a hidden state to the dtype of the latter.
GRAD_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def run(hidden: Tensor, weight: Tensor, target: Tensor, implementation=IMPLEMENTATION, drop=0.0):
    """logprob, entropy, gradients in float32 and the dropped mass, for fixed upstream gradients."""
    hidden = hidden.detach().requires_grad_()
    dropped = torch.full((len(hidden),), torch.nan)
    grad_weight = torch.zeros(weight.shape)
    logprob, entropy = linear_logprob(
        *(hidden, weight.detach(), target, 0.9, drop == 0, drop),
        dropped_mass=dropped,
        weight_grad=grad_weight,
        implementation=implementation,
    )
    grad_logprob = torch.linspace(-1, 2, len(hidden))
    logprob.backward(grad_logprob, retain_graph=True)
    if entropy is not None:
        entropy.backward(grad_logprob.flip(0))
        entropy = entropy.detach()
    assert hidden.grad is not None
    return logprob.detach(), entropy, hidden.grad, grad_weight, dropped


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def peaked(num_rows: int, hidden_size: int, vocab_size: int, dtype: torch.dtype, spread: float):
    """Early entries are likelier by a factor that `spread` sets, as frequent tokens are."""
    hidden = torch.randn(num_rows, hidden_size)
    weight = torch.randn(vocab_size, hidden_size) / hidden_size**0.5
    hidden[:, 0] = 1
    weight[:, 0] = -spread * torch.arange(vocab_size).div(128).log1p()
    target = torch.randint(vocab_size, (num_rows,))
    hidden[:, 1:] += torch.randint(0, 12, (num_rows, 1)) * weight[target, 1:]
    return hidden.to(dtype), weight.to(dtype), target


# Rows: three chunks of the exact backward, the last one partial. Widths: whole and ragged panels.
# Vocabularies: whole tiles in several slices; a ragged last tile after tiles read in place.
@pytest.mark.parametrize("shape", [(2100, 64, 1280), (130, 128, 1300), (1030, 72, 1200)], ids=str)
@pytest.mark.parametrize("dtype", GRAD_TOLERANCES, ids=str)
def test_large_inputs_match_the_reference(shape, dtype, nan_filled_empty):
    hidden, weight, target = peaked(*shape, dtype, spread=1.0)
    target[::7] = -100
    result = run(hidden, weight, target)
    expected = run(hidden, weight, target, "reference")
    torch.testing.assert_close(result[0], expected[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(result[1], expected[1], atol=4e-5, rtol=0)
    assert relative_error(result[2], expected[2]) < GRAD_TOLERANCES[dtype]
    assert relative_error(result[3], expected[3]) < GRAD_TOLERANCES[dtype]


# Share of kept pairs: few, about half, and so many that the exact path is taken with a mask.
@pytest.mark.parametrize("spread,low,high", [(4.0, 0, 0.25), (2.0, 0.3, 0.65), (0.0, 0.8, 0.99)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1500, 64, 2560), (700, 40, 2500)], ids=str)
def test_every_fill_follows_the_rule(shape, dtype, spread, low, high, nan_filled_empty):
    hidden, weight, target = peaked(*shape, dtype, spread)
    drop = 0.03
    forward = torch.ops.flowrl.linear_logprob_forward_reference
    lse, target_logit, _, tile_lse = forward(hidden, weight, target, 0, 0.9)
    keep, _ = reference.select_tiles(tile_lse, lse, target_logit - lse, target, drop)
    share = float(keep.float().mean())
    assert low < share < high
    result = run(hidden, weight, target, drop=drop)
    expected = run(hidden, weight, target, "reference", drop)
    # A tile within rounding of the budget may go either way.
    same_set = (result[4] - expected[4]).abs() <= 1e-3 * expected[4]
    assert same_set.float().mean() > 0.99
    assert relative_error(result[2][same_set], expected[2][same_set]) < GRAD_TOLERANCES[dtype]
    assert relative_error(result[3], expected[3]) < 2 * GRAD_TOLERANCES[dtype] + 1e-4


@contextmanager
def num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("drop", [0.0, 0.03])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bits_repeat_for_a_thread_count(threads, drop):
    """Which thread takes which task differs from run to run; no sum may depend on it."""
    arguments = peaked(1200, 64, 2560, torch.float32, 2.0)
    with num_threads(threads):
        results = [run(*arguments, drop=drop) for _ in range(4)]
    for later in results[1:]:
        for first, value in zip(results[0], later, strict=True):
            assert first is value is None or torch.equal(first, value)


@pytest.mark.parametrize("drop", [0.0, 0.03])
def test_bfloat16_without_bfloat16_instructions(drop):
    """The float32 path of processors without them: more exact, never less."""
    hidden, weight, target = peaked(300, 64, 1300, torch.bfloat16, 3.0)
    with torch.backends.mkldnn.flags(enabled=False):
        result = run(hidden, weight, target, drop=drop)
    expected = run(hidden, weight, target, "reference", drop)
    torch.testing.assert_close(result[0], expected[0], atol=2e-5, rtol=0)
    assert relative_error(result[3], expected[3]) < 1e-5


@pytest.mark.parametrize("drop", [0.0, 0.03])
def test_strided_weight_and_buffers(drop):
    hidden, weight, target = peaked(200, 64, 1300, torch.float32, 3.0)
    expected = run(hidden, weight, target, drop=drop)
    strided = run(hidden.t().contiguous().t(), weight.t().contiguous().t(), target, drop=drop)
    for value, truth in zip(strided, expected, strict=True):
        if truth is not None:
            torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)
    buffer = torch.ones(64, 1300).t()
    leaf = hidden.requires_grad_()
    logprob, _ = linear_logprob(leaf, weight, target, 0.9, drop_mass=drop, weight_grad=buffer)
    logprob.sum().backward()
    logprob, _ = linear_logprob(leaf, weight.requires_grad_(), target, 0.9, drop_mass=drop)
    logprob.sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(buffer - 1, weight.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", sorted({"reference", IMPLEMENTATION}))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2100, 64, 1280), (130, 72, 1300)], ids=str)
@pytest.mark.parametrize("drop", [0.0, 0.03])
def test_gradient_of_the_weight_is_rounded_once(drop, shape, dtype, implementation):
    """A sum over three chunks of rows that is rounded after each would differ in most elements."""
    hidden, weight, target = peaked(*shape, dtype, 4.0)
    suffix = "_reference" if implementation == "reference" else ""
    forward = getattr(torch.ops.flowrl, f"linear_logprob_forward{suffix}")
    backward = getattr(torch.ops.flowrl, f"linear_logprob_backward{suffix}")
    lse, _, mean_logit, tile_lse = forward(hidden, weight, target, 0, 0.9)
    grad_logprob = torch.linspace(-1, 2, len(hidden))
    arguments = (
        hidden,
        weight,
        target,
        0,
        0.9,
        lse,
        mean_logit,
        tile_lse,
        grad_logprob,
        None,
        drop,
    )
    wide = backward(*arguments)[1]
    narrow = backward(*arguments, grad_weight_dtype=dtype)[1]
    assert wide.dtype == torch.float32 and wide.any()
    assert torch.equal(narrow, wide.to(dtype))


@pytest.mark.skipif(IMPLEMENTATION != "cpu", reason="needs the C++ library")
def test_shard_without_entries_is_refused() -> None:
    hidden, target = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="weight has no rows"):
        torch.ops.flowrl.linear_logprob_forward(hidden, torch.ones(0, 4), target, 0, 1.0)
