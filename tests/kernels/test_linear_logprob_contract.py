"""What linear_logprob promises beside its numbers: autograd, compile, memory, errors."""

import math

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.kernels._triton import IS_INTERPRETED
from flowrl.kernels.linear_logprob import linear_logprob, live_implementation, reference

LIVE = sorted({"reference", live_implementation("cpu")})
FORWARD = torch.ops.flowrl.linear_logprob_forward.default
BACKWARD = torch.ops.flowrl.linear_logprob_backward.default
IGNORE = -100


def make_case(num_rows, hidden_size, vocab_size, dtype=torch.float32):
    hidden = torch.randn(num_rows, hidden_size).to(dtype)
    weight = torch.randn(vocab_size, hidden_size).to(dtype)
    target = torch.randint(vocab_size, (num_rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), target


def exact_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logprobs = (hidden.double() @ weight.double().t()).log_softmax(dim=1)
    return logprobs.gather(1, target[:, None]).squeeze(1)


def exact_gradient(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    hidden = hidden.detach().double().requires_grad_()
    exact_logprob(hidden, weight.detach(), target).sum().backward()
    assert hidden.grad is not None
    return hidden.grad


def relative_error(value: Tensor | None, truth: Tensor | None) -> float:
    assert value is not None and truth is not None
    return float((value.double() - truth).norm() / truth.norm())


def test_frozen_weight_gets_no_gradient():
    hidden, weight, target = make_case(5, 4, 200)
    logprob, _ = linear_logprob(hidden, weight.detach(), target)
    logprob.sum().backward()
    assert relative_error(hidden.grad, exact_gradient(hidden, weight, target)) < 1e-5
    detached = hidden.detach(), weight.detach()
    lse, target_logit, mean_logit, tile_lse = FORWARD(*detached, target, 0, 1.0)
    grad_hidden, grad_weight = BACKWARD(
        *(*detached, target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(5), None, 0.0),
        needs_grad_weight=False,
    )
    assert torch.equal(grad_hidden, hidden.grad) and grad_weight.shape == (0, 4)


def test_tied_weight_and_strided_inputs():
    tokens = torch.randint(300, (40,))
    table = torch.randn(8, 300, requires_grad=True)  # transposed below: a strided weight
    target = torch.randint(300, (80,))[::2]
    logprob, _ = linear_logprob(table.t()[tokens].tanh(), table.t(), target, 0.9)
    logprob.sum().backward()
    truth = table.detach().double().requires_grad_()
    exact_logprob(truth.t()[tokens].tanh() / 0.9, truth.t(), target).sum().backward()
    assert relative_error(table.grad, truth.grad) < 1e-5


def test_autocast_casts_inputs_and_returns_gradients_in_their_dtype():
    hidden, weight, target = make_case(12, 16, 300)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob, _ = linear_logprob(hidden, weight.bfloat16(), target)
        logprob.sum().backward()
    rounded = hidden.detach().bfloat16()
    expected, _ = linear_logprob(rounded, weight.detach().bfloat16(), target)
    assert torch.equal(logprob, expected)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32
    truth = exact_gradient(rounded, weight.bfloat16(), target)
    assert relative_error(hidden.grad, truth) < 2**-8


def test_inference_mode():
    hidden, weight, target = make_case(12, 16, 300)
    expected = linear_logprob(hidden, weight, target, entropy=True)
    with torch.inference_mode():
        result = linear_logprob(hidden, weight, target, entropy=True)
    assert torch.equal(result[0], expected[0]) and not result[0].requires_grad
    assert result[1] is not None and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("implementation", LIVE)
def test_compile_without_graph_breaks(implementation):
    hidden, weight, target = make_case(20, 8, 300)
    dropped, buffer = torch.zeros(20), torch.zeros(300, 8)

    def loss(hidden, weight, target, with_buffers):
        buffers = (dropped, buffer) if with_buffers else (None, None)
        logprob, entropy = linear_logprob(
            *(hidden, weight, target, 0.7, not with_buffers, 0.05, IGNORE, *buffers),
            implementation=implementation,
        )
        return logprob.sum() if entropy is None else logprob.sum() + entropy.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for with_buffers in (False, True):
        results = []
        for run in (loss, compiled):
            buffer.zero_()
            value = run(hidden, weight, target, with_buffers)
            grads = torch.autograd.grad(value, (hidden, weight), allow_unused=True)
            grad_weight = buffer.clone() if with_buffers else grads[1]
            results.append((value, grads[0], grad_weight, dropped.clone()))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(traced, eager)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        compiled(hidden, weight, target + 300, False)


def test_compile_with_changing_scalars_and_sizes():
    """From the second value on, torch.compile passes the floats and T as symbols."""
    hidden, weight, target = make_case(5, 4, 200)

    def run(hidden, weight, target, temperature):
        return linear_logprob(hidden, weight, target, temperature)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for num_rows, temperature in ((5, 1.0), (4, 0.7), (3, 0.5), (2, 0.4)):
        arguments = (hidden[:num_rows], weight, target[:num_rows], temperature)
        assert torch.equal(compiled(*arguments), run(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", ["", "_reference"], ids=["device", "reference"])
def test_opcheck(dtype, suffix):
    hidden, weight, target = make_case(9, 4, 200, dtype)
    target[2] = IGNORE
    forward = getattr(torch.ops.flowrl, f"linear_logprob_forward{suffix}").default
    backward = getattr(torch.ops.flowrl, f"linear_logprob_backward{suffix}").default
    opcheck(forward, (hidden, weight, target, 0, 0.7, IGNORE, True))
    lse, target_logit, mean_logit, tile_lse = forward(hidden, weight, target, 0, 0.7)
    required = (hidden, weight, target, 0, 0.7, lse, mean_logit, tile_lse, torch.ones(9))
    opcheck(backward, (*required, torch.ones(9), 0.0))
    buffers = {"dropped_mass": torch.empty(9), "weight_grad": torch.zeros(200, 4)}
    opcheck(backward, (*required, None, 0.1, target_logit - lse), buffers)
    opcheck(backward, (*required, None, 0.1), {"needs_grad_weight": False})
    opcheck(torch.ops.flowrl.linear_logprob_check_target.default, (target, 200, IGNORE))


class LargestTensor(TorchDispatchMode):
    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_grows_with_rows_times_vocabulary(dtype):
    hidden, weight, target = (tensor.detach() for tensor in make_case(700, 8, 3000, dtype))
    with LargestTensor() as largest:
        lse, target_logit, mean_logit, tile_lse = reference.forward(
            hidden, weight, target, 0, 1.0, entropy=True
        )
        for grad_entropy, drop_mass in ((None, 0.05), (torch.ones(700), 0.0)):
            reference.backward(
                *(hidden, weight, target, 0, 1.0, lse, mean_logit, tile_lse, torch.ones(700)),
                grad_entropy,
                drop_mass,
                target_logit - lse,
            )
    block = reference.ROW_BLOCK * reference.VOCAB_SLICE
    assert block <= largest.num_elements <= block < 700 * 3000 / 10


def _operators_run(hidden, weight, target, implementation) -> list[str]:
    with torch.profiler.profile() as profile:
        linear_logprob(hidden, weight, target, implementation=implementation)
    names = [event.key for event in profile.key_averages()]
    return [name for name in names if name.startswith("flowrl::linear_logprob_forward")]


def test_explicit_reference_runs_even_if_another_cpu_kernel_exists():
    hidden, weight, target = make_case(3, 4, 50)
    expected, _ = linear_logprob(hidden, weight, target, implementation="reference")
    library = torch.library.Library("flowrl", "IMPL")

    def ones(hidden, weight_shard, *_):
        one = torch.ones(hidden.shape[0])
        return one, one * 0, one, one[:, None]

    if live_implementation("cpu") == "reference":
        with pytest.raises(ValueError, match="make install"):
            linear_logprob(hidden, weight, target, implementation="cpu")
        library.impl("linear_logprob_forward", ones, "CPU")
        try:
            assert live_implementation("cpu") == "cpu"
            for implementation in (None, "cpu"):
                result, _ = linear_logprob(hidden, weight, target, implementation=implementation)
                assert result.tolist() == [-1, -1, -1]
            result, _ = linear_logprob(hidden, weight, target, implementation="reference")
            assert torch.equal(result, expected)
        finally:
            library._destroy()
    else:
        suffix_free = _operators_run(hidden, weight, target, None)
        assert suffix_free == _operators_run(hidden, weight, target, "cpu")
        assert suffix_free == ["flowrl::linear_logprob_forward"]
        assert _operators_run(hidden, weight, target, "reference") == [
            "flowrl::linear_logprob_forward_reference"
        ]
    assert live_implementation("cuda") in ("reference", "triton")


def test_second_derivative_is_refused():
    hidden, weight, target = make_case(3, 4, 50)
    logprob, _ = linear_logprob(hidden, weight, target)
    (grad,) = torch.autograd.grad(logprob.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def argument_errors():
    hidden, weight, target = torch.zeros(4, 8), torch.zeros(16, 8), torch.zeros(4, dtype=torch.long)
    return {
        "hidden-list": ({"hidden": [1.0]}, "hidden must be a tensor, got list"),
        "hidden-3d": ({"hidden": hidden[None]}, r"got shape \(1, 4, 8\)"),
        "hidden-width-0": ({"hidden": hidden[:, :0], "weight": weight[:, :0]}, "H > 0"),
        "hidden-int": ({"hidden": hidden.long(), "weight": weight.long()}, "got torch.int64"),
        "weight-width": ({"weight": weight[:, :7]}, r"\[V, 8\].*got shape \(16, 7\)"),
        "weight-empty": ({"weight": weight[:0]}, "V > 0"),
        "weight-dtype": ({"weight": weight.bfloat16()}, "weight is torch.bfloat16"),
        "weight-device": ({"weight": weight.to("meta")}, "weight on meta"),
        "target-length": ({"target": target[:3]}, r"target must be \[4\]"),
        "target-2d": ({"target": target[:, None]}, r"got shape \(4, 1\)"),
        "target-int32": ({"target": target.int()}, "got torch.int32"),
        "target-too-large": ({"target": target + 16}, r"target\[0\] is 16, outside"),
        "target-negative": ({"target": target - 1}, r"target\[0\] is -1, outside"),
        "temperature-0": ({"temperature": 0.0}, "temperature must be positive .* got 0.0"),
        "temperature-inf": ({"temperature": math.inf}, "got inf"),
        "temperature-nan": ({"temperature": math.nan}, "got nan"),
        "temperature-tiny": ({"temperature": 1e-39}, "inverse in float32, got 1e-39"),
        "temperature-none": ({"temperature": None}, "got None"),
        "temperature-text": ({"temperature": "1"}, "got '1'"),
        "temperature-bool": ({"temperature": True}, "got True"),
        "temperature-tensor": ({"temperature": torch.ones(4)}, r"got tensor\("),
        "entropy-text": ({"entropy": "no"}, "entropy must be True or False, got 'no'"),
        "entropy-number": ({"entropy": 2}, "entropy must be True or False, got 2"),
        "drop-mass-none": ({"drop_mass": None}, "got None"),
        "drop-mass-negative": ({"drop_mass": -0.1}, "got -0.1"),
        "drop-mass-1": ({"drop_mass": 1.0}, r"drop_mass must be in \[0, 1\)"),
        "drop-mass-nan": ({"drop_mass": math.nan}, "got nan"),
        "memory-budget": ({"memory_budget": -1}, "got -1"),
        "memory-budget-nan": ({"memory_budget": math.nan}, "got nan"),
        "ignore-index": ({"ignore_index": 0.5}, "got 0.5"),
        "ignore-index-large": ({"ignore_index": 2**63}, "64 bits, got 9223372036854775808"),
        "dropped-mass-list": ({"dropped_mass": [0.0] * 4}, "dropped_mass must be a tensor or None"),
        "dropped-mass-expanded": ({"dropped_mass": torch.zeros(1).expand(4)}, "share memory"),
        "weight-grad-expanded": ({"weight_grad": torch.zeros(8).expand(16, 8)}, "share memory"),
        "dropped-mass-shape": ({"dropped_mass": torch.zeros(3)}, r"shape \(4,\), got \(3,\)"),
        "dropped-mass-dtype": ({"dropped_mass": target}, "must be float32, got torch.int64"),
        "weight-grad-shape": ({"weight_grad": weight.t()}, r"shape \(16, 8\), got \(8, 16\)"),
        "weight-grad-dtype": ({"weight_grad": weight.bfloat16()}, "got torch.bfloat16"),
        "weight-grad-device": ({"weight_grad": weight.to("meta")}, "weight_grad is on meta"),
        "implementation": ({"implementation": "cuda"}, "'reference', 'triton', 'cpu'"),
        "triton-float64": (
            {"implementation": "triton", "hidden": hidden.double(), "weight": weight.double()},
            "'triton'.*implementation=None",
        ),
    }


@pytest.mark.parametrize("name", argument_errors())
def test_wrong_arguments(name):
    arguments = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(16, 8),
        "target": torch.zeros(4, dtype=torch.long),
    }
    replacement, message = argument_errors()[name]
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | replacement))


def operator_errors():
    rows, fewer = torch.ones(4), torch.ones(3)
    return {
        "hidden-width-0": ({"hidden": torch.ones(4, 0)}, "hidden must be .* H > 0"),
        "weight-width": ({"weight_shard": torch.ones(200, 4)}, r"weight must be \[V, 8\]"),
        "weight-dtype": ({"weight_shard": torch.ones(200, 8).half()}, "cast one to the other's"),
        "target-length": ({"target": torch.zeros(3, dtype=torch.long)}, "target must be"),
        "target-int32": ({"target": torch.zeros(4, dtype=torch.int32)}, "target must be int64"),
        "temperature-0": ({"temperature": 0.0}, "temperature must be positive"),
        "temperature-tiny": ({"temperature": 1e-39}, "temperature must be positive"),
        "lse": ({"lse": fewer}, "lse must have shape"),
        "mean_logit": ({"mean_logit": fewer}, "mean_logit must have shape"),
        "tile_lse": ({"tile_lse": rows[:, None]}, "tile_lse must have shape"),
        "grad_logprob": ({"grad_logprob": fewer}, "grad_logprob must have shape"),
        "grad_entropy": ({"grad_entropy": fewer}, "grad_entropy must have shape"),
        "logprob": ({"logprob": fewer}, "logprob must have shape"),
        "dropped_mass": ({"dropped_mass": fewer}, "dropped_mass must have shape"),
        "weight_grad": ({"weight_grad": torch.zeros(100, 8)}, "weight_grad must have shape"),
    }


@pytest.mark.parametrize("suffix", ["", "_reference", *(["_triton"] if IS_INTERPRETED else [])])
@pytest.mark.parametrize("name", operator_errors())
def test_operators_refuse_what_does_not_fit(name, suffix):
    """They are public: a size that is not the others' must not be read beyond."""
    inputs = {
        "hidden": torch.ones(4, 8),
        "weight_shard": torch.ones(200, 8),
        "target": torch.zeros(4, dtype=torch.long),
        "vocab_start": 0,
        "temperature": 1.0,
    }
    rows = torch.ones(4)
    sums = {"lse": rows, "mean_logit": rows, "tile_lse": torch.ones(4, 2), "grad_logprob": rows}
    replacement, message = operator_errors()[name]
    operators = ["linear_logprob_backward"]
    if replacement.keys() <= inputs.keys():
        operators.append("linear_logprob_forward")
    for operator in operators:
        arguments = dict(inputs)
        if operator == "linear_logprob_backward":
            arguments |= sums | {"grad_entropy": None, "drop_mass": 0.1}
        with pytest.raises(ValueError, match=message):
            getattr(torch.ops.flowrl, operator + suffix)(**(arguments | replacement))


def test_reference_refuses_kept_logits():
    hidden, weight, target = make_case(3, 4, 50)
    kept = torch.empty(3, 50, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="kept_logits=None"):
        torch.ops.flowrl.linear_logprob_forward_reference(
            hidden, weight, target, 0, 1.0, kept_logits=kept
        )
