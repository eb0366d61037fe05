"""Block sizes, warps and stages of the head's kernels: one line for each kernel and kind of device.

There is no autotuner at run time. Block sizes may decide the order of a sum and with it the bits of
a result, and a choice made by timing can come out differently in the next process or on the next
rank. So each entry is fixed, and none depends on T. benchmarks/tune_linear_logprob.py times
candidates on a GPU and names the line to change.

No entry has been timed yet: each is the largest that spills no registers, by the compiler's report.
"""

from collections.abc import Mapping

import torch

from flowrl.kernels._triton import IS_INTERPRETED

# kernel -> kind of device (`device_kind`) -> numbers in the order of NAMES
Table = Mapping[str, Mapping[str, tuple[int, ...]]]

_PRODUCT = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
NAMES = {
    "forward": ("BLOCK_T", "BLOCK_V", "BLOCK_H", "GROUP", "num_warps", "num_stages"),
    "forward_keep": ("BLOCK_T", "BLOCK_V", "BLOCK_H", "GROUP", "num_warps", "num_stages"),
    "grad_logits": _PRODUCT,
    "grad_logits_entropy": _PRODUCT,
    "grad_hidden": _PRODUCT,
    "grad_weight": _PRODUCT,
    "pair_p": ("BLOCK_H", "num_warps", "num_stages"),
    "pair_dw": ("BLOCK_H", "BLOCK_PAIRS", "num_warps", "num_stages"),
    "pair_dh": ("BLOCK_PAIRS", "BLOCK_V", "BLOCK_H", "num_warps", "num_stages"),
}

