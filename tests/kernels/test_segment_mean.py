"""Sums and means of selected rows of packed sequences."""

import math

import pytest
import torch

from flowrl.kernels import _native
from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.segment_mean import segment_mean, segment_sum

# None is what the dispatcher picks, with the registered backward; "reference" is plain autograd.
IMPLEMENTATIONS = [None, "reference"] + (["cpu"] if _native.load() else [])
IMPLEMENTATIONS += ["triton"] if IS_INTERPRETED else []
each_implementation = pytest.mark.parametrize(
    "implementation", IMPLEMENTATIONS, ids=[name or "dispatched" for name in IMPLEMENTATIONS]
)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str
)
F64 = torch.float64


@pytest.fixture
def nan_filled_allocations():
    """Every torch.empty, in Python and in C++, starts as NaN (integers: the largest value)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _rows(dtype=F64, width=5, lengths=(3, 0, 4, 1, 6), seed=0):
    """Return (hidden, cu_seqlens, mask); the fourth sequence has one row, which is masked."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sum(lengths), width, generator=generator, dtype=F64).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.rand(len(hidden), generator=generator) < 0.7
    mask[cu_seqlens[3] : cu_seqlens[4]] = False
    return hidden, cu_seqlens, mask


def _sum_by_hand(hidden, cu_seqlens, mask):
    """Return (sum [B, H] float64, exactly rounded; count as a list)."""
    sums, counts = [], []
    for begin, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        rows = [hidden[i].double().tolist() for i in range(begin, end) if mask[i]]
        columns = zip(*rows, strict=True) if rows else [()] * hidden.shape[1]
        sums.append([math.fsum(column) for column in columns])
        counts.append(len(rows))
    return torch.tensor(sums, dtype=F64).reshape(len(counts), hidden.shape[1]), counts


@each_implementation
@each_dtype
@pytest.mark.parametrize("width", [1, 5, 256, 300], ids="H={}".format)
def test_matches_a_loop(implementation, dtype, width):
    hidden, cu_seqlens, mask = _rows(dtype, width)
    truth, true_counts = _sum_by_hand(hidden, cu_seqlens, mask)
    sums, counts = segment_sum(hidden, cu_seqlens, mask, implementation)
    means = segment_mean(hidden, cu_seqlens, mask, implementation)
    wide = F64 if dtype == F64 else torch.float32
    assert (sums.dtype, means.dtype, counts.dtype) == (wide, wide, torch.int64)
    bound = 1e-14 if dtype == F64 else 2e-6
    torch.testing.assert_close(sums.double(), truth, rtol=0, atol=bound)
    assert counts.tolist() == true_counts
    divisor = torch.tensor(true_counts).clamp(min=1)[:, None]
    torch.testing.assert_close(means.double(), truth / divisor, rtol=0, atol=bound)
    assert means[1].tolist() == [0.0] * width and means[3].tolist() == [0.0] * width


@each_implementation
def test_gradcheck(implementation):
    hidden, cu_seqlens, mask = _rows()
    hidden.requires_grad_()
    is_slow = implementation == "triton"  # one random direction instead of every element
    assert torch.autograd.gradcheck(
        lambda h: segment_mean(h, cu_seqlens, mask, implementation), hidden, fast_mode=is_slow
    )
    assert torch.autograd.gradcheck(
        lambda h: segment_sum(h, cu_seqlens, mask, implementation)[0], hidden, fast_mode=is_slow
    )


@each_implementation
@each_dtype
def test_gradient_is_the_sequence_gradient_at_selected_rows(implementation, dtype):
    hidden, cu_seqlens, mask = _rows(dtype)
    hidden.requires_grad_()
    sums, _ = segment_sum(hidden, cu_seqlens, mask, implementation)
    upstream = torch.arange(1.0, 6.0, dtype=sums.dtype)[:, None].expand(5, 5)
    (grad,) = torch.autograd.grad(sums, hidden, upstream)
    owner = torch.repeat_interleave(torch.arange(1.0, 6.0), cu_seqlens.diff())
    assert grad.dtype == dtype
    assert torch.equal(grad, (owner * mask)[:, None].expand(-1, 5).to(dtype))


