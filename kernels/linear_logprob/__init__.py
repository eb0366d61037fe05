"""Log-probabilities of target tokens from hidden states, without the logits.

    z_tv = hidden_t . weight_v / temperature          lse_t = log sum_v exp(z_tv)
    logprob_t = z_t,target - lse_t                    entropy_t = lse_t - sum_v softmax(z_t)_v z_tv

Two operators work on any contiguous shard of the vocabulary, so a vocabulary-parallel caller puts
its collectives between them and is no second kernel. Their schemas are below; shapes, with T rows,
H hidden size, V entries in the shard and tiles = ceil(V / 128):

`flowrl::linear_logprob_forward` returns, in float32 (float64 for float64 inputs),
    lse [T], target_logit [T] (0 where the target is not in this shard),
    mean_logit [T] (sum_v softmax_v z_v with the softmax of the shard; 0 without `entropy`) and
    tile_lse [T, tiles], the log-sum-exp of each run of 128 entries.
  All of them are 0 in ignored rows. Shards s merge as lse = logsumexp_s lse_s, target_logit =
  sum_s target_logit_s, mean_logit = sum_s exp(lse_s - lse) mean_logit_s.
  tile_lse of the Triton kernels is a transposed view. `kept_logits` [T, 128 tiles], of the dtype of
  `hidden`, is a buffer that Triton and C++ (not for float16) fill with exp(z - tile_lse), each in
  an order of its own, for their own backward; the reference takes None only.

`flowrl::linear_logprob_backward` takes lse, mean_logit and logprob of the whole vocabulary and the
  tile_lse of the shard, and returns
    grad_hidden [T, H], the part of this shard, to be summed over shards, and
    grad_weight [V, H], or [0, H] if `weight_grad` [V, H] was given, which is added to instead, or
    if needs_grad_weight is False; both float32 (float64 for float64 inputs), but grad_weight is
    written in `grad_weight_dtype` if that is given, rounded once from sums of the wider type.
  drop_mass > 0 lets row t leave out softmax mass of this shard up to
    drop_mass * min(1, 8 * max(1 - p_target, 2^-16)),    1 - p_target = -expm1(logprob),
  in whole tiles and as many as fit, never the target's; a caller with n shards that wants the bound
  for the row as a whole passes drop_mass / n. Without `logprob` the shard's mass outside
  the target's tile stands for 1 - p_target: a lower bound, so less is left out. `dropped_mass` [T]
  receives an upper bound of what was. With grad_entropy or kept_logits the backward is exact.

Both are primitives without autograd formula: `linear_logprob` and vocabulary-parallel callers wrap
the pair in an autograd.Function. The scheme of recomputing logits in the backward and skipping what
carries no mass follows Cut Cross-Entropy (arXiv 2411.09009, section 4); there whole blocks below a
fixed probability are skipped, here (row, tile) pairs under a bound for every row.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl.kernels import _native
from flowrl.kernels._triton import HAS_KERNELS, IS_INTERPRETED
from flowrl.kernels.linear_logprob import reference
from flowrl.kernels.linear_logprob.checks import check_inputs, is_number

__all__ = ["kept_logits_buffer", "linear_logprob", "live_implementation"]

FORWARD_SCHEMA = (
    "(Tensor hidden, Tensor weight_shard, Tensor target, int vocab_start, float temperature, "
    "int ignore_index=-100, bool entropy=False, Tensor(a!)? kept_logits=None) "
    "-> (Tensor lse, Tensor target_logit, Tensor mean_logit, Tensor tile_lse)"
)
BACKWARD_SCHEMA = (
    "(Tensor hidden, Tensor weight_shard, Tensor target, int vocab_start, float temperature, "
    "Tensor lse, Tensor mean_logit, Tensor tile_lse, Tensor grad_logprob, Tensor? grad_entropy, "
    "float drop_mass, Tensor? logprob=None, int ignore_index=-100, "
    "Tensor(a!)? dropped_mass=None, Tensor(b!)? weight_grad=None, Tensor? kept_logits=None, "
    "bool needs_grad_weight=True, ScalarType? grad_weight_dtype=None) "
    "-> (Tensor grad_hidden, Tensor grad_weight)"
)
CHECK_SCHEMA = "(Tensor target, int vocab_size, int ignore_index) -> Tensor"

_native.load()
_library = torch.library.Library("flowrl", "FRAGMENT")


def _forward_fake(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    ignore_index: int = -100,
    entropy: bool = False,
    kept_logits: Tensor | None = None,
    operators: str = "device",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    num_rows = hidden.shape[0]
    num_tiles = (weight_shard.shape[0] + reference.TILE - 1) // reference.TILE
    is_tile_major = _runs_triton(operators, hidden)
    tile_shape = (num_tiles, num_rows) if is_tile_major else (num_rows, num_tiles)
    tile_lse = hidden.new_empty(tile_shape, dtype=dtype)
    return (
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows, dtype=dtype),
        tile_lse.t() if is_tile_major else tile_lse,
    )


def _backward_fake(
    hidden: Tensor,
    weight_shard: Tensor,
    target: Tensor,
    vocab_start: int,
    temperature: float,
    lse: Tensor,
    mean_logit: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    drop_mass: float,
    logprob: Tensor | None = None,
    ignore_index: int = -100,
    dropped_mass: Tensor | None = None,
    weight_grad: Tensor | None = None,
    kept_logits: Tensor | None = None,
    needs_grad_weight: bool = True,
    grad_weight_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    has_result = needs_grad_weight and weight_grad is None
    num_weights = weight_shard.shape[0] if has_result else 0
    return (
        torch.empty_like(hidden, dtype=dtype, memory_format=torch.contiguous_format),
        hidden.new_empty(num_weights, hidden.shape[1], dtype=grad_weight_dtype or dtype),
    )


def _check_target(target: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    is_bad = ((target < 0) | (target >= vocab_size)) & (target != ignore_index)
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise ValueError(
            f"target[{row}] is {int(target[row])}, outside the vocabulary of {vocab_size} entries; "
            f"mark rows to skip with ignore_index={ignore_index}"
        )
    return target.clone()


def _check_target_fake(target: Tensor, vocab_size: int, ignore_index: int) -> Tensor:
    return torch.empty_like(target)


def _define(name: str, schema: str, implementation: Callable, fake: Callable) -> None:
    # The key of last resort: a kernel under CPU or CUDA, whenever registered, takes precedence.
    _library.define(name + schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    # No gradient flows through the operators: without this PyTorch makes up a zero one and warns.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"flowrl::{name}", fake, lib=_library)


_define("linear_logprob_forward", FORWARD_SCHEMA, reference.forward, _forward_fake)
_define("linear_logprob_backward", BACKWARD_SCHEMA, reference.backward, _backward_fake)
# The same under names that no other kernel takes over, so that "reference" always means it.
_define(
    "linear_logprob_forward_reference",
    FORWARD_SCHEMA,
    reference.forward,
    partial(_forward_fake, operators="reference"),
)
_define("linear_logprob_backward_reference", BACKWARD_SCHEMA, reference.backward, _backward_fake)
# An operator, because a branch on data in Python would break the graph of torch.compile.
_define("linear_logprob_check_target", CHECK_SCHEMA, _check_target, _check_target_fake)

# implementation -> (forward, backward). The unsuffixed operators run what the dispatcher finds for
# the device, which is the implementation that `live_implementation` names.
_OPERATORS = {
    "device": (
        torch.ops.flowrl.linear_logprob_forward.default,
        torch.ops.flowrl.linear_logprob_backward.default,
    ),
    "reference": (
        torch.ops.flowrl.linear_logprob_forward_reference.default,
        torch.ops.flowrl.linear_logprob_backward_reference.default,
    ),
}
if HAS_KERNELS:
    from flowrl.kernels.linear_logprob import gpu, gpu_backward

    _define(
        "linear_logprob_forward_triton",
        FORWARD_SCHEMA,
        gpu.forward,
        partial(_forward_fake, operators="triton"),
    )
    _define(
        "linear_logprob_backward_triton", BACKWARD_SCHEMA, gpu_backward.backward, _backward_fake
    )
    _OPERATORS["triton"] = (
        torch.ops.flowrl.linear_logprob_forward_triton.default,
        torch.ops.flowrl.linear_logprob_backward_triton.default,
    )
    if torch.cuda.is_available():
        _library.impl("linear_logprob_forward", gpu.forward, "CUDA")
        _library.impl("linear_logprob_backward", gpu_backward.backward, "CUDA")
# implementation -> (device type, dispatch key, how to get it)
_NATIVE = {
    "triton": (
        "cuda",
        "CUDA",
        "it needs the triton package and a CUDA device, or TRITON_INTERPRET=1 before the import",
    ),
    "cpu": ("cpu", "CPU", "its C++ library is not built, run `make install`"),
}


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float,
        entropy: bool,
        drop_mass: float,
        ignore_index: int,
        dropped_mass: Tensor | None,
        weight_grad: Tensor | None,
        kept_logits: Tensor | None,
        operators: str,
    ) -> tuple[Tensor, Tensor | None]:
        run_forward, _ = _OPERATORS[operators]
        lse, target_logit, mean_logit, tile_lse = run_forward(
            hidden, weight, target, 0, temperature, ignore_index, entropy, kept_logits
        )
        is_ignored = target == ignore_index
        is_bad = ((target < 0) | (target >= weight.shape[0])) & ~is_ignored
        # NaN here reaches the values and, through the saved lse, the gradients of such a row.
        lse = lse.masked_fill(is_bad, torch.nan)
        logprob = (target_logit - lse).clamp(max=0).masked_fill(is_ignored, 0)
        # As an attribute kept_logits would outlive the backward for as long as logprob is held.
        ctx.save_for_backward(
            hidden, weight, target, lse, mean_logit, tile_lse, logprob, kept_logits
        )
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.drop_mass, ctx.ignore_index = temperature, drop_mass, ignore_index
        ctx.dropped_mass, ctx.weight_grad, ctx.operators = dropped_mass, weight_grad, operators
        if not entropy:
            return logprob, None
        return logprob, (lse - mean_logit).clamp(min=0).masked_fill(is_ignored, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, target, lse, mean_logit, tile_lse, logprob, kept = ctx.saved_tensors
        _, run_backward = _OPERATORS[ctx.operators]
        grad_hidden, grad_weight = run_backward(
            hidden,
            weight,
            target,
            0,
            ctx.temperature,
            lse,
            mean_logit,
            tile_lse,
            torch.zeros_like(lse) if grad_logprob is None else grad_logprob,
            grad_entropy,
            ctx.drop_mass,
            logprob,
            ctx.ignore_index,
            ctx.dropped_mass,
            ctx.weight_grad,
            kept,
            ctx.needs_input_grad[1],
            weight.dtype,
        )
        has_grad_weight = ctx.needs_input_grad[1] and ctx.weight_grad is None
        return (
            grad_hidden.to(hidden.dtype) if ctx.needs_input_grad[0] else None,
            grad_weight if has_grad_weight else None,
            *(None,) * 9,
        )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    drop_mass: float = 0.0,
    ignore_index: int = -100,
    dropped_mass: Tensor | None = None,
    weight_grad: Tensor | None = None,
    memory_budget: int = 0,
    check: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the log-prob of each target under softmax(hidden weight^T / temperature).

    logprob_t = z_t,target - log sum_v exp(z_tv) and entropy_t = -sum_v p_tv log p_tv, both
    differentiable in `hidden` and `weight` once; the [T, V] logits never exist.

    Args:
        hidden: [T, H], H > 0; bfloat16, float16 or float32, and float64 on the reference only.
            Under autocast `hidden` and `weight` are first cast to its dtype (float64 is left
            alone).
        weight: [V, H], dtype and device of `hidden`.
        target: [T] int64, each in [0, V) or `ignore_index`.
        temperature: divides the logits; its inverse must be finite in float32.
        entropy: also return the entropy.
        drop_mass: softmax mass that a row's backward may leave out, see the module's docstring; 0
            is exact. An entropy that receives a gradient makes the backward exact.
        ignore_index: rows with this target get logprob 0, entropy 0 and zero gradient.
        dropped_mass: [T] float32 buffer; the backward writes an upper bound of the softmax mass
            that it left out of each row.
        weight_grad: [V, H] float32 buffer; the backward adds the gradient of `weight` to it and
            returns none for `weight`.
        memory_budget: bytes that the forward may keep for the backward beyond O(T V / 128). With
            drop_mass = 0 and as many bytes as [T, V rounded up to 128] takes in the dtype of
            `hidden`, the softmax of each tile is kept, rounded to that dtype, and the backward
            does not multiply for the logits again. "cpu" does for float16 and for an entropy with
            a gradient, "reference" always.
        check: on CUDA, validate `target` too, at the cost of a synchronisation. Without it a target
            outside the vocabulary gives NaN in its row; on the CPU it always raises.
        implementation: None for the best of the device, or "reference", "triton", "cpu".

    Returns:
        logprob [T], at most 0, and entropy [T] or None; float32 (float64 for float64 inputs),
        sums in float32 or wider. Against float64 of the same inputs logprob is within 1e-4 where
        the row's largest |z| is within 200, and within 5e-7 of that |z| beyond, as float32 holds no
        more. A row with a non-finite hidden state spoils itself and the gradient of `weight` only.

    Raises:
        ValueError: shapes, dtypes, devices, scalars, or an implementation that is not available.
    """
    if isinstance(hidden, Tensor) and isinstance(weight, Tensor):
        hidden, weight = _autocast(hidden), _autocast(weight)
    check_inputs(hidden, weight, target, temperature)
    _validate_options(weight, entropy, drop_mass, memory_budget, ignore_index)
    _validate_buffer("dropped_mass", dropped_mass, (hidden.shape[0],), hidden)
    _validate_buffer("weight_grad", weight_grad, tuple(weight.shape), hidden)
    operators = _select_operators(implementation, hidden)
    if check or hidden.device.type == "cpu":
        target = torch.ops.flowrl.linear_logprob_check_target(target, weight.shape[0], ignore_index)
    return _LinearLogprob.apply(
        hidden,
        weight,
        target,
        float(temperature),
        entropy,
        float(drop_mass),
        ignore_index,
        dropped_mass,
        weight_grad,
        kept_logits_buffer(hidden, weight, len(hidden), drop_mass, memory_budget, operators),
        operators,
    )


