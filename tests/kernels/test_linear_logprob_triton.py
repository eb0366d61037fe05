"""The Triton head's own paths, on CUDA or in Triton's interpreter: small shapes, odd edges.

What it shares with the other implementations is tested with theirs, in test_linear_logprob.py.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.multiprocessing.reductions import StorageWeakRef

from flowrl.kernels._triton import HAS_KERNELS

if not HAS_KERNELS:
    pytest.skip("needs triton and CUDA or its interpreter", allow_module_level=True)

import flowrl.kernels.linear_logprob as package
from flowrl.kernels.linear_logprob import gpu, gpu_backward, linear_logprob, reference
from flowrl.kernels.linear_logprob.gpu_blocks import NAMES, TABLE, device_kind, launch_options

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = torch.ops.flowrl
FORWARD = OPS.linear_logprob_forward_triton.default
BACKWARD = OPS.linear_logprob_backward_triton.default
IGNORE = -100
# Of the gradients of the logits: nothing but the products' own errors in float32; one rounding.
# The interpreter computes bfloat16 inputs in float32.
GRAD_TOLERANCES = {torch.float32: 1e-5, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def make_case(num_rows, hidden_size, vocab_size, dtype=torch.float32, scale=2.0):
    hidden = torch.randn(num_rows, hidden_size).to(DEVICE, dtype)
    weight = (torch.randn(vocab_size, hidden_size) * scale / hidden_size**0.5).to(DEVICE, dtype)
    target = torch.randint(vocab_size, (num_rows,)).to(DEVICE)
    return hidden, weight, target


def exact_backward(hidden, weight, target, temperature, grad_logprob, grad_entropy):
    """Both gradients in float64 from whole logits, ignored rows left out."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logprobs = (hidden @ weight.t() / temperature).log_softmax(dim=1)
    chosen = logprobs.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    is_real = target != IGNORE
    loss = (torch.where(is_real, chosen, 0) * grad_logprob.double()).sum()
    if grad_entropy is not None:
        entropy = torch.where(is_real, -(logprobs.exp() * logprobs).sum(1), 0)
        loss = loss + (entropy * grad_entropy.double()).sum()
    return torch.autograd.grad(loss, (hidden, weight))


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp(min=1e-300))


# H = 19 takes addresses, H = 48 descriptors (16-bit dtypes); V = 600 has a whole and a partial
# block of 256 and an odd number of tiles; 33 rows end in a block of one.
PATHS = [
    ((33, 19, 300), torch.float32),
    ((33, 19, 300), torch.float16),
    ((33, 48, 600), torch.float16),
    ((33, 48, 600), torch.bfloat16),
    ((1, 8, 130), torch.float32),
    ((1, 8, 130), torch.bfloat16),
]


