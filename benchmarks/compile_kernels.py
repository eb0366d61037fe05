"""Compile every Triton kernel ahead of time, as it is launched, and read the machine code.

    python benchmarks/compile_kernels.py                        # everything, about 20 minutes
    python benchmarks/compile_kernels.py --sm 90 --op segment_mean
    python benchmarks/compile_kernels.py --triton FOLDER  # another Triton, from a folder

No GPU is needed. The host functions of the ops run on meta tensors of real sizes, and each launch
compiles for the architecture in question instead of launching: signatures, block sizes and
alignment are those of a real call, kernels of equal signature are compiled once, and a host
function that asked for a value on the device would fail. The exit status is 1 if a kernel spills
registers, lacks the instructions it was written for, or rounds float32 operands to tf32.

The folder of --triton: pip install --no-deps --target FOLDER triton==3.6.0
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

# Rows, hidden size, vocabulary. "unaligned" takes the paths without TMA and without cp.async.
HEADS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "qwen2.5-32b": (5120, 152064),
    "unaligned": (900, 50257),
}
NUM_ROWS = 8192
NUM_SEQUENCES = 64
ARCHITECTURES = (80, 90, 100)
DTYPES = ("bfloat16", "float32")  # float16 differs from bfloat16 in the names of instructions only
# These read both matrices by TMA on sm_90 and later, so a fall-back to pointers is a defect.
TMA_KERNELS = {"forward_kernel", "grad_logits_kernel", "grad_hidden_kernel", "grad_weight_kernel"}
OPCODES = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "STL", "LDL")


@dataclass
class Binary:
    """One compiled kernel; counts are of instructions in the machine code."""

    kernel: str
    sm: int
    dtype: str
    heads: list[str]
    constants: str
    num_warps: int
    num_stages: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    opcodes: dict[str, int]
    problems: list[str] = field(default_factory=list)


class Offline:
    """Stands in for Triton's driver: a GPU of architecture `sm` that never runs anything."""

    sm = 90

    def get_current_device(self) -> int:
        return self.sm  # Triton keeps what it compiled per device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)


