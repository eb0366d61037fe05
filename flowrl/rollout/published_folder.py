"""Weights on their way to vLLM servers: a folder that the trainer writes and the servers read.

    <weight_dir>/flowrl-weights-<host>-<pid>-<random>/    one run, removed when it ends
        <label>/model.safetensors                         one publication, HF names
        <label>/manifest.json                             label, and SHA-256 and shape by name

A publication is written under a hidden name and renamed, so one that can be seen is whole.
"""

import json
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flowrl.rollout.publication import checked, tensor_checksum
from flowrl.tensor_file import TensorSpec, plan_tensor_file

WEIGHTS_FILE = "model.safetensors"
MANIFEST_FILE = "manifest.json"
STALE_AFTER_S = 24 * 3600  # a live run touches its folder at every publication
RUN_NAME = re.compile(r"flowrl-weights-(.+)-(\d+)-[0-9a-f]{8}")


def make_run_folder(weight_dir: Path) -> Path:
    """Make this run's folder, after removing those of runs that were killed on this host."""
    weight_dir.mkdir(parents=True, exist_ok=True)
    for path in weight_dir.iterdir():
        if (match := RUN_NAME.fullmatch(path.name)) and _is_stale(path, match):
            shutil.rmtree(path, ignore_errors=True)
    name = f"flowrl-weights-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    folder = weight_dir / name
    folder.mkdir(mode=0o700)  # weights are nobody else's: the servers run under the same user
    return folder


def _is_stale(folder: Path, name: re.Match[str]) -> bool:
    """Whether a run of this host is gone; containers may share its name, hence the age as well."""
    if name[1] != socket.gethostname() or time.time() - folder.stat().st_mtime < STALE_AFTER_S:
        return False
    try:
        os.kill(int(name[2]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, under another user
        return False
    return False


def write_publication(
    folder: Path,
    named_weights: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, torch.Size],
    dtype: torch.dtype,
) -> None:
    """Write weights as they come, cast to `dtype`; one tensor at a time is in memory.

    Raises ValueError for names or shapes that are not the expected ones, and OSError when the disk
    refuses; then there is no folder.
    """
    scratch = folder.with_name(f".{folder.name}")
    entries: dict[str, dict] = {}

    def summed() -> Iterator[tuple[str, Tensor]]:
        for name, weight in checked(named_weights, expected):
            weight = weight.detach().to(dtype).cpu()
            entries[name] = {"shape": list(weight.shape), "sha256": tensor_checksum(weight)}
            yield name, weight

    file = plan_tensor_file({name: TensorSpec(dtype, shape) for name, shape in expected.items()})
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        file.write(scratch / WEIGHTS_FILE, summed())
        manifest = {"label": folder.name, "weights": entries}
        (scratch / MANIFEST_FILE).write_text(json.dumps(manifest), encoding="utf-8")
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_publication(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a publication, one in memory at a time."""
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no mapping
            yield name, file.get_tensor(name)


def check_publication(
    folder: Path, expected: Mapping[str, Sequence[int]], part: int = 0, num_parts: int = 1
) -> None:
    """Raise ValueError unless the folder holds exactly the expected weights, to the last bit.

    Names and shapes are all compared, checksums only of every `num_parts`-th tensor from `part`
    on: workers that share a model also share this work. OSError and SafetensorError pass.
    """
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    entries = manifest["weights"]
    if problem := difference(
        {name: entry["shape"] for name, entry in entries.items()}, expected, "published", "own"
    ):
        raise ValueError(problem)
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        if set(file.keys()) != set(entries):
            raise ValueError(f"{folder / WEIGHTS_FILE} holds other weights than its manifest says")
        for name in sorted(entries)[part::num_parts]:
            if tensor_checksum(file.get_tensor(name)) != entries[name]["sha256"]:
                raise ValueError(f"{folder / WEIGHTS_FILE}: {name} has another checksum")


def difference(
    one: Mapping[str, Sequence[int]], other: Mapping[str, Sequence[int]], whose: str, others: str
) -> str:
    """What differs between two models' names and shapes, in words; "" when nothing does."""
    for name in sorted(one.keys() | other.keys()):
        shapes = [list(m[name]) if name in m else "absent" for m in (one, other)]
        if shapes[0] != shapes[1]:
            return f"weight {name}: {whose} {shapes[0]}, {others} {shapes[1]}"
    return ""
