"""What every op over packed sequences does about a wrong cu_seqlens or mask."""

import pytest
import torch
from torch import Tensor

from flowrl.kernels import _native
from flowrl.kernels._triton import HAS_KERNELS
from flowrl.kernels.flow_balance import sequence_sums
from flowrl.kernels.segment_mean import segment_sum
from flowrl.kernels.token_clip import token_clip

OPS = torch.ops.flowrl
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _sequence_sums(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    rewards = x.new_ones(cu_seqlens.shape[0] - 1)
    return sequence_sums(x, x.detach(), x.detach(), mask, cu_seqlens, rewards)


def _segment_sum(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    return segment_sum(x[:, None], cu_seqlens, mask)[0]


def _token_clip(x: Tensor, mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    return token_clip(x, x.detach(), x.detach(), mask, cu_seqlens)


each_op = pytest.mark.parametrize("op", [_sequence_sums, _segment_sum, _token_clip])


@each_op
def test_compiled_ops_look_at_the_values(op):
    compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
    x, mask = torch.linspace(-1.0, -0.5, 6).requires_grad_(), torch.tensor([1.0, 1, 0, 1, 1, 1])
    for cu in ([0, 6], [0, 4, 6]):
        results = []
        for run in (op, compiled):
            sums = run(x, mask, torch.tensor(cu))
            results.append((sums, *torch.autograd.grad(sums.sum(), x)))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)
    for cu, message in (
        ([0, 12], "from 0 to the number of tokens 6, got 0 to 12"),
        ([0, 2**21], "got 0 to 2097152"),
        ([1, 6], "got 1 to 6"),
        ([0, 4], "got 0 to 4"),
        ([0, 8, 6], "must not decrease"),
    ):
        with pytest.raises(ValueError, match=message):
            compiled(x, mask, torch.tensor(cu))
    with pytest.raises(ValueError, match=r"0 and 1 only, got 0.5 at 2"):
        compiled(x, mask.clone().index_fill_(0, torch.tensor([2]), 0.5), torch.tensor([0, 6]))


@each_op
@pytest.mark.parametrize("name", ["mask", "cu_seqlens"])
def test_a_list_is_no_tensor(op, name):
    arguments = {"mask": torch.ones(6), "cu_seqlens": torch.tensor([0, 6])}
    if op is _sequence_sums and name == "cu_seqlens":
        pytest.skip("this helper takes the number of sequences from it")
    with pytest.raises(ValueError, match=f"{name} must be a tensor, got list"):
        op(torch.ones(6), **(arguments | {name: arguments[name].tolist()}))


def test_opcheck_of_the_check():
    mask, cu_seqlens = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 3], dtype=torch.int32)
    for packed in (
        (mask, cu_seqlens),
        (mask.bool(), cu_seqlens.long()),
        (mask[::2], cu_seqlens[:2] * 2),
    ):
        torch.library.opcheck(OPS.check_packed.default, packed)


@pytest.mark.skipif(not _native.load(), reason="needs the C++ library")
@pytest.mark.parametrize("cu", [[0, 12], [0, 2**21], [1, 6], [0, 8, 6], []], ids=str)
def test_operators_stay_within_their_tensors(cu):
    cu_seqlens, x, mask = torch.tensor(cu, dtype=torch.int64), torch.ones(6), torch.ones(6).bool()
    per_sequence = torch.ones(max(len(cu) - 1, 0), dtype=torch.float64)
    rule = (per_sequence.float(), "clip", 0.2, 0.2)
    for operator, arguments in (
        (OPS.sequence_sums, (x, x, x, mask, cu_seqlens, *rule)),
        (OPS.sequence_sums_backward, (per_sequence, x, x, mask, cu_seqlens, *rule)),
        (OPS.segment_sum, (x[:, None], cu_seqlens, mask)),
        (OPS.segment_sum_backward, (rule[0][:, None], cu_seqlens, mask, torch.float32)),
        (OPS.token_clip, (x, x, x, mask, cu_seqlens, None, None, 0.2, 0.2, 3.0, 0.0)),
        (OPS.token_clip_backward, (per_sequence, x, cu_seqlens)),
    ):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            operator(*arguments)


@pytest.mark.skipif(not HAS_KERNELS, reason="needs triton and CUDA or its interpreter")
@pytest.mark.parametrize(
    ("cu", "inside"),
    [([0, 4], [0, 4]), ([1, 3, 4], [1, 3, 4]), ([0, 2**21], [0, 6]), ([-3, 8], [0, 6]), ([5], [])],
    ids=str,
)
def test_triton_stays_within_the_tokens(cu, inside, nan_filled_empty):
    """On a GPU nobody looks at the values: tokens outside count as none, with gradient 0."""
    from flowrl.kernels.flow_balance import gpu as flow_balance
    from flowrl.kernels.segment_mean import gpu as segment_mean
    from flowrl.kernels.token_clip import gpu as token_clip

    cu_seqlens = torch.tensor(cu, device=DEVICE)
    # The tokens are a part of a larger tensor, whose rest would show in a sum.
    x, mask = torch.full((2, 40), 100.0, device=DEVICE), torch.ones(40, device=DEVICE).bool()
    x[0, :6] = -1
    x, mask = x[0, :6], mask[:6]
    coefficient = torch.arange(2, len(cu) + 1, device=DEVICE, dtype=torch.float64)
    rule = (coefficient.float(), "clip", 0.2, 0.2)
    expected, counts = torch.zeros(6), []
    for b, (begin, end) in enumerate(zip(inside[:-1], inside[1:], strict=True)):
        expected[begin:end] = 2 + b
        counts.append(end - begin)

    sums = flow_balance.sequence_sums(x, x, x, mask, cu_seqlens, *rule)
    assert sums[:, flow_balance.reference.POLICY].tolist() == [-count for count in counts]
    grad = flow_balance.sequence_sums_backward(coefficient, x, x, mask, cu_seqlens, *rule)
    assert grad.tolist() == expected.tolist()
    sums, num_rows = segment_mean.segment_sum(x[:, None], cu_seqlens, mask)
    assert sums[:, 0].tolist() == [-count for count in counts] and num_rows.tolist() == counts
    grad = segment_mean.segment_sum_backward(rule[0][:, None], cu_seqlens, mask, torch.float32)
    assert grad[:, 0].tolist() == expected.tolist()
    options = (None, None, 0.2, 0.2, 3.0, 0.0)
    sums, unit = token_clip.token_clip(x, x, -x, mask, cu_seqlens, *options)
    assert sums[:, token_clip.reference.LOSS].tolist() == [-count for count in counts]
    assert unit.tolist() == [-float(value > 0) for value in expected]
    grad = token_clip.token_clip_backward(coefficient, unit, cu_seqlens)
    assert (-grad).tolist() == expected.tolist()