@contextmanager
def launches(sm: int, record: Callable) -> Iterator[None]:
    """Within it, a launch compiles for `sm` and calls record(kernel, compiled) instead."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    offline = Offline()
    offline.sm = sm
    driver.set_active(offline)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        record(self.__name__, compiled)
        return compiled

    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run


def set_capability(sm: int) -> None:
    """Make the modules of the head choose the block sizes for `sm`."""
    from flowrl.kernels.linear_logprob import gpu, gpu_backward, gpu_pairs

    for module in (gpu, gpu_backward, gpu_pairs):
        assert callable(module.device_capability)
        module.device_capability = lambda tensor: divmod(sm, 10)


def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_linear_logprob(head: str, dtype: torch.dtype) -> None:
    from flowrl.kernels.linear_logprob import gpu, gpu_backward

    hidden_size, vocab_size = HEADS[head]
    hidden = meta(NUM_ROWS, hidden_size, dtype=dtype)
    weight = meta(vocab_size, hidden_size, dtype=dtype)
    target = meta(NUM_ROWS, dtype=torch.int64)
    row = meta(NUM_ROWS, dtype=torch.float32)
    buffer = meta(vocab_size, hidden_size, dtype=torch.float32)
    shard = (hidden, weight, target, 0, 1.0)
    for kept in (None, meta(NUM_ROWS, -(-vocab_size // 128) * 128, dtype=dtype)):
        for grad_entropy in (None, row):
            lse, _, mean, tile_lse = gpu.forward(*shard, -100, grad_entropy is not None, kept)
            sums = (lse, mean, tile_lse, row, grad_entropy)
            gpu_backward.backward(
                *shard, *sums, 0.0, row, kept_logits=kept, grad_weight_dtype=dtype
            )
    for weight_grad in (None, buffer):  # 0 takes the exact kernels, 2^-9 both, which of them works
        for drop_mass in (0.0, 2**-9):  # being decided on the device
            gpu_backward.backward(
                *(*shard, lse, mean, tile_lse, row, None, drop_mass, row),
                dropped_mass=row,
                weight_grad=weight_grad,
                grad_weight_dtype=dtype,
            )


def launch_flow_balance(head: str, dtype: torch.dtype) -> None:
    from flowrl.kernels.flow_balance import gpu

    token, sequence = meta(NUM_ROWS, dtype=dtype), meta(NUM_SEQUENCES, dtype=dtype)
    mask = meta(NUM_ROWS, dtype=torch.bool)
    cu_seqlens = meta(NUM_SEQUENCES + 1, dtype=torch.int32)
    for weighting in ("clip", "raw", "cap", "one", "cispo"):
        clip = (weighting, 0.2, 0.28)
        sums = gpu.sequence_sums(token, token, token, mask, cu_seqlens, sequence, *clip)
        gpu.residual_from_sums(sums, sequence, sequence, 15.0, *clip, 10.0)
        gpu.sequence_sums_backward(sums, token, token, mask, cu_seqlens, sequence, *clip)


def launch_segment_mean(head: str, dtype: torch.dtype) -> None:
    from flowrl.kernels.segment_mean import gpu

    hidden = meta(NUM_ROWS, HEADS[head][0], dtype=dtype)
    mask = meta(NUM_ROWS, dtype=torch.bool)
    cu_seqlens = meta(NUM_SEQUENCES + 1, dtype=torch.int32)
    sums, _ = gpu.segment_sum(hidden, cu_seqlens, mask)
    gpu.segment_sum_backward(sums, cu_seqlens, mask, dtype)


def launch_token_clip(head: str, dtype: torch.dtype) -> None:
    from flowrl.kernels.token_clip import gpu

    token = meta(NUM_ROWS, dtype=dtype)
    mask = meta(NUM_ROWS, dtype=torch.bool)
    cu_seqlens = meta(NUM_SEQUENCES + 1, dtype=torch.int32)
    for weights, ref in product((None, token), repeat=2):
        sums, grad = gpu.token_clip(
            token, token, token, mask, cu_seqlens, weights, ref, 0.2, 0.28, 3.0, 0.01
        )
    gpu.token_clip_backward(sums[:, 0], grad, cu_seqlens)


OPS = {
    "linear_logprob": launch_linear_logprob,
    "flow_balance": launch_flow_balance,
    "segment_mean": launch_segment_mean,
    "token_clip": launch_token_clip,
}
# Forward and pooling read what the model computes in; the others are float32 for every head.
WIDE_OPS = ("linear_logprob", "segment_mean")


def inspect(name: str, compiled, sm: int, dtype: str, head: str) -> Binary:
    """Read registers, stack and instructions from a compiled kernel, and judge them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = run_tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    opcodes = {code: len(re.findall(rf"\b{code}\b", sass)) for code in OPCODES}
    opcodes["tcgen05"] = compiled.asm["ptx"].count("tcgen05.mma")
    constants = compiled.src.constants
    names = compiled.src.fn.arg_names
    binary = Binary(
        kernel=name,
        sm=sm,
        dtype=dtype,
        heads=[head],
        constants=" ".join(
            f"{names[path[0]]}={value}" for path, value in sorted(constants.items())
        ),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=int(found[1]),
        stack_bytes=int(found[2]),
        local_bytes=int(found[3]),
        shared_bytes=compiled.metadata.shared,
        opcodes=opcodes,
    )
    binary.problems = problems(binary, compiled.asm["ttir"], compiled.asm["ptx"])
    return binary