def kept_logits_buffer(
    hidden: Tensor,
    weight_shard: Tensor,
    num_rows: int,
    drop_mass: float,
    memory_budget: int,
    operators: str = "device",
) -> Tensor | None:
    """Return the `kept_logits` that `memory_budget` bytes buy for `num_rows` rows, or None.

    See `linear_logprob`. To be called in the grad mode of the caller, with the tensors that will
    have a gradient.
    """
    num_columns = -(-weight_shard.shape[0] // reference.TILE) * reference.TILE
    has_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight_shard.requires_grad)
    num_bytes = num_rows * num_columns * hidden.element_size()
    if drop_mass > 0 or not has_backward or not 0 < num_bytes <= memory_budget:
        return None
    runs_native = operators == "device" and hidden.device.type == "cpu" and _has_kernel("CPU")
    is_kept_there = runs_native and hidden.dtype in (torch.float32, torch.bfloat16)
    if not (is_kept_there or _runs_triton(operators, hidden)):
        return None
    return hidden.detach().new_empty(num_rows, num_columns)


def _runs_triton(operators: str, hidden: Tensor) -> bool:
    if hidden.dtype == torch.float64:
        return False
    if operators == "device":
        return hidden.device.type == "cuda" and _has_kernel("CUDA")
    return operators == "triton"


