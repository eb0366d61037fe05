"""Front-door checks shared by the ops over packed sequences: cu_seqlens, mask, implementation."""

import torch

from flowrl.kernels._triton import IS_INTERPRETED

_library = torch.library.Library("flowrl", "FRAGMENT")
_library.define("check_packed(Tensor mask, Tensor cu_seqlens) -> (Tensor mask, Tensor cu_seqlens)")


def check_packed(
    mask: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mask [N] bool, cu_seqlens [B+1] int64), or raise ValueError saying what is wrong.

    Values are looked at on the CPU only: on CUDA that would be a host synchronisation.
    """
    for name, tensor in (("the mask", mask), ("cu_seqlens", cu_seqlens)):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if mask.shape != (num_tokens,):
        raise ValueError(f"the mask must have shape [{num_tokens}], got {list(mask.shape)}")
    if mask.is_complex():
        raise ValueError(f"the mask must be bool, integer or float, got {mask.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    for name, tensor in (("the mask", mask), ("cu_seqlens", cu_seqlens)):
        if tensor.device != device:
            raise ValueError(
                f"{name} is on {tensor.device} but the tokens are on {device}: move it there"
            )
    if device.type == "cpu":
        if torch.compiler.is_compiling():  # there are no values yet: the graph has to look at them
            return torch.ops.flowrl.check_packed(mask, cu_seqlens)
        _check_values(mask, cu_seqlens)
    return mask if mask.dtype == torch.bool else mask != 0, cu_seqlens.to(torch.int64)


def _check_values(mask: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
    num_tokens = mask.shape[0]
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to the number of tokens {num_tokens}, "
            f"got {first} to {last}"
        )
    if bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must not decrease, got {cu_seqlens.tolist()}")
    # A mask of fractions would be a token weight, which a mask that selects cannot express.
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        index = int(((mask != 0) & (mask != 1)).nonzero()[0])
        raise ValueError(f"the mask must hold 0 and 1 only, got {mask[index].item()} at {index}")


def _checked(mask: torch.Tensor, cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _check_values(mask, cu_seqlens)
    # Copies: an operator may not return its inputs.
    return mask.to(torch.bool, copy=True), cu_seqlens.to(torch.int64, copy=True)


_library.impl("check_packed", _checked, "CompositeExplicitAutograd")
# No gradient flows through it: without this PyTorch makes up a zero one and warns.
_library.impl("check_packed", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("flowrl::check_packed", lib=_library)
def _(mask, cu_seqlens):
    return torch.empty_like(mask, dtype=torch.bool), torch.empty_like(cu_seqlens, dtype=torch.int64)


def check_same(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise ValueError unless both are float32 or both float64, and on one device."""
    if other.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{other_name} must be float32 or float64, got {other.dtype}")
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} but {other_name} is {other.dtype}: cast one of them"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} on {other.device}: move one of them"
        )


# implementation -> (device type, dispatch key, what makes it available)
_NATIVE = {
    "cpu": ("cpu", "CPU", "build the C++ library with `make install`"),
    "triton": ("cuda", "CUDA", "it needs triton and a CUDA device or TRITON_INTERPRET=1"),
}


def check_implementation(op: str, implementation: str | None, device: torch.device) -> None:
    """Raise ValueError unless `implementation` (None: the device's best) of `op` runs on `device`.

    Asks the dispatcher, which otherwise falls back to the reference in silence. Under Triton's
    interpreter "triton" also runs on CPU tensors, outside the dispatcher.
    """
    if implementation is None or implementation == "reference":
        return
    if implementation not in _NATIVE:
        names = ", ".join(repr(name) for name in ("reference", *_NATIVE))
        raise ValueError(f"implementation is {implementation!r}: use None or one of {names}")
    if implementation == "triton" and device.type == "cpu" and IS_INTERPRETED:
        return
    device_type, key, remedy = _NATIVE[implementation]
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op, key):
        raise ValueError(
            f"implementation {implementation!r} of {op} is not available: {remedy}, "
            "or use None or 'reference'"
        )
    if device.type != device_type:
        raise ValueError(
            f"implementation {implementation!r} runs on {device_type} tensors, got {device}: "
            "use None or 'reference'"
        )
