"""Loads the C++ CPU kernels, libflowrl_cpu.so, which setup.py builds from kernels/*/cpu.cpp."""

import logging
from functools import cache
from pathlib import Path

import torch

_logger = logging.getLogger(__name__)


def library_path() -> Path | None:
    """Where the C++ library was built, or None when this is a pure-Python installation."""
    path = Path(__file__).resolve().parent / "libflowrl_cpu.so"
    return path if path.is_file() else None


@cache
def load() -> bool:
    """Registers the C++ kernels with torch; True when CPU tensors will use them.

    Every op calls this when it is imported; only the first call does anything. Without the library
    a warning says, once, that CPU tensors take the reference implementations.

    Raises RuntimeError for a library that exists and does not load. That happens after a change of
    the torch version, and running on without it would hide a slow path.
    """
    path = library_path()
    if path is None:
        _logger.warning(
            "the C++ CPU kernels are not built: CPU tensors use the slower reference "
            "implementations. To build them, install a C++ compiler and run `make install` (or "
            "`pip install cmake ninja` and `pip install -e . --no-build-isolation`)."
        )
        return False
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise RuntimeError(
            f"{path} does not load into torch {torch.__version__}, most often because it was built "
            "against another torch. Rebuild it (`make clean install`), or delete it to use the "
            "reference implementations."
        ) from error
    return True