def live_implementation(device_type: str) -> str:
    """Return the implementation that `implementation=None` runs on "cpu" or "cuda" tensors."""
    for name, (native_device, key, _) in _NATIVE.items():
        if native_device == device_type and _has_kernel(key):
            return name
    return "reference"


@torch.compiler.assume_constant_result  # it is no tensor operation that a graph could hold
def _has_kernel(key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key("flowrl::linear_logprob_forward", key)


def _select_operators(implementation: str | None, hidden: Tensor) -> str:
    if implementation == "reference" or (implementation is None and hidden.dtype == torch.float64):
        return "reference"
    if implementation is None:
        return "device"
    if implementation not in _NATIVE:
        names = ", ".join(repr(name) for name in ("reference", *_NATIVE))
        raise ValueError(f"implementation is {implementation!r}; choose None or one of {names}")
    device_type, key, remedy = _NATIVE[implementation]
    if implementation == "triton" and hidden.device.type == "cpu" and IS_INTERPRETED:
        device_type = "cpu"
    elif not _has_kernel(key):
        raise ValueError(
            f"implementation {implementation!r} is not available here: {remedy}, "
            "or pass implementation=None"
        )
    if hidden.device.type != device_type or hidden.dtype == torch.float64:
        raise ValueError(
            f"implementation {implementation!r} takes bfloat16, float16 or float32 tensors on "
            f"{device_type}, got {hidden.dtype} on {hidden.device}; pass implementation=None"
        )
    return "triton" if implementation == "triton" else "device"


def _autocast(tensor: Tensor) -> Tensor:
    device_type = tensor.device.type
    if not torch.amp.is_autocast_available(device_type):
        return tensor
    is_exempt = not tensor.is_floating_point() or tensor.dtype == torch.float64
    if is_exempt or not torch.is_autocast_enabled(device_type):
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))


