"""Checkpoints of several ranks that the main rank's thread writes while all of them train on."""

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from parallel_cases import Case, Spread
from parts_samples import build_parts, run_state, save_step, train_steps
from training_samples import files_of, settings, untimed_rows

from flowrl import train as training
from flowrl.background_save import BackgroundSave
from flowrl.checkpoint import latest_checkpoint
from flowrl.config import load_config
from flowrl.main_rank import is_main_rank
from flowrl.megatron.layout import Layout
from flowrl.run import Run

DP2 = Spread(2, distributed_optimizer=True)
PP2 = Spread(2, Layout(pipeline=2))
ASYNC = "actor.checkpoint.async_save=true"
RUN = (
    "actor.strategy=megatron",
    "trainer.total_training_steps=2",
    "trainer.save_freq=1",
    "trainer.val_before_train=false",
    "data.val_max_samples=2",
    "rollout.n=2",
)


def before_write(action: Callable[[], object]) -> None:
    """Have the thread of a save call `action` before it makes its first folder, in this process."""
    mkdir = os.mkdir

    def acting_mkdir(path: Path, *args: int) -> None:
        if threading.current_thread().name == "save" and Path(path).name.startswith(".global_step"):
            action()
        mkdir(path, *args)

    os.mkdir = acting_mkdir


def saved_both_ways(rank: int, case: Case, spread: Spread, folder: Path) -> None:
    """Save twice, by the loop and by a thread that is held until every number has changed."""
    gate = threading.Event()
    before_write(lambda: gate.wait(60))
    parts = build_parts(case, spread)
    train_steps(parts.policy, case, 0, 2)
    save_step(parts, folder / "sync", 2)
    background = BackgroundSave(60)
    path = parts.save(folder / "async", 2, run_state(2), 2, background)
    assert not path.exists()
    train_steps(parts.policy, case, 2, 3)
    gate.set()
    parts.on_main(background.wait)
    assert path.exists()
    parts.close()


@pytest.mark.parametrize(
    ("case", "spread"),
    [
        (Case(), Spread(1)),
        (Case(tied=True), PP2),
        (Case(dtype=torch.bfloat16), DP2),
    ],
    ids=["one rank", "tied PP2", "bfloat16 DP2, distributed optimiser"],
)
def test_files_hold_what_was_there_at_the_call(tmp_path: Path, case: Case, spread: Spread) -> None:
    run_ranks(spread.num_ranks, saved_both_ways, case, spread, tmp_path)
    assert files_of(tmp_path / "async") == files_of(tmp_path / "sync")


def train_rank(rank: int, overrides: list[str]) -> None:
    training.train(load_config(None, overrides))


def test_run_writes_the_same_files(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (*RUN, "parallel.pipeline_model_parallel_size=2")
    run_ranks(2, train_rank, settings(tiny_sums, tmp_path / "sync", *changes))
    run_ranks(2, train_rank, settings(tiny_sums, tmp_path / "async", *changes, ASYNC))
    expected = files_of(tmp_path / "sync" / "checkpoints")
    assert files_of(tmp_path / "async" / "checkpoints") == expected
    assert untimed_rows(tmp_path / "async") == untimed_rows(tmp_path / "sync")


def failing_rank(rank: int, overrides: list[str], run_dir: Path) -> tuple[str, int]:
    """Train; the second save loses its folder. The error and the last step of this rank."""
    num_saves, last_step = 0, 0
    step = training.training_step

    def lose() -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 2:
            shutil.move(run_dir / "checkpoints", run_dir / "moved")

    def joined_step(run: Run) -> dict[str, float]:
        nonlocal last_step
        metrics = step(run)
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()
        last_step = run.step
        return metrics

    if is_main_rank():
        before_write(lose)
    training.training_step = joined_step
    with pytest.raises(OSError) as caught:
        training.train(load_config(None, overrides))
    return str(caught.value), last_step


def test_failed_write_ends_every_rank_at_the_next_step(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (*RUN, "trainer.total_training_steps=9", "trainer.save_freq=2", ASYNC)
    overrides = settings(tiny_sums, tmp_path, *changes)
    first, second = run_ranks(2, failing_rank, overrides, tmp_path)
    assert first == second
    assert f"{tmp_path}/checkpoints/global_step_4 was not saved: " in first[0]
    assert first[1] in (4, 5)  # 4 when the disk refuses before step 5 is begun
    shutil.move(tmp_path / "moved", tmp_path / "checkpoints")
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
