"""What the public function and the operators of `linear_logprob` refuse; cpu.cpp has the twin."""

import torch
from torch import Tensor

TILE = 128
FLOAT32_MAX = torch.finfo(torch.float32).max


def check_inputs(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    """Raise ValueError unless these are hidden [T, H], weight [V, H], target [T], of one device."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("target", target)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hidden.dim() != 2 or hidden.shape[1] == 0:
        raise ValueError(
            f"hidden must be [T, H] with H > 0, got shape {tuple(hidden.shape)}; flatten it"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[1]}] for hidden of shape {tuple(hidden.shape)}, "
            f"got shape {tuple(weight.shape)}"
        )
    if target.dim() != 1 or target.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"target must be [{hidden.shape[0]}] for hidden of shape {tuple(hidden.shape)}, "
            f"got shape {tuple(target.shape)}"
        )
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(
            f"hidden must be bfloat16, float16, float32 or float64, got {hidden.dtype}; cast it"
        )
    if weight.dtype != hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}; cast one to the other's dtype"
        )
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}; call .long()")
    if weight.device != hidden.device or target.device != hidden.device:
        raise ValueError(
            f"hidden is on {hidden.device}, weight on {weight.device}, target on {target.device}; "
            "move them to one device"
        )
    # The logits are multiplied by its inverse, in float32.
    if (
        not (is_number(temperature) and 0 < temperature < torch.inf)
        or 1 / temperature > FLOAT32_MAX
    ):
        raise ValueError(
            f"temperature must be positive and finite, and so its inverse in float32, "
            f"got {temperature!r}"
        )


def check_backward(
    hidden: Tensor,
    weight: Tensor,
    lse: Tensor,
    mean_logit: Tensor,
    tile_lse: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    logprob: Tensor | None,
    dropped_mass: Tensor | None,
    weight_grad: Tensor | None,
) -> None:
    """Raise ValueError unless these have the shapes of what a forward of (hidden, weight) gave."""
    num_rows, num_entries = hidden.shape[0], weight.shape[0]
    for name, tensor, shape in (
        ("lse", lse, (num_rows,)),
        ("mean_logit", mean_logit, (num_rows,)),
        ("tile_lse", tile_lse, (num_rows, (num_entries + TILE - 1) // TILE)),
        ("grad_logprob", grad_logprob, (num_rows,)),
        ("grad_entropy", grad_entropy, (num_rows,)),
        ("logprob", logprob, (num_rows,)),
        ("dropped_mass", dropped_mass, (num_rows,)),
        ("weight_grad", weight_grad, tuple(weight.shape)),
    ):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def is_number(value: object) -> bool:
    """Whether a Python int or float; a bool is none, as it stands for a switch in a wrong place."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
