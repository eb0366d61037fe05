"""Where a run computes and in which format, when its configuration leaves that to the machine."""

import platform

import torch

from flowrl.settings import Config


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.device = cuda, but torch sees no GPU; use auto or cpu")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for products of bfloat16.

    Without them a CPU emulates: a step of configs/quickstart.yaml took 7.7 times as long as in
    float32 on one with AVX2.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):  # AMX comes with AVX512-BF16
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def resolve_dtype(name: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the device is fast in it, else float32."""
    if name == "auto":
        return "bfloat16" if has_fast_bfloat16(device) else "float32"
    return name


def with_resolved_dtype(config: Config) -> Config:
    """The configuration with the compute dtype that `auto` means on this machine."""
    device = resolve_device(config.trainer.device)
    return config.with_dtype(resolve_dtype(config.model.dtype, device))