@each_implementation
@each_dtype
def test_nan_in_a_masked_row_does_no_harm(implementation, dtype):
    hidden, cu_seqlens, mask = _rows(dtype)
    clean = segment_mean(hidden, cu_seqlens, mask, implementation)
    hidden[~mask] = torch.tensor([math.nan, math.inf, -math.inf, math.nan, 0.0], dtype=dtype)
    hidden.requires_grad_()
    means = segment_mean(hidden, cu_seqlens, mask, implementation)
    assert torch.equal(means, clean)
    (grad,) = torch.autograd.grad(means.sum(), hidden)
    assert grad[~mask].count_nonzero() == 0 and grad.isfinite().all()
    hidden.data[mask.nonzero()[0]] = math.nan
    spoiled = segment_mean(hidden, cu_seqlens, mask, implementation)
    assert spoiled.isnan().any(dim=1).tolist() == [True, False, False, False, False]


@each_implementation
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.uint8, torch.float32])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_mask_and_index_dtypes(implementation, mask_dtype, index_dtype):
    hidden, cu_seqlens, mask = _rows()
    truth, _ = _sum_by_hand(hidden, cu_seqlens, mask)
    sums, _ = segment_sum(hidden, cu_seqlens.to(index_dtype), mask.to(mask_dtype), implementation)
    torch.testing.assert_close(sums, truth, rtol=0, atol=1e-14)