def _validate_options(
    weight: Tensor, entropy: bool, drop_mass: float, memory_budget: int, ignore_index: int
) -> None:
    if weight.shape[0] == 0:
        raise ValueError(f"weight must be [V, H] with V > 0, got shape {tuple(weight.shape)}")
    if not isinstance(entropy, bool):
        raise ValueError(f"entropy must be True or False, got {entropy!r}")
    if not (is_number(drop_mass) and 0 <= drop_mass < 1):
        raise ValueError(f"drop_mass must be in [0, 1), 0 being exact, got {drop_mass!r}")
    if not (is_number(memory_budget) and memory_budget >= 0):
        raise ValueError(f"memory_budget must be 0 or a number of bytes, got {memory_budget!r}")
    is_int = isinstance(ignore_index, int) and not isinstance(ignore_index, bool)
    if not (is_int and -(2**63) <= ignore_index < 2**63):
        raise ValueError(f"ignore_index must be an int of 64 bits, got {ignore_index!r}")


def _validate_buffer(
    name: str, buffer: Tensor | None, shape: tuple[int, ...], hidden: Tensor
) -> None:
    if buffer is None:
        return
    if not isinstance(buffer, Tensor):
        raise ValueError(f"{name} must be a tensor or None, got {type(buffer).__name__}")
    if tuple(buffer.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(buffer.shape)}")
    if buffer.dtype not in (torch.float32, torch.promote_types(hidden.dtype, torch.float32)):
        raise ValueError(f"{name} must be float32, got {buffer.dtype}")
    if buffer.device != hidden.device:
        raise ValueError(f"{name} is on {buffer.device}, hidden on {hidden.device}; move it there")
    if any(stride == 0 and size > 1 for stride, size in zip(buffer.stride(), shape, strict=True)):
        raise ValueError(
            f"{name} has elements that share memory, strides {buffer.stride()}; call .contiguous()"
        )
