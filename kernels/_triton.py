"""Whether the Triton kernels can run here, and how Triton's interpreter stands in for a GPU."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch


def _reads_interpret() -> bool:
    if find_spec("triton") is None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


# Read once: Triton decides at a kernel's decoration, which is the import of its gpu.py.
IS_INTERPRETED = _reads_interpret()
# Whether an op imports its gpu.py at all.
HAS_KERNELS = IS_INTERPRETED or (torch.cuda.is_available() and find_spec("triton") is not None)


def interpreted(
    forward: Callable, setup_context: Callable, backward: Callable
) -> Callable[..., Any]:
    """Join the functions that an op registers, for a call that does not go by the dispatcher.

    Needed for the interpreter alone: there the Triton kernels take CPU tensors, which the
    dispatcher gives to the C++ kernels.
    """

    class Interpreted(torch.autograd.Function):
        pass

    Interpreted.forward = staticmethod(forward)
    Interpreted.setup_context = staticmethod(setup_context)
    Interpreted.backward = staticmethod(backward)
    return Interpreted.apply
