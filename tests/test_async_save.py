"""Checkpoints that a thread writes while training goes on: same files, whole, never silent.

A save is held where a test wants it by the file operations of its thread.
"""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LATEST, entries, forked, read_stamp, stamped_model
from tiny_model import random_model, tiny_tokenizer
from training_samples import (
    config_file,
    files_of,
    refused,
    settings,
    trained,
    training_rows,
    untimed_rows,
)

from flowrl import train as training
from flowrl.background_save import BackgroundSave, host_copies
from flowrl.checkpoint import TENSORS_FILE, latest_checkpoint, save_checkpoint
from flowrl.config import load_config
from flowrl.run import Run

ASYNC = "actor.checkpoint.async_save=true"
RUN = ("flow.preset=original", "trainer.val_before_train=false", "data.val_max_samples=2")
FIVE_STEPS = (
    *RUN,
    "model.dtype=bfloat16",
    "trainer.total_training_steps=5",
    "trainer.save_freq=2",
)
HELD_S = 60.0  # no save takes as long; a test that forgets to let it go on ends all the same


def is_saving() -> bool:
    return threading.current_thread().name == "save"


@pytest.fixture
def before_write(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Make the thread of a save call something before it makes its first folder."""
    mkdir = os.mkdir

    def install(action: Callable[[], object]) -> None:
        def acting_mkdir(path: Path, *args: int) -> None:
            if is_saving() and ".tmp-" in str(path) and str(path).endswith(os.uname().nodename):
                action()
            mkdir(path, *args)

        monkeypatch.setattr(os, "mkdir", acting_mkdir)

    return install


@pytest.fixture
def gate(before_write: Callable[[Callable[[], object]], None]) -> Iterator[threading.Event]:
    """Every save waits for this before it writes."""
    event = threading.Event()
    before_write(lambda: event.wait(HELD_S))
    yield event
    event.set()


def save(run_dir: Path, step: int, background: BackgroundSave | None, keep: int = 2) -> Path:
    """Save a checkpoint whose every part holds the number of its step; see read_stamp."""
    model = stamped_model()
    model.lm_head.weight.data.fill_(step)
    return save_checkpoint(
        run_dir,
        step,
        model=model,
        tokenizer=tiny_tokenizer(),
        tensors={"master.w": torch.full((64, 8), float(step)), "step.w": torch.tensor(float(step))},
        state={"step": step, "stamp": step},
        keep=keep,
        background=background,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_files_hold_what_was_there_at_the_call(
    tmp_path: Path, gate: threading.Event, tied: bool, dtype: torch.dtype
) -> None:
    model = random_model("qwen3", tied=tied, dtype=dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tensors = {f"master.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"exp_avg.{name}": torch.rand(p.shape) for name, p in model.named_parameters()}
    tensors["exp_avg.transposed"] = torch.rand(3, 5).T

    def save_to(run_dir: Path, background: BackgroundSave | None) -> None:
        save_checkpoint(
            run_dir,
            1,
            model=model,
            tokenizer=tiny_tokenizer(),
            tensors=tensors,
            state={"step": 1},
            keep=1,
            background=background,
        )

    save_to(tmp_path / "sync", None)
    background = BackgroundSave(HELD_S)
    save_to(tmp_path / "async", background)
    for tensor in (*tensors.values(), *model.parameters()):
        tensor.detach().fill_(torch.nan)
    model.generation_config.temperature = 0.123
    model.config.rope_theta = 1.0
    assert not (tmp_path / "async" / LATEST).exists()
    gate.set()
    background.wait()
    assert files_of(tmp_path / "async") == files_of(tmp_path / "sync")
    assert all(parameter.isnan().all() for parameter in model.parameters()), "no copy goes back"


def test_copies_share_what_was_shared() -> None:
    """A float32 weight is its own master, and two copies of it would be a third of the price."""
    model = random_model("llama", tied=True)
    embedding = model.get_input_embeddings().weight
    tensors = {"master": embedding.detach(), "exp_avg": torch.zeros_like(embedding)}
    copied, copies = host_copies(model, tensors)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert copies["master"].data_ptr() == copied.get_input_embeddings().weight.data_ptr()
    originals = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), *tensors.values())}
    assert originals.isdisjoint(t.data_ptr() for t in (*copied.parameters(), *copied.buffers()))
    assert originals.isdisjoint(t.data_ptr() for t in copies.values())


def test_older_checkpoints_go_when_the_new_one_is_whole(
    tmp_path: Path, gate: threading.Event
) -> None:
    save(tmp_path, 1, None, keep=1)
    background = BackgroundSave(HELD_S)
    save(tmp_path, 2, background, keep=1)
    background.check()  # nothing has failed so far
    assert entries(tmp_path) == ["global_step_1"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 1
    gate.set()
    background.wait()
    assert entries(tmp_path) == ["global_step_2"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 2


def test_next_save_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    background = BackgroundSave(HELD_S)
    save(tmp_path, 1, background)
    threading.Timer(0.2, gate.set).start()
    save(tmp_path, 2, background)
    assert read_stamp(latest_checkpoint(tmp_path)) >= 1
    background.wait()
    assert entries(tmp_path) == ["global_step_1", "global_step_2"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 2


def test_write_that_hangs_is_given_up_after_the_time_limit(
    tmp_path: Path, gate: threading.Event
) -> None:
    background = BackgroundSave(0.05)
    save(tmp_path, 1, background)
    with pytest.raises(TimeoutError, match=r"global_step_1 is not written after 0\.05 s") as caught:
        save(tmp_path, 2, background)
    assert "actor.checkpoint.async_save_timeout_s" in str(caught.value)
    background.wait()  # returns: the end of the run need not wait for it again
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "save":
            thread.join()


def test_bad_state_is_refused_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would come back from JSON as another value"):
        save_checkpoint(
            tmp_path,
            1,
            model=stamped_model(),
            tokenizer=tiny_tokenizer(),
            tensors={},
            state={"pair": (1, 2)},
            keep=1,
            background=BackgroundSave(HELD_S),
        )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_unforeseen_error_of_the_thread_is_not_swallowed(tmp_path: Path) -> None:
    def write() -> None:
        raise KeyError("never foreseen")

    background = BackgroundSave(HELD_S)
    background.start(tmp_path / "global_step_1", write)
    with pytest.raises(RuntimeError, match="global_step_1 was not saved"):
        background.wait()


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Run], None]], None]:
    """Have a function called in the loop after each training step."""
    step = training.training_step

    def install(act: Callable[[Run], None]) -> None:
        def acting_step(run: Run) -> dict[str, float]:
            metrics = step(run)
            act(run)
            return metrics

        monkeypatch.setattr(training, "training_step", acting_step)

    return install


def join_save(run: Run) -> None:
    for thread in threading.enumerate():
        if thread.name == "save":
            thread.join(HELD_S)


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """The same checkpoints to the bit, metrics and evaluations."""
    for folder in ("checkpoints", "evaluations"):
        assert files_of(run_dir / folder) == files_of(expected / folder)
    assert untimed_rows(run_dir) == untimed_rows(expected)


@pytest.fixture(scope="module")
def synchronous(tiny_sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose loop writes its checkpoints."""
    return trained(tiny_sums, tmp_path_factory.mktemp("run"), *FIVE_STEPS).config.run_dir


def test_run_writes_the_same_files(tiny_sums: Path, tmp_path: Path, synchronous: Path) -> None:
    trained(tiny_sums, tmp_path, *FIVE_STEPS, ASYNC)
    assert entries(tmp_path) == ["global_step_4", "global_step_5"]
    assert_same_run(tmp_path, synchronous)
    for run_dir in (tmp_path, synchronous):
        waited = [row.get("timing_s/save_checkpoint", 0) > 0 for row in training_rows(run_dir)]
        assert waited == [False, False, True, False, True], "in the row after the save"


def test_critic_is_saved_too(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (*RUN, "flow.preset=paper", "algorithm.objective=ppo")
    for name, change in (("sync", "trainer.save_freq=1"), ("async", ASYNC)):
        trained(tiny_sums, tmp_path / name, *changes, "trainer.total_training_steps=1", change)
    assert_same_run(tmp_path / "async", tmp_path / "sync")


def killed_while_saving(step: int, file: str, overrides: list[str]) -> None:
    """Train in a process that kills itself when the thread of a save opens a file."""

    def hook(event: str, args: tuple) -> None:
        if event == "open" and is_saving() and isinstance(args[0], str | os.PathLike):
            path = Path(args[0])
            if path.name == file and f".global_step_{step}.tmp-" in str(path):
                os.kill(os.getpid(), signal.SIGKILL)

    def child() -> None:
        torch.set_num_threads(1)  # the threads of the parent's pool do not exist here
        sys.addaudithook(hook)
        training.train(load_config(None, overrides))

    _, status = os.waitpid(forked(child), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def test_run_that_is_killed_while_the_thread_writes_continues(
    tiny_sums: Path, tmp_path: Path, synchronous: Path
) -> None:
    overrides = settings(tiny_sums, tmp_path, *FIVE_STEPS, ASYNC)
    killed_while_saving(4, TENSORS_FILE, overrides)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2
    assert len(entries(tmp_path)) == 2, "the rest of the save that was killed"
    trained(tiny_sums, tmp_path, *FIVE_STEPS, ASYNC)
    assert_same_run(tmp_path, synchronous)


@pytest.mark.parametrize("cause", ["full disk", "removed folder"])
def test_failed_write_ends_the_run_at_the_next_step(
    tiny_sums: Path,
    tmp_path: Path,
    before_write: Callable[[Callable[[], object]], None],
    every_step: Callable[[Callable[[Run], None]], None],
    cause: str,
) -> None:
    run_dir = tmp_path / "run"
    changes = (*RUN, "trainer.total_training_steps=9", "trainer.save_freq=2", ASYNC)
    config = config_file(tmp_path / "run.yaml", tiny_sums, run_dir, *changes)
    limits, num_saves = resource.getrlimit(resource.RLIMIT_FSIZE), 0

    def fail() -> None:
        nonlocal num_saves
        num_saves += 1
        if num_saves == 2 and cause == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
        if num_saves == 2 and cause == "removed folder":
            shutil.move(run_dir / "checkpoints", tmp_path / "moved")

    before_write(fail)
    every_step(join_save)  # else it depends on the disk's speed which step is the next
    try:
        message = refused("train", config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{run_dir}/checkpoints/global_step_4 was not saved: " in message
    assert {"full disk": "File too large", "removed folder": "No such file"}[cause] in message
    # Step 5 is not begun when the disk refuses at once.
    assert len(training_rows(run_dir)) in (4, 5)
    if cause == "removed folder":
        shutil.move(tmp_path / "moved", run_dir / "checkpoints")
    assert entries(run_dir) == ["global_step_2"]
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == 2


def test_sigterm_waits_for_its_save(
    tiny_sums: Path,
    tmp_path: Path,
    before_write: Callable[[Callable[[], object]], None],
    every_step: Callable[[Callable[[Run], None]], None],
) -> None:
    def terminate(run: Run) -> None:
        if run.step == 2:
            signal.raise_signal(signal.SIGTERM)

    before_write(lambda: time.sleep(0.3))
    every_step(terminate)
    changes = (*RUN, "trainer.total_training_steps=9", "trainer.save_freq=1", ASYNC)
    run = trained(tiny_sums, tmp_path, *changes)
    assert run.step == 2
    assert entries(tmp_path) == ["global_step_1", "global_step_2"]
    assert (tmp_path / LATEST).read_text() == "2"


@pytest.mark.parametrize("is_refused", [False, True], ids=["saved", "not saved"])
def test_run_that_fails_first_ends_its_save(
    tiny_sums: Path,
    tmp_path: Path,
    before_write: Callable[[Callable[[], object]], None],
    every_step: Callable[[Callable[[Run], None]], None],
    caplog: pytest.LogCaptureFixture,
    is_refused: bool,
) -> None:
    def slow() -> None:
        time.sleep(0.3)
        if is_refused:
            raise OSError("no room")

    def fail(run: Run) -> None:
        if run.step == 3:
            raise RuntimeError("the cause")

    before_write(slow)
    every_step(fail)
    changes = (*RUN, "trainer.total_training_steps=9", "trainer.save_freq=2", ASYNC)
    with pytest.raises(RuntimeError, match="the cause"):
        trained(tiny_sums, tmp_path, *changes)
    assert entries(tmp_path) == ([] if is_refused else ["global_step_2"])
    assert ("global_step_2 was not saved: no room" in caplog.text) == is_refused