def run_tool(tool: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def problems(binary: Binary, ttir: str, ptx: str) -> list[str]:
    """What is wrong with a compiled kernel: spills, missing instructions, tf32 rounding."""
    found = []
    codes = binary.opcodes
    # A stack of a few bytes that no instruction touches is none. Unaligned rows are read element
    # by element, for correct results rather than for speed: their spills are in the table only.
    is_aligned = binary.heads != ["unaligned"]
    if is_aligned and (binary.local_bytes or codes["STL"] or codes["LDL"]):
        found.append(f"spills: {codes['STL']} stores, {codes['LDL']} loads")
    # The intermediate code names the precision of a product of float32 operands, and leaves out
    # "ieee"; the PTX shows that three products in tf32 stand for each.
    if re.search(r"inputPrecision = tf32\b(?!x3)", ttir):
        found.append("float32 operands of a product are rounded to tf32")
    num_tf32 = len(re.findall(r"\bmma\S*\.tf32\b|wgmma\S*\.tf32\b|kind::tf32", ptx))
    if num_tf32 and "tf32x3" not in ttir:
        found.append(f"{num_tf32} products in tf32 without a correction")
    has_product, is_half = "tt.dot" in ttir, binary.dtype != "float32"
    if has_product and is_half:
        core = {80: "HMMA", 90: "HGMMA", 100: "tcgen05"}[binary.sm]
        if codes[core] == 0:
            found.append(f"no {core}")
        if is_aligned:
            is_tma = "tt.descriptor_load" in ttir
            if binary.sm == 80 and codes["LDGSTS"] == 0:
                found.append("no LDGSTS (cp.async)")
            if binary.sm >= 90 and binary.kernel in TMA_KERNELS and not is_tma:
                found.append("no descriptor")
            if binary.sm >= 90 and is_tma and codes["UTMALDG"] == 0:
                found.append("no UTMALDG (TMA)")
    return found


_INSPECTED: dict[str, Binary] = {}  # by hash: heads of equal signature share a binary


def compile_launches(
    launch: Callable[[str, torch.dtype], None], head: str, dtype: str, sm: int
) -> list[tuple[Binary, str]]:
    """Run `launch` and return each distinct kernel that it launched, with the compiler's hash."""
    compiled = {}

    def record(name: str, kernel) -> None:
        compiled[kernel.hash] = (name, kernel)

    set_capability(sm)
    with launches(sm, record):
        launch(head, getattr(torch, dtype))
    binaries = []
    for key, (name, kernel) in compiled.items():
        if key not in _INSPECTED:
            _INSPECTED[key] = inspect(name, kernel, sm, dtype, head)
        elif head not in _INSPECTED[key].heads:
            _INSPECTED[key].heads.append(head)
        binaries.append((_INSPECTED[key], key))
    return binaries


def print_table(binaries: list[Binary]) -> None:
    table = Table(title=f"{len(binaries)} kernels")
    for column in ("kernel", "sm", "dtype", "first head", "constants"):
        table.add_column(column)
    for column in ("warps", "stages", "reg", "stack", "shared", *OPCODES, "tcgen05"):
        table.add_column(column, justify="right")
    table.add_column("problems")
    for binary in binaries:
        numbers = [
            binary.num_warps,
            binary.num_stages,
            binary.registers,
            binary.stack_bytes,
            binary.shared_bytes,
            *binary.opcodes.values(),
        ]
        table.add_row(
            binary.kernel,
            str(binary.sm),
            binary.dtype,
            binary.heads[0],
            binary.constants,
            *map(str, numbers),
            "; ".join(binary.problems),
        )
    Console(width=220).print(table)


def main(
    sm: Annotated[list[int] | None, typer.Option(help="80, 90, 100; default: all")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="default: bfloat16, float32")] = None,
    head: Annotated[list[str] | None, typer.Option(help=f"default: {', '.join(HEADS)}")] = None,
    op: Annotated[list[str] | None, typer.Option(help=f"default: {', '.join(OPS)}")] = None,
    triton_folder: Annotated[Path | None, typer.Option("--triton", help="its folder")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the results")] = None,
) -> None:
    if triton_folder is not None:
        sys.path.insert(0, str(triton_folder.resolve()))
    # Triton decides between compiler and interpreter when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    started, keys = time.perf_counter(), {}
    for name, each_sm, each_dtype, each_head in product(
        op or OPS, sm or ARCHITECTURES, dtype or DTYPES, head or HEADS
    ):
        if name not in WIDE_OPS and (each_dtype != "float32" or each_head != next(iter(HEADS))):
            continue
        for binary, key in compile_launches(OPS[name], each_head, each_dtype, each_sm):
            if key not in keys:
                keys[key] = binary
                verdict = "; ".join(binary.problems) or "ok"
                print(
                    f"{binary.kernel} sm_{each_sm} {each_dtype} {each_head}: {verdict}", flush=True
                )
    binaries = list(keys.values())
    print_table(binaries)
    num_bad = sum(bool(binary.problems) for binary in binaries)
    print(
        f"Triton {triton.__version__}: {len(binaries)} kernels in "
        f"{time.perf_counter() - started:.0f} s, {num_bad} with problems"
    )
    if json_path is not None:
        report = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "command": " ".join(["python", *sys.argv]),
            "rows": NUM_ROWS,
            "kernels": [asdict(binary) for binary in binaries],
        }
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if num_bad:
        raise SystemExit(1)


if __name__ == "__main__":
    typer.run(main)
