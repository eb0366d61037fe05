"""Writing files so that a reader never sees half of one."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a small text file under a temporary name, sync it, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
