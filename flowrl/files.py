"""Writing files so that a reader never sees half of one, and never two writers at once."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep every other process out of a folder until this one leaves it, or dies.

    Raises ValueError when another one is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process writes to {folder}: wait for it, or choose another folder by "
                "trainer.default_local_dir or trainer.experiment_name"
            ) from error
        yield
    finally:
        os.close(handle)