@each_implementation
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0), (1,)], ids=str)
def test_few_or_no_rows(implementation, lengths):
    hidden = torch.full((sum(lengths), 3), 2.5, requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    mask = torch.ones(len(hidden))
    means = segment_mean(hidden, cu_seqlens, mask, implementation)
    assert means.tolist() == [[2.5 * n] * 3 for n in lengths]
    (grad,) = torch.autograd.grad(means.sum(), hidden)
    assert grad.tolist() == [[1.0] * 3 for _ in range(sum(lengths))]


@each_implementation
def test_strided_input(implementation):
    hidden, cu_seqlens, mask = _rows()
    wide = torch.empty(hidden.shape[0] * 2, 5, dtype=F64)
    wide[::2], wide[1::2] = hidden, math.nan
    expected = segment_mean(hidden, cu_seqlens, mask)
    for strided in (wide[::2], hidden.t().contiguous().t()):
        assert not strided.is_contiguous()
        means = segment_mean(strided, cu_seqlens, mask, implementation)
        torch.testing.assert_close(means, expected, rtol=0, atol=1e-15)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_long_sequence_is_no_worse_than_float32_addition(implementation, dtype):
    generator = torch.Generator().manual_seed(2)
    num_rows = 2_000 if implementation == "triton" else 20_000
    hidden = torch.rand(num_rows, 4, generator=generator).to(dtype)
    cu_seqlens, mask = torch.tensor([0, num_rows]), torch.ones(num_rows)
    truth = hidden.double().sum(0)
    serial = torch.zeros(4)
    for row in hidden.float():  # not cumsum, which adds float32 in float64 on the CPU
        serial += row
    sums, _ = segment_sum(hidden, cu_seqlens, mask, implementation)
    error = (sums[0].double() - truth).abs()
    assert (error <= (serial.double() - truth).abs() + 1e-7 * truth).all()


@each_dtype
def test_opcheck(dtype):
    hidden, cu_seqlens, mask = _rows(dtype)
    hidden.requires_grad_()
    torch.library.opcheck(torch.ops.flowrl.segment_sum.default, (hidden, cu_seqlens, mask))
    grad_sum = torch.randn(5, 5, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(
        torch.ops.flowrl.segment_sum_backward.default, (grad_sum, cu_seqlens, mask, dtype)
    )


def test_compiles_without_a_graph_break():
    hidden, cu_seqlens, mask = _rows()
    compiled = torch.compile(segment_mean, backend="aot_eager", fullgraph=True)
    runs = []
    for function in (segment_mean, compiled):
        h = hidden.clone().requires_grad_()
        means = function(h, cu_seqlens, mask)
        runs.append((means, *torch.autograd.grad(means.square().sum(), h)))
    for eager, traced in zip(*runs, strict=True):
        assert torch.equal(eager, traced)


@each_implementation
def test_outputs_are_fully_written(implementation, nan_filled_allocations):
    hidden, cu_seqlens, mask = _rows(torch.float32, width=300)
    hidden.requires_grad_()
    sums, counts = segment_sum(hidden, cu_seqlens, mask, implementation)
    (grad,) = torch.autograd.grad(sums.sum(), hidden)
    assert sums.isfinite().all() and counts.sum() == mask.sum()
    assert grad.sum() == 300 * mask.sum()


@each_implementation
def test_bits_do_not_depend_on_threads(implementation):
    hidden, cu_seqlens, mask = _rows(torch.float32, width=300, lengths=(90, 0, 40, 1, 7))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one, _ = segment_sum(hidden, cu_seqlens, mask, implementation)
    torch.set_num_threads(3)
    three, _ = segment_sum(hidden, cu_seqlens, mask, implementation)
    torch.set_num_threads(before)
    assert torch.equal(one, three)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@each_dtype
@pytest.mark.parametrize("width", [5, 896], ids="H={}".format)
def test_triton_on_the_gpu(dtype, width):
    hidden, cu_seqlens, mask = _rows(dtype, width, lengths=(3, 0, 4000, 1, 6))
    truth, true_counts = _sum_by_hand(hidden, cu_seqlens, mask)
    leaf = hidden.cuda().requires_grad_()
    rest = (cu_seqlens.cuda(), mask.cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    (sums, counts), (again, _) = (segment_sum(leaf, *rest, "triton") for _ in range(2))
    (grad,) = torch.autograd.grad(sums.sum(), leaf)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(sums, again) and counts.tolist() == true_counts
    # Of 4000 float32 values a sum of 32 partial sums loses less than 125 roundings of the total.
    bound = 1e-11 if dtype == F64 else 1e-3
    torch.testing.assert_close(sums.cpu().double(), truth, rtol=0, atol=bound)
    assert torch.equal(grad.cpu(), mask[:, None].to(dtype).expand(-1, width))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, cu, m: (h[0], cu, m), r"\[N, H\], got \[5\]"),
        (lambda h, cu, m: (h.long(), cu, m), "hidden must be one of"),
        (lambda h, cu, m: (h, cu, m[:-1]), r"mask must have shape \[14\], got \[13\]"),
        (lambda h, cu, m: (h, cu, m * 0.5), "0 and 1 only, got 0.5"),
        (lambda h, cu, m: (h, cu, m.cfloat()), "mask must be bool"),
        (lambda h, cu, m: (h, cu[None], m), r"\[B \+ 1\]"),
        (lambda h, cu, m: (h, cu[:0], m), r"\[B \+ 1\]"),
        (lambda h, cu, m: (h, cu.float(), m), "int32 or int64"),
        (lambda h, cu, m: (h, cu[1:], m), "from 0 to the number of tokens 14, got 3 to 14"),
        (lambda h, cu, m: (h, cu[:-1], m), "got 0 to 8"),
        (lambda h, cu, m: (h, cu[[0, 3, 1, 5]], m), "must not decrease"),
        (lambda h, cu, m: (h.to("meta"), cu, m), "mask is on cpu but the tokens are on meta"),
        (lambda h, cu, m: (h, cu, m, "tpu"), "implementation is 'tpu'"),
        (lambda h, cu, m: (*(x.to("meta") for x in (h, cu, m)), "triton"), "'triton' runs on cuda"),
    ],
)
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        segment_mean(*change(*_rows()))
