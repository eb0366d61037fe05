"""Set-up of every test: Triton's interpreter, thread counts, seeds, and NaN-filled allocations."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils import deterministic

# Triton reads this when a kernel is decorated, so it must stand before flowrl.kernels is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Parallel workers share the cores; alone, two threads exercise the parallel code paths.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """torch.empty, from Python and C++, gives NaN (or the largest int) instead of stale memory.

    An output element that a kernel forgets to write then shows, where stale memory would often hold
    the right value of the previous call.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(scope="session")
def tiny_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder with a policy that writes sums, 1 in 20 right: enough for RL to go on from."""
    from flowrl.policy.tiny import build_tiny_sums

    folder = tmp_path_factory.mktemp("tiny_sums") / "model"
    build_tiny_sums(folder, num_steps=40)
    return folder
