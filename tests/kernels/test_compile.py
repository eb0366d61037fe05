"""The kernels compile for GPUs without spills, and the check that says so finds bad ones.

benchmarks/compile_kernels.py compiles without a GPU. It runs in a process of its own, since Triton
decides between compiler and interpreter when it is imported, and the tests' process interprets.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = f"""
import json, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import torch
from compile_kernels import HEADS, compile_launches, meta
"""
# The forward of the head for two architectures, one head, one dtype.
FORWARD = """
from flowrl.kernels.linear_logprob import gpu

def launch(head, dtype):
    hidden_size, vocab_size = HEADS[head]
    hidden = meta(8192, hidden_size, dtype=dtype)
    weight = meta(vocab_size, hidden_size, dtype=dtype)
    gpu.forward(hidden, weight, meta(8192, dtype=torch.int64), 0, 1.0, -100, True)

found = [b for sm in (80, 90) for b, _ in compile_launches(launch, "qwen2.5-7b", "bfloat16", sm)]
print(json.dumps([[b.kernel, b.sm, b.problems, b.registers, b.opcodes] for b in found]))
"""
BAD = """
import triton
import triton.language as tl

@triton.jit
def product_kernel(a, b, c, SIZE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, 32)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, SIZE, 32):
        left = tl.load(a + rows[:, None] * SIZE + start + inner[None, :])
        right = tl.load(b + rows[:, None] * SIZE + start + inner[None, :])
        total = tl.dot(left, right.T, total, input_precision=PRECISION)
    tl.store(c + rows[:, None] * BLOCK + rows[None, :], total)

def product(size, precision, num_warps, num_stages):
    def launch(head, dtype):
        a = meta(size, 1024, dtype=dtype)
        c = meta(size, size, dtype=torch.float32)
        product_kernel[(1,)](
            a, a, c, 1024, size, precision, num_warps=num_warps, num_stages=num_stages
        )
    return launch

def found(launch, dtype, sm):
    (binary, _), = compile_launches(launch, "qwen2.5-7b", dtype, sm)
    return binary.problems

print(json.dumps({
    "good": found(product(128, "ieee", 8, 3), "bfloat16", 80),
    "spills": found(product(128, "ieee", 1, 3), "bfloat16", 80),
    "plain loads": found(product(128, "ieee", 8, 1), "bfloat16", 80),
    "no wgmma": found(product(32, "ieee", 4, 3), "bfloat16", 90),
    "tf32": found(product(32, "tf32", 4, 3), "float32", 80),
    "tf32x3": found(product(32, "tf32x3", 4, 3), "float32", 80),
}))
"""


def run(program: str, tmp_path: Path) -> str:
    path = tmp_path / "program.py"  # Triton reads the source of its kernels
    path.write_text(PRELUDE + program)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_forward_compiles_without_spills(tmp_path: Path) -> None:
    found = json.loads(run(FORWARD, tmp_path))
    assert [(name, sm, problems) for name, sm, problems, _, _ in found] == [
        (name, sm, []) for sm in (80, 90) for name in ("forward_kernel", "finalise_kernel")
    ]
    (_, _, _, _, ampere), _, (_, _, _, _, hopper), _ = found
    assert ampere["HMMA"] > 0 and ampere["LDGSTS"] > 0
    assert hopper["HGMMA"] > 0 and hopper["UTMALDG"] > 0


def test_bad_kernels_are_found(tmp_path: Path) -> None:
    found = json.loads(run(BAD, tmp_path))
    assert found["good"] == found["tf32x3"] == []
    (spill,) = found["spills"]
    assert spill.startswith("spills: ")
    assert found["plain loads"] == ["no LDGSTS (cp.async)"]
    assert "no HGMMA" in found["no wgmma"]
    assert found["tf32"][0] == "float32 operands of a product are rounded to tf32"
    assert "in tf32 without a correction" in found["tf32"][1]
