"""Checkpoints of writers that are killed, and of disks that refuse.

Kills are real: a forked writer is ended by SIGKILL and its leftovers are read by this process.
"""

import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LATEST, entries, forked, read_stamp, save, save_model
from tiny_model import tiny_model

from flowrl.checkpoint import export_hf, latest_checkpoint


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses nothing that it has written, so these need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def is_killed_at(moment: int, work: Callable[[], None]) -> bool:
    """Run `work` in a process that kills itself just before its file operation `moment`.

    Counted are the makings, writing opens, renames and removals that Python audits. False when
    there were fewer of them.
    """
    count = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        is_write = event == "open" and args[2] & os.O_ACCMODE != os.O_RDONLY
        if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    def child() -> None:
        sys.addaudithook(hook)
        work()

    _, status = os.waitpid(forked(child), 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("step", [2, 3], ids=["replacing", "pruning"])
def test_killed_at_every_file_operation(
    tmp_path: Path, no_fsync: None, caplog: pytest.LogCaptureFixture, step: int
) -> None:
    start, run_dir = tmp_path / "start", tmp_path / "killed"
    save(start, 1)
    save(start, 2)
    stamps, is_killed = [], True
    while is_killed:
        shutil.copytree(start, run_dir)
        is_killed = is_killed_at(len(stamps), lambda: save(run_dir, step, stamp=7))
        assert (run_dir / LATEST).read_text() in ("2", str(step))
        stamps.append(read_stamp(latest_checkpoint(run_dir)))
        save(run_dir, 4, keep=1)  # puts right whatever was left
        assert entries(run_dir) == ["global_step_4"]
        shutil.rmtree(run_dir)
    assert caplog.messages == [], "the latest file never named a checkpoint that was not there"
    num_old = stamps.count(2)
    assert num_old > 8
    assert len(stamps) - num_old > 8
    assert stamps == [2] * num_old + [7] * (len(stamps) - num_old)


def test_killed_at_random_moments(tmp_path: Path, no_fsync: None) -> None:
    def write_forever(first: int) -> None:
        for step in range(first, first + 10_000):
            save(tmp_path, step, stamp=2 * step)
            save(tmp_path, step, stamp=2 * step + 1)

    delays = random.Random(3)
    save(tmp_path, 0)
    step = 0
    for _ in range(10):
        pid = forked(lambda first=step + 1: write_forever(first))
        while (tmp_path / LATEST).read_text() == str(step):
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "the writer failed"
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        stamp = read_stamp(latest_checkpoint(tmp_path))
        assert stamp // 2 > step
        step = stamp // 2


def test_everything_is_flushed_before_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        log.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        log.append(("rename", str(target)))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    monkeypatch.setattr(os, "replace", logged_rename)
    path = save(tmp_path, 5)
    named = log.index(("rename", str(path)))
    before = {Path(name).relative_to(tmp_path).as_posix() for _, name in log[:named]}
    scratch = f"checkpoints/.global_step_5.tmp-{os.getpid()}-{socket.gethostname()}"
    inside = [p.relative_to(path).as_posix() for p in [path, *path.rglob("*")]]
    assert before == {scratch if name == "." else f"{scratch}/{name}" for name in inside}
    assert log[named + 1 :] == [
        ("fsync", str(path.parent)),
        ("fsync", str(tmp_path / f".{LATEST}.tmp")),
        ("rename", str(tmp_path / LATEST)),
        ("fsync", str(tmp_path)),
    ]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writes beyond the limit fail as on a full disk, in Python and in native code alike."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("num_floats", [8, 200_000], ids=["weights", "training-state"])
def test_refused_write_leaves_the_previous_checkpoint(tmp_path: Path, num_floats: int) -> None:
    save(tmp_path, 1)
    model = tiny_model(hidden_size=128 if num_floats == 8 else 8)
    with (
        file_size_limit(100_000),
        pytest.raises(OSError, match=r"global_step_2 was not saved.*make room") as caught,
    ):
        save_model(tmp_path, 2, model, {"x": torch.zeros(num_floats)})
    assert caught.value.errno is not None
    assert entries(tmp_path) == ["global_step_1"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 1
    save(tmp_path, 2)
    assert read_stamp(latest_checkpoint(tmp_path)) == 2


def test_half_made_replacement_survives_a_refused_save(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    os.rename(path, path.with_name(".global_step_1.previous"))  # where a kill may leave it
    assert read_stamp(latest_checkpoint(tmp_path)) == 1
    with file_size_limit(100), pytest.raises(OSError, match="global_step_1 was not saved"):
        save(tmp_path, 1, stamp=3)
    assert entries(tmp_path) == ["global_step_1"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 1


def test_refused_export_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    with (
        file_size_limit(100),
        pytest.raises(OSError, match=r"hf was not exported to .*out: .*make room"),
    ):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_run_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(OSError, match="run/checkpoints/global_step_1 was not saved"):
        save(tmp_path / "run", 1)


def test_scratch_folders_of_dead_writers_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    dead = forked(lambda: None)
    os.waitpid(dead, 0)
    host = socket.gethostname()
    names = {
        "dead": f".global_step_1.tmp-{dead}-{host}",
        "same_pid": f".global_step_1.tmp-{os.getpid()}-{host}",
        "alive": f".global_step_1.tmp-{os.getppid()}-{host}",
        "elsewhere": f".global_step_1.tmp-{dead}-other.host",
        "elsewhere_old": f".global_step_2.tmp-{dead}-other.host",
    }
    for name in names.values():
        (folder / name / "hf").mkdir(parents=True)
    two_days_ago = time.time() - 2 * 86400
    os.utime(folder / names["elsewhere_old"], (two_days_ago, two_days_ago))
    save(tmp_path, 3)
    assert entries(tmp_path) == sorted([names["alive"], names["elsewhere"], "global_step_3"])
