"""What of linear_logprob needs a process of its own: peak memory and lesser instruction sets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl.kernels.linear_logprob import live_implementation

# Bytes beyond the returned gradients at the size of SmolLM2's head. Writing 5 to clear_refs resets
# the high-water mark of the resident memory; a small call first pays for code and thread stacks.
MEMORY_SCRIPT = """
import ctypes, json, sys
from pathlib import Path

import torch

from flowrl.kernels.linear_logprob import linear_logprob


def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def run(hidden, weight, target, drop_mass, weight_grad):
    logprob, _ = linear_logprob(
        hidden, weight, target, drop_mass=drop_mass, weight_grad=weight_grad
    )
    leaves = (hidden, weight) if weight_grad is None else (hidden,)
    return torch.autograd.grad(logprob.sum(), leaves)


torch.set_num_threads(2)
num_rows, hidden_size, vocab_size = map(int, sys.argv[2:])
dtype = getattr(torch, sys.argv[1])
hidden = torch.randn(num_rows, hidden_size).to(dtype)
weight = torch.randn(vocab_size, hidden_size).mul_(hidden_size**-0.5)
hidden[:, 0], weight[:, 0] = 1, -3 * torch.arange(vocab_size).div(64).log1p()
hidden, weight = hidden.requires_grad_(), weight.to(dtype).requires_grad_()
target = torch.randint(vocab_size, (num_rows,))
buffer = torch.zeros(weight.shape)
extra = []
run(hidden[:64], weight[:300], target[:64] % 300, 0.0, None)
for drop_mass, weight_grad in ((0.0, None), (2**-9, None), (0.0, buffer), (2**-9, buffer)):
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    grads = run(hidden, weight, target, drop_mass, weight_grad)
    returned = sum(grad.numel() * grad.element_size() for grad in grads)
    extra.append((kib("VmHWM") - before) * 1024 - returned)
    del grads
print(json.dumps(extra))
"""

# logprob and gradients against float64, exact and with drop_mass, on ragged and on whole sizes.
EXACTNESS_SCRIPT = """
import torch

from flowrl.kernels.linear_logprob import linear_logprob

torch.manual_seed(0)
torch.set_num_threads(2)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)):
    for num_rows, hidden_size, vocab_size in ((130, 72, 1300), (64, 64, 1280)):
        hidden = torch.randn(num_rows, hidden_size).to(dtype).requires_grad_()
        weight = torch.randn(vocab_size, hidden_size).div(8).to(dtype).requires_grad_()
        target = torch.randint(vocab_size, (num_rows,))
        exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
        logprobs = (exact[0] @ exact[1].t() / 0.7).log_softmax(1)
        truth = logprobs.gather(1, target[:, None]).squeeze(1)
        truths = torch.autograd.grad(truth.sum(), exact)
        for drop_mass in (0.0, 1e-3):
            logprob, _ = linear_logprob(hidden, weight, target, 0.7, drop_mass=drop_mass)
            grads = torch.autograd.grad(logprob.sum(), (hidden, weight))
            torch.testing.assert_close(logprob.double(), truth, atol=1e-4, rtol=0)
            for grad, value in zip(grads, truths, strict=True):
                error = float((grad.double() - value).norm() / value.norm())
                assert error < tolerance + drop_mass, (dtype, vocab_size, drop_mass, error)
"""


def run_script(script: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(live_implementation("cpu") != "cpu", reason="the C++ library is not built")
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure resident memory"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_beyond_the_gradients(dtype):
    """At most 8 % of the float32 logits, with and without weight_grad, exact and with drop_mass."""
    num_rows, hidden_size, vocab_size = 1024, 576, 49152
    sizes = [str(size) for size in (num_rows, hidden_size, vocab_size)]
    # Resident memory counts what the allocator keeps as well, up to a megabyte now and then: the
    # smaller of two processes is nearer to what the call needs.
    runs = [json.loads(run_script(MEMORY_SCRIPT, dtype, *sizes)) for _ in range(2)]
    extra = [min(pair) for pair in zip(*runs, strict=True)]
    assert len(extra) == 4
    assert max(extra) <= 0.08 * num_rows * vocab_size * torch.float32.itemsize


@pytest.mark.skipif(live_implementation("cpu") != "cpu", reason="the C++ library is not built")
@pytest.mark.parametrize(
    "variable",
    [
        "ATEN_CPU_CAPABILITY=default",
        "ATEN_CPU_CAPABILITY=avx2",
        "ONEDNN_MAX_CPU_ISA=SSE41",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "ONEDNN_MAX_CPU_ISA=AVX512_CORE",
    ],
)
def test_lesser_instruction_sets(variable):
    """Read when a process starts; on a processor that has less, the level changes nothing."""
    name, _, level = variable.partition("=")
    run_script(EXACTNESS_SCRIPT, **{name: level})
