"""Folders of weights on their way to servers: whole, checked, and removed."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowrl.rollout.published_folder import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    check_publication,
    make_run_folder,
    read_publication,
    write_publication,
)


def some_weights() -> dict[str, torch.Tensor]:
    return {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2, 2).transpose(0, 1)}


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_gives_back_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    weights, folder = some_weights(), tmp_path / "label"
    write_publication(folder, reversed(weights.items()), shapes_of(weights), dtype)
    for part in range(4):
        check_publication(folder, shapes_of(weights), part, 4)
    read = dict(read_publication(folder))
    assert read.keys() == weights.keys()
    assert all(torch.equal(read[name], weights[name].to(dtype)) for name in weights)
    assert [path.name for path in tmp_path.iterdir()] == ["label"]


def test_every_damaged_tensor_is_found_by_one_of_the_workers(tmp_path: Path) -> None:
    weights, folder = some_weights(), tmp_path / "label"
    write_publication(folder, weights.items(), shapes_of(weights), torch.float32)
    path = folder / WEIGHTS_FILE
    whole, num_bytes = path.read_bytes(), 4 * (15 + 7 + 8)
    for place in range(len(whole) - num_bytes, len(whole), 4):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        num_found = 0
        for part in range(2):
            try:
                check_publication(folder, shapes_of(weights), part, 2)
            except ValueError as error:
                assert "another checksum" in str(error)
                num_found += 1
        assert num_found == 1


def test_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    weights, folder = some_weights(), tmp_path / "label"
    write_publication(folder, weights.items(), shapes_of(weights), torch.float32)
    for expected, problem in (
        ({**shapes_of(weights), "d": [1]}, r"weight d: published absent, own \[1\]"),
        ({**shapes_of(weights), "b": [8]}, r"weight b: published \[7\], own \[8\]"),
        ({"a": [3, 5], "b": [7]}, r"weight c: published \[2, 2, 2\], own absent"),
    ):
        with pytest.raises(ValueError, match=problem):
            check_publication(folder, expected)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    del manifest["weights"]["c"]
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="other weights than its manifest says"):
        check_publication(folder, {"a": [3, 5], "b": [7]})


def test_stream_that_breaks_off_leaves_no_folder(tmp_path: Path) -> None:
    weights = some_weights()

    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", weights["a"]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        write_publication(tmp_path / "label", broken(), shapes_of(weights), torch.float32)
    with pytest.raises(ValueError, match="were not published"):
        pairs = list(weights.items())[:2]
        write_publication(tmp_path / "label", pairs, shapes_of(weights), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_run_folder_replaces_those_of_runs_long_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os; print(os.getpid())"]
    gone = subprocess.run(command, text=True, capture_output=True, check=True).stdout.strip()
    host = socket.gethostname()
    killed = tmp_path / f"flowrl-weights-{host}-{gone}-0123abcd"
    just_killed = tmp_path / f"flowrl-weights-{host}-{gone}-abcd0123"
    others = [
        tmp_path / f"flowrl-weights-{host}-{os.getppid()}-0123abcd",
        tmp_path / f"flowrl-weights-another-{gone}-0123abcd",
        tmp_path / f"flowrl-weights-{host}-{gone}",
    ]
    for folder in [killed, just_killed, *others]:
        (folder / "label").mkdir(parents=True)
        if folder is not just_killed:
            os.utime(folder, (0, 0))
    own = make_run_folder(tmp_path)
    assert set(tmp_path.iterdir()) == {own, just_killed, *others}
    assert own.stat().st_mode & 0o777 == 0o700