@pytest.mark.parametrize("shape,dtype", PATHS, ids=str)
def test_exact_backward_of_every_path(shape, dtype, nan_filled_empty):
    """Recomputed and kept, with and without an entropy, gradients as small as a mean's."""
    hidden, weight, target = make_case(*shape, dtype=dtype)
    num_rows, _, vocab_size = shape
    grad_logprob, grad_entropy = (1e-6 * torch.randn(2, num_rows)).to(DEVICE)
    if num_rows > 1:
        target[::5] = IGNORE
        grad_logprob[3], grad_entropy[3] = 0, 0
    kept = torch.full((num_rows, -(-vocab_size // 128) * 128), torch.nan).to(DEVICE, dtype)
    lse, target_logit, mean_logit, tile_lse = FORWARD(
        hidden, weight, target, 0, 0.35, IGNORE, True, kept
    )
    logprob = (target_logit - lse).clamp(max=0)
    for entropy_grad in (None, grad_entropy):
        truth = exact_backward(hidden, weight, target, 0.35, grad_logprob, entropy_grad)
        for kept_logits in (None, kept):
            dropped = torch.full((num_rows,), torch.nan).to(DEVICE)
            grads = BACKWARD(
                *(hidden, weight, target, 0, 0.35, lse, mean_logit, tile_lse),
                *(grad_logprob, entropy_grad, 0.0, logprob, IGNORE, dropped, None, kept_logits),
            )
            for grad, exact in zip(grads, truth, strict=True):
                is_rounded_twice = dtype != torch.float32 and kept_logits is not None
                tolerance = GRAD_TOLERANCES[dtype] * (2 if is_rounded_twice else 1)
                assert relative_error(grad, exact) < tolerance
            is_dead = (target == IGNORE) | (grad_logprob == 0)
            assert not grads[0][is_dead].any() and not dropped.any()


def test_whole_blocks_without_a_gradient_cost_nothing_and_harm_nothing():
    """Rows that are left out hold NaN: a product that touched them would show it."""
    hidden, weight, target = make_case(40, 16, 300, torch.float16)
    target[:35] = IGNORE
    hidden[:35] = torch.nan
    lse, target_logit, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0)
    assert not lse[:35].any() and not tile_lse[:35].any() and not target_logit[:35].any()
    grad_logprob = torch.ones(40, device=DEVICE)
    grad_logprob[37] = 0
    grads = BACKWARD(
        hidden, weight, target, 0, 1.0, lse, mean_logit, tile_lse, grad_logprob, None, 0.0
    )
    live = torch.tensor([35, 36, 38, 39], device=DEVICE)
    truth = exact_backward(hidden[live], weight, target[live], 1.0, grad_logprob[live], None)
    assert relative_error(grads[0][live], truth[0]) < 2**-10
    assert relative_error(grads[1], truth[1]) < 2**-10
    assert torch.equal(grads[0].abs().sum(1).nonzero().squeeze(1), live)


def test_slices_add_up(monkeypatch):
    hidden, weight, target = make_case(20, 16, 900)
    arguments = (hidden, weight, target, 0, 0.7)
    lse, _, mean_logit, tile_lse = FORWARD(*arguments, IGNORE, True)
    rest = (lse, mean_logit, tile_lse, *torch.randn(2, 20).to(DEVICE), 0.0)
    assert gpu_backward.slice_entries(32, 4, 900) == 1024
    whole = BACKWARD(*arguments, *rest)
    monkeypatch.setattr(gpu_backward, "SLICE_BYTES", 1)
    assert gpu_backward.slice_entries(32, 4, 900) == 256
    sliced = BACKWARD(*arguments, *rest)
    torch.testing.assert_close(sliced[0], whole[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(sliced[1], whole[1])
    again = BACKWARD(*arguments, *rest)
    assert torch.equal(sliced[0], again[0]) and torch.equal(sliced[1], again[1])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_in_its_dtype_or_a_strided_buffer(dtype):
    hidden, weight, target = make_case(9, 8, 200, torch.bfloat16)
    lse, _, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0)
    arguments = (hidden, weight, target, 0, 1.0, lse, mean_logit, tile_lse)
    rest = (torch.ones(9, device=DEVICE), None, 0.0, None, IGNORE, None)
    exact = BACKWARD(*arguments, *rest)[1]
    written = BACKWARD(*arguments, *rest, grad_weight_dtype=dtype)[1]
    assert torch.equal(written, exact if dtype is None else exact.to(dtype))
    buffer = torch.ones(8, 200, device=DEVICE).t()
    grad_hidden, nothing = BACKWARD(*arguments, *rest, buffer, None, False)
    assert nothing.shape == (0, 8)
    torch.testing.assert_close(buffer, 1 + exact)


def test_bits_of_a_row_do_not_depend_on_the_others(nan_filled_empty):
    hidden, weight, target = make_case(40, 24, 300, torch.float16)
    target[7] = IGNORE
    whole = FORWARD(hidden, weight, target, 0, 0.7, IGNORE, True)
    # The interpreter's product is NumPy's, in which the position of a row changes its bits.
    cases = [slice(1), slice(33), slice(None)]
    if DEVICE == "cuda":
        cases += [slice(35, 36), slice(3, None), torch.randperm(40)]
    for rows in cases:
        part = FORWARD(hidden[rows], weight, target[rows], 0, 0.7, IGNORE, True)
        for value, one in zip(whole, part, strict=True):
            assert torch.equal(value[rows], one)
    others = torch.arange(40, device=DEVICE) % 3 > 0
    hidden[others] = torch.nan
    part = FORWARD(hidden, weight, target, 0, 0.7, IGNORE, True)
    for value, one in zip(whole, part, strict=True):
        assert torch.equal(value[~others], one[~others])


def test_memory_budget_buys_the_kept_softmax(monkeypatch):
    hidden, weight, target = make_case(20, 16, 300)
    sizes = []
    run = gpu.forward_kernel.run

    def record(*args, **kwargs):
        sizes.append(kwargs["KEEP"])
        return run(*args, **kwargs)

    monkeypatch.setattr(gpu.forward_kernel, "run", record)
    grads = []
    for budget, drop_mass in ((0, 0.0), (20 * 384 * 4 - 1, 0.0), (20 * 384 * 4, 0.0), (10**6, 0.1)):
        leaf = hidden.clone().requires_grad_()
        logprob, _ = linear_logprob(
            *(leaf, weight, target, 0.5, False, drop_mass),
            memory_budget=budget,
            implementation="triton",
        )
        (grad,) = torch.autograd.grad(logprob.sum(), leaf)
        grads.append(grad)
    assert sizes == [False, False, True, False]
    torch.testing.assert_close(grads[2], grads[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        linear_logprob(
            hidden.requires_grad_(),
            weight,
            target,
            memory_budget=10**6,
            implementation="triton",
        )
    assert sizes[-1] is False


def test_kept_softmax_does_not_outlive_the_backward(monkeypatch):
    hidden, weight, target = make_case(20, 16, 300)
    allocate, kept = package.kept_logits_buffer, []

    def record(*args):
        kept.append(StorageWeakRef((buffer := allocate(*args)).untyped_storage()))
        return buffer

    monkeypatch.setattr(package, "kept_logits_buffer", record)
    leaf = hidden.clone().requires_grad_()
    logprob, _ = linear_logprob(leaf, weight, target, memory_budget=10**6, implementation="triton")
    (first,) = torch.autograd.grad(logprob.sum(), leaf, retain_graph=True)
    assert not kept[0].expired()
    (second,) = torch.autograd.grad(logprob.sum(), leaf)
    assert torch.equal(first, second)
    assert kept[0].expired() and logprob.requires_grad  # the caller holds logprob, as for a metric


def test_one_row_is_read_alike_whatever_its_stride():
    """The stride of a dimension of one row means nothing, but TMA would refuse that of `one`."""
    row = torch.randn(16, 1, device=DEVICE).half()
    one, weight = row.t(), torch.randn(300, 16, device=DEVICE).half()
    assert one.stride() == (1, 1)
    assert gpu.can_use_tma(one, weight) == gpu.can_use_tma(row.flatten()[None], weight)
    assert gpu.interpretable(one).stride() == (16, 1)
    target = torch.tensor([7], device=DEVICE)
    for result, expected in zip(
        FORWARD(one, weight, target, 0, 1.0),
        FORWARD(row.flatten()[None], weight, target, 0, 1.0),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_kept_logits_need_the_logprob():
    hidden, weight, target = make_case(3, 8, 50)
    kept = torch.empty(3, 128, device=DEVICE)
    lse, _, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 1.0, kept_logits=kept)
    arguments = (hidden, weight, target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones_like(lse))
    with pytest.raises(ValueError, match="logprob"):
        BACKWARD(*arguments, None, 0.0, kept_logits=kept)


def test_target_outside_the_vocabulary_gives_nan_in_its_row():
    hidden, weight, target = make_case(5, 8, 130)
    target[2], target[3] = 130, -7
    _, target_logit, _, _ = FORWARD(hidden, weight, target, 0, 1.0)
    assert target_logit[2:4].tolist() == [0, 0]
    whole = reference.forward(hidden, weight, target, 0, 1.0)
    torch.testing.assert_close(target_logit, whole[1], rtol=1e-5, atol=1e-6)


def test_tied_strided_weight():
    tokens = torch.randint(300, (20,)).to(DEVICE)
    table = torch.randn(8, 300, device=DEVICE, requires_grad=True)
    target = torch.randint(300, (40,)).to(DEVICE)[::2]
    logprob, _ = linear_logprob(
        table.t()[tokens].tanh(), table.t(), target, 0.9, implementation="triton"
    )
    logprob.sum().backward()
    truth = table.detach().double().requires_grad_()
    logits = truth.t()[tokens].tanh() @ truth / 0.9
    logits.log_softmax(1).gather(1, target[:, None]).sum().backward()
    assert table.grad is not None and truth.grad is not None
    assert relative_error(table.grad, truth.grad) < 1e-5


def test_opcheck():
    hidden, weight, target = make_case(5, 8, 200)
    target[2] = IGNORE
    opcheck(FORWARD, (hidden, weight, target, 0, 0.7, IGNORE, True))
    lse, target_logit, mean_logit, tile_lse = FORWARD(hidden, weight, target, 0, 0.7)
    assert tile_lse.shape == (5, 2) and tile_lse.stride() == (1, 5)
    ones = torch.ones_like(lse)
    required = (hidden, weight, target, 0, 0.7, lse, mean_logit, tile_lse, ones)
    opcheck(BACKWARD, (*required, ones, 0.0))
    buffers = {"dropped_mass": ones.clone(), "weight_grad": torch.zeros_like(weight)}
    opcheck(BACKWARD, (*required, None, 0.0, target_logit - lse), buffers)


def test_compile():
    hidden, weight, target = make_case(5, 8, 200)

    def run(hidden, weight, target, temperature):
        return linear_logprob(hidden, weight, target, temperature, implementation="triton")[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for num_rows, temperature in ((5, 1.0), (4, 0.7)):
        leaf = hidden[:num_rows].clone().requires_grad_()
        arguments = (leaf, weight, target[:num_rows], temperature)
        (grad,) = torch.autograd.grad(compiled(*arguments).sum(), leaf)
        (expected,) = torch.autograd.grad(run(*arguments).sum(), leaf)
        assert torch.equal(compiled(*arguments), run(*arguments))
        assert torch.equal(grad, expected)


# NVIDIA's table: KiB of shared memory that a block may have.
SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", SHARED_KIB, ids=str)
def test_blocks_fit_the_shared_memory(capability, dtype):
    """The stages of both operands of the products."""
    for is_tma in {False, capability[0] >= 9 and dtype != torch.float32}:
        kind = device_kind(capability, dtype, is_tma)
        for name in NAMES:
            if name.startswith("pair"):
                continue
            rows, columns, depth, _, _, num_stages = launch_options(TABLE, name, kind).values()
            num_bytes = (rows + columns) * depth * dtype.itemsize * num_stages
            assert num_bytes / 1024 < SHARED_KIB[capability]


def test_every_kernel_has_blocks_for_every_kind_of_device():
    kinds = {
        device_kind(capability, dtype, is_tma)
        for capability in [(8, 7), *SHARED_KIB]
        for dtype in (torch.bfloat16, torch.float32)
        for is_tma in (False, capability[0] in (9, 10) and dtype != torch.float32)
    }
    assert len(kinds) == 7
    assert {name: set(TABLE[name]) for name in NAMES} == dict.fromkeys(NAMES, kinds)
    with pytest.raises(ValueError, match=r"this device has 7\.5"):
        device_kind((7, 5), torch.float16, False)


# T V above 2^31, and the same on a size that the interpreter manages.
SAMPLED = [
    pytest.param((40, 24, 2600), id="small"),
    pytest.param(
        *((32768, 896, 152064),),
        id="large",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]


@pytest.mark.parametrize("shape", SAMPLED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampled_rows_and_entries_match_float64(shape, dtype):
    """Rows and vocabulary entries from the first to the last, exact and with mass left out."""
    (num_rows, hidden_size, vocab_size), temperature = shape, 0.7
    with torch.device(DEVICE):
        hidden = torch.randn(num_rows, hidden_size).to(dtype)
        weight = (torch.randn(vocab_size, hidden_size) * 8 / hidden_size**0.5).to(dtype)
        target = torch.randint(vocab_size, (num_rows,))
        grad = torch.randn(num_rows)
        rows = torch.linspace(0, num_rows - 1, 32).long()
        entries = torch.linspace(0, vocab_size - 1, 64).long()
        dropped = torch.full((num_rows,), torch.nan)
    call = (hidden, weight, target, 0, temperature)
    lse, target_logit, mean_logit, tile_lse = FORWARD(*call, IGNORE, True)
    wide = weight.double()
    logits = hidden[rows].double() @ wide.t() / temperature
    logprobs = logits.log_softmax(1)
    chosen = logprobs.gather(1, target[rows, None]).squeeze(1)
    torch.testing.assert_close((target_logit - lse)[rows].double(), chosen, atol=1e-4, rtol=0)
    mean = (logprobs.exp() * logits).sum(1)
    torch.testing.assert_close(mean_logit[rows].double(), mean, atol=2e-4, rtol=0)

    one_hot = torch.zeros_like(logprobs).scatter_(1, target[rows, None], 1)
    by_rows = (grad[rows, None] * (one_hot - logprobs.exp())) @ wide / temperature
    chosen_logits = hidden.double() @ wide[entries].t() / temperature
    is_target = target[:, None] == entries
    d = grad[:, None] * (is_target.double() - (chosen_logits - lse[:, None].double()).exp())
    by_entries = d.t() @ hidden.double() / temperature

    sums = (lse, mean_logit, tile_lse, grad, None)
    logprob = (target_logit - lse).clamp(max=0)
    grad_hidden, grad_weight = BACKWARD(*call, *sums, 0.0, logprob)
    assert relative_error(grad_hidden[rows], by_rows) < GRAD_TOLERANCES[dtype]
    assert relative_error(grad_weight[entries], by_entries) < GRAD_TOLERANCES[dtype]

    grad_hidden, grad_weight = BACKWARD(*call, *sums, 2**-9, logprob, IGNORE, dropped)
    assert 0 < dropped.max() <= 2**-9  # 0: the exact kernels did the work
    bound = grad[rows].abs() * dropped[rows] * wide.norm(dim=1).max() / temperature
    error = (grad_hidden[rows].double() - by_rows).norm(dim=1)
    assert (error <= bound + GRAD_TOLERANCES[dtype] * by_rows.norm(dim=1)).all()
    # An entry misses what rows left out of its tile, each at most g times the mass it left out.
    lost = (grad.abs() * dropped).double() @ hidden.double().norm(dim=1) / temperature
    error = (grad_weight[entries].double() - by_entries).norm(dim=1)
    assert (error <= lost + GRAD_TOLERANCES[dtype] * by_entries.norm()).all()


def test_without_triton_the_remedy_is_named():
    """In a process of its own: it is decided at the import."""
    call = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from flowrl.kernels.linear_logprob import linear_logprob
arguments = torch.zeros(2, 8), torch.zeros(9, 8), torch.zeros(2, dtype=torch.long)
linear_logprob(*arguments)
linear_logprob(*arguments, implementation="triton")
"""
    result = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: implementation 'triton' is not available here")
    assert "the triton package" in message and "TRITON_INTERPRET=1" in message
