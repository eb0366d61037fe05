"""Where the tensors of a test are made."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch


@pytest.fixture(autouse=True)
def triton_on_its_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where there is a GPU, a test with implementation="triton" makes all its tensors there."""
    callspec = getattr(request.node, "callspec", None)  # a test without parameters has none
    is_triton = callspec is not None and callspec.params.get("implementation") == "triton"
    with torch.device("cuda") if is_triton and torch.cuda.is_available() else nullcontext():
        yield
