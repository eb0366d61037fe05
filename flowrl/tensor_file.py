"""A safetensors file written one tensor at a time.

safetensors.torch.save_file copies all CUDA tensors to the host at once and refuses tensors that
share memory; here those are each written in full, and a tensor need not exist before its turn.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorSpec:
    """What the file announces of one tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tensor.dtype, tensor.shape)


@dataclass(frozen=True)
class TensorFile:
    """The header of a file, 8-byte length included, and where each tensor's bytes begin."""

    specs: dict[str, TensorSpec]
    header: bytes
    offsets: dict[str, int]

    def write(self, path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write (name, tensor) pairs in any order, cast to the announced dtypes.

        Raises ValueError for a pair that was not announced, comes twice or never.
        """
        missing = set(self.specs)
        with open(path, "wb") as file:
            file.write(self.header)
            for name, tensor in tensors:
                if name not in missing or tensor.shape != self.specs[name].shape:
                    raise ValueError(f"{path}: {name} {list(tensor.shape)} was not announced")
                missing.remove(name)
                file.seek(self.offsets[name])
                flat = tensor.detach().to(self.specs[name].dtype).cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
        if missing:
            raise ValueError(f"{path}: {len(missing)} tensors never came, first {min(missing)}")


def plan_tensor_file(specs: dict[str, TensorSpec]) -> TensorFile:
    """Lay the tensors out. Raises ValueError for a dtype that safetensors lacks."""
    # The widest type first keeps every tensor aligned to its element size in the mapped file.
    order = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    begins, offset = {}, 0
    for name in order:
        spec = specs[name]
        if spec.dtype not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"tensor {name} has dtype {spec.dtype}; a checkpoint holds "
                f"{', '.join(str(dtype) for dtype in SAFETENSORS_DTYPES)}"
            )
        begins[name] = offset
        offset += spec.shape.numel() * spec.dtype.itemsize
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begins[name], offset],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return TensorFile(specs, header, {name: len(header) + begin for name, begin in begins.items()})