TABLE: Table = {
    # Sixteen row blocks share a panel of the weight in the second-level cache, and with H = 3584
    # they are 15 MB of hidden states in bfloat16 that stay there too (an estimate, not measured).
    "forward": {
        "sm_80": (128, 128, 64, 16, 8, 4),  # 128 KiB of shared memory
        "sm_86": (128, 128, 64, 16, 8, 3),  # 96 KiB
        "sm_90": (128, 256, 64, 16, 8, 4),  # 192 KiB
        "sm_100": (128, 256, 64, 16, 8, 4),
        "unaligned": (128, 128, 32, 16, 8, 2),
        "float32": (64, 128, 32, 16, 8, 3),  # 72 KiB
        "float32 sm_90": (128, 128, 32, 16, 8, 3),  # 96 KiB
    },
    # Filling kept_logits takes registers of its own.
    "forward_keep": {
        "sm_80": (128, 128, 64, 16, 8, 4),
        "sm_86": (128, 128, 64, 16, 8, 3),
        "sm_90": (128, 128, 64, 16, 8, 4),
        "sm_100": (128, 128, 64, 16, 8, 4),
        "unaligned": (128, 128, 32, 16, 8, 2),
        "float32": (64, 128, 32, 16, 8, 3),
        "float32 sm_90": (128, 128, 32, 16, 8, 3),
    },
    # The three products of the exact backward: rows x entries over H, rows x H over entries, and
    # entries x H over rows.
    "grad_logits": {
        "sm_80": (128, 128, 64, 8, 8, 4),
        "sm_86": (128, 128, 64, 8, 8, 3),
        "sm_90": (128, 256, 64, 8, 8, 4),
        "sm_100": (128, 256, 64, 8, 8, 4),
        "unaligned": (128, 128, 32, 8, 8, 2),
        "float32": (64, 128, 32, 8, 8, 3),
        "float32 sm_90": (128, 128, 32, 8, 8, 3),
    },
    "grad_logits_entropy": {
        "sm_80": (128, 128, 64, 8, 8, 4),
        "sm_86": (128, 128, 64, 8, 8, 3),
        "sm_90": (128, 128, 64, 8, 8, 4),
        "sm_100": (128, 256, 64, 8, 8, 4),
        "unaligned": (128, 128, 32, 8, 8, 2),
        "float32": (64, 128, 32, 8, 8, 3),
        "float32 sm_90": (128, 128, 32, 8, 8, 3),
    },
    "grad_hidden": {
        "sm_80": (128, 128, 64, 8, 8, 4),
        "sm_86": (128, 128, 64, 8, 8, 3),
        "sm_90": (128, 256, 64, 8, 8, 4),
        "sm_100": (128, 128, 64, 8, 8, 4),
        "unaligned": (128, 128, 32, 8, 8, 2),
        "float32": (64, 128, 32, 8, 8, 3),
        "float32 sm_90": (128, 128, 32, 8, 8, 3),
    },
    "grad_weight": {
        "sm_80": (128, 128, 64, 8, 8, 4),
        "sm_86": (128, 128, 64, 8, 8, 3),
        "sm_90": (128, 256, 64, 8, 8, 4),
        "sm_100": (128, 128, 64, 8, 8, 4),
        "unaligned": (128, 128, 32, 8, 8, 2),
        "float32": (64, 128, 32, 8, 8, 3),
        "float32 sm_90": (128, 128, 32, 8, 8, 3),
    },
    # The three products on pairs.
    "pair_p": {
        "sm_80": (32, 8, 4),
        "sm_86": (32, 8, 4),
        "sm_90": (64, 8, 4),
        "sm_100": (64, 8, 4),
        "unaligned": (32, 8, 4),
        "float32": (16, 8, 2),
        "float32 sm_90": (16, 8, 2),
    },
    # The stages include the load of the row numbers, which takes up two of them.
    "pair_dw": {
        "sm_80": (128, 32, 8, 4),
        "sm_86": (128, 32, 8, 4),
        "sm_90": (128, 64, 8, 5),
        "sm_100": (128, 64, 8, 5),
        "unaligned": (128, 32, 8, 4),
        "float32": (64, 32, 8, 3),
        "float32 sm_90": (64, 32, 8, 3),
    },
    # Leaves shared memory for the two programs that a multiprocessor gets.
    "pair_dh": {
        "sm_80": (64, 128, 64, 4, 2),
        "sm_86": (64, 128, 64, 4, 2),
        "sm_90": (64, 128, 128, 4, 1),
        "sm_100": (64, 128, 128, 4, 1),
        "unaligned": (64, 128, 64, 4, 2),
        "float32": (64, 32, 64, 8, 3),
        "float32 sm_90": (64, 32, 64, 8, 3),
    },
}


def _small(name: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    return (32, numbers[1], 32, *numbers[3:]) if "GROUP" in NAMES[name] else numbers


# The interpreter pays for every entry of a block, padding or not.
BLOCKS: Table = (
    {
        name: {kind: _small(name, numbers) for kind, numbers in kinds.items()}
        for name, kinds in TABLE.items()
    }
    if IS_INTERPRETED
    else TABLE
)


def device_kind(capability: tuple[int, int], dtype: torch.dtype, is_tma: bool) -> str:
    """Return the column of the table; "unaligned" are rows that a device with TMA has to copy.

    Raises:
        ValueError: the device is too old.
    """
    if capability < (8, 0):
        raise ValueError(
            f"the Triton kernels need compute capability 8.0 or later, this device has "
            f'{capability[0]}.{capability[1]}; pass implementation="reference"'
        )
    has_wide_products = capability[0] in (9, 10)
    if dtype == torch.float32:  # three tf32 products
        return "float32 sm_90" if has_wide_products else "float32"
    if has_wide_products:
        return f"sm_{capability[0]}0" if is_tma else "unaligned"
    return "sm_80" if capability in ((8, 0), (8, 7)) else "sm_86"  # and sm_89, sm_120


def launch_options(table: Table, name: str, kind: str) -> dict[str, int]:
    """Return block sizes, warps and stages as a launch takes them."""
    return dict(zip(NAMES[name], table[name][kind], strict=True))
