"""A run that is killed, asked to stop, or finished, and then started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LATEST, entries, forked
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_samples import (
    cli,
    config_file,
    files_of,
    settings,
    trained,
    training_rows,
    untimed_rows,
)

from flowrl.checkpoint import latest_checkpoint, load_training_state
from flowrl.config import load_config
from flowrl.run import start
from flowrl.train import train

pytestmark = pytest.mark.timeout(300)

# Scores a sum, and at one call of its worker sends the trainer a signal.
REWARD = """
import os, signal

calls = 0

def score(data_source, solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    if calls == int(os.environ.get("SIGNAL_AT_CALL", "0")):
        os.kill(os.getppid(), getattr(signal, os.environ["SIGNAL_NAME"]))
    first, _, second = solution_str.partition("+")
    is_sum = first.isdecimal() and second.isdecimal()
    return float(is_sum and int(first) + int(second) == int(ground_truth))
"""
# 4 held-out responses before the first step, 4 x 4 in every step: in the middle of step 5.
MIDDLE_OF_STEP_5 = 4 + 4 * 16 + 8

Z_WITH_DROPOUT = ("flow.preset=original", "trainer.total_training_steps=6", "trainer.save_freq=3")
CASES = {
    "float32": Z_WITH_DROPOUT,
    "bfloat16": (*Z_WITH_DROPOUT, "model.dtype=bfloat16"),
    "two_mini_batches": (*Z_WITH_DROPOUT, "actor.ppo_mini_batch_size=2", "actor.ppo_epochs=2"),
}


@pytest.fixture(scope="module")
def straight(
    tiny_sums: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, tuple[str, ...]]]:
    """By case: the directory of a run that nothing disturbed, and its settings."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "reward.py").write_text(REWARD)

    def run(case: str) -> tuple[Path, tuple[str, ...]]:
        changes = (*CASES[case], f"reward.function={folder / 'reward.py'}:score")
        if not (folder / case).exists():
            trained(tiny_sums, folder / case, *changes)
        return folder / case, changes

    return run


def state_of(run_dir: Path) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
    """Optimiser tensors, state and HF weights of the last checkpoint."""
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    tensors, state = load_training_state(checkpoint)
    return tensors, state, load_file(checkpoint.hf / "model.safetensors")


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Every weight, master, moment, metric, data position and evaluation is the same."""
    (tensors, state, weights), (tensors_2, state_2, weights_2) = (
        state_of(run_dir),
        state_of(expected),
    )
    assert tensors.keys() == tensors_2.keys()
    for kind in ("master", "exp_avg", "exp_avg_sq", "step"):
        assert {f"{kind}.partition.layers.0.weight", f"{kind}.model.norm.weight"} <= tensors.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_2[name])] == []
    assert weights.keys() == weights_2.keys()
    assert [name for name in weights if not torch.equal(weights[name], weights_2[name])] == []
    assert state == state_2
    assert (state["step"], state["sampler"]["position"]) == (6, 24)
    assert untimed_rows(run_dir) == untimed_rows(expected)
    evaluations = files_of(run_dir / "evaluations")
    assert evaluations.keys() == {"step_0.json", "step_6.json"}
    assert evaluations == files_of(expected / "evaluations")


@pytest.fixture
def killed(tiny_sums: Path, tmp_path: Path) -> Callable[[tuple[str, ...]], Path]:
    """The directory of a run that SIGKILL ended in the middle of step 5."""

    def run(changes: tuple[str, ...]) -> Path:
        config = load_config(None, settings(tiny_sums, tmp_path / "run", *changes))

        def child() -> None:
            os.environ.update(SIGNAL_AT_CALL=str(MIDDLE_OF_STEP_5), SIGNAL_NAME="SIGKILL")
            torch.set_num_threads(1)  # the threads of the parent's pool do not exist here
            train(config)

        _, status = os.waitpid(forked(child), 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert [row["step"] for row in training_rows(tmp_path / "run")] == [1, 2, 3, 4]
        assert entries(tmp_path / "run") == ["global_step_3"]
        return tmp_path / "run"

    return run


@pytest.mark.parametrize("case", CASES)
def test_killed_run_continues_as_if_nothing_had_happened(
    tiny_sums: Path,
    straight: Callable[[str], tuple[Path, tuple[str, ...]]],
    killed: Callable[[tuple[str, ...]], Path],
    case: str,
) -> None:
    expected, changes = straight(case)
    run_dir = killed(changes)
    run = trained(tiny_sums, run_dir, *changes)
    assert run.step == 6
    assert [row["step"] for row in training_rows(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert_same_run(run_dir, expected)


def test_another_reference_is_refused_and_nothing_changes(
    tiny_sums: Path,
    tmp_path: Path,
    straight: Callable[[str], tuple[Path, tuple[str, ...]]],
    killed: Callable[[tuple[str, ...]], Path],
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_sums, changed)
    weights = load_file(changed / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    changes = straight("float32")[1]
    run_dir = killed(changes)
    before = files_of(run_dir)
    with pytest.raises(ValueError, match="trained against a reference with fingerprint") as error:
        trained(changed, run_dir, *changes)
    assert str(changed) in str(error.value)
    assert "restore the model and model.dtype, or use another run directory" in str(error.value)
    assert files_of(run_dir) == before


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("sampler", "state.json lacks 1 of 3 entries, first sampler: resume with"),
        ("lookahead", "state.json lacks 1 of 3 entries, first lookahead: "),
        ("reference_fingerprint", "state.json lacks 1 of 3 entries, first reference_fingerprint: "),
        ("sampler/position", "state.json: the saved sampler has position None, not a multiple of"),
        ("lookahead/batches", r"state.json: .* sampled ahead are damaged, .*'batches'"),
        ("master.model.norm.weight", r"state.safetensors lacks 1 of \d+ entries, first master\.m"),
        ("exp_avg.model.norm.weight", r"state.safetensors lacks 1 of \d+ entries, first exp_avg\."),
        ("step.partition.layers.0.weight", r"state.safetensors lacks 1 of \d+ entries, first step"),
    ],
    ids=lambda text: text.split()[0],
)
def test_incomplete_checkpoint_is_refused_and_nothing_changes(
    tiny_sums: Path,
    tmp_path: Path,
    straight: Callable[[str], tuple[Path, tuple[str, ...]]],
    missing: str,
    message: str,
) -> None:
    finished, changes = straight("float32")
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None
    tensors, state = load_training_state(checkpoint)
    if missing in tensors:
        rest = {name: tensor.clone() for name, tensor in tensors.items() if name != missing}
        save_file(rest, checkpoint.path / "training_state.safetensors")
    else:
        key, _, inner = missing.partition("/")
        del (state[key] if inner else state)[inner or key]
        (checkpoint.path / "state.json").write_text(json.dumps(state))
    before = files_of(run_dir)
    with pytest.raises(ValueError, match=message) as error:
        trained(tiny_sums, run_dir, *changes)
    assert str(checkpoint.path) in str(error.value)
    assert files_of(run_dir) == before


def test_sigterm_saves_the_running_step_and_ends_cleanly(
    tiny_sums: Path, tmp_path: Path, straight: Callable[[str], tuple[Path, tuple[str, ...]]]
) -> None:
    expected, changes = straight("float32")
    run_dir = tmp_path / "run"
    config = config_file(tmp_path / "run.yaml", tiny_sums, run_dir, *changes)
    ended = subprocess.run(
        [sys.executable, "-m", "flowrl.cli", "train", str(config)],
        env={**os.environ, "SIGNAL_AT_CALL": str(MIDDLE_OF_STEP_5), "SIGNAL_NAME": "SIGTERM"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert "SIGTERM: saving after this step" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (run_dir / LATEST).read_text() == "5"
    assert [row["step"] for row in training_rows(run_dir)] == [1, 2, 3, 4, 5]
    trained(tiny_sums, run_dir, *changes)
    assert_same_run(run_dir, expected)


def test_finished_run_that_is_started_again_stays_as_it_is(
    tiny_sums: Path, tmp_path: Path, straight: Callable[[str], tuple[Path, tuple[str, ...]]]
) -> None:
    finished, changes = straight("float32")
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    config = config_file(tmp_path / "run.yaml", tiny_sums, run_dir, *changes)
    before = files_of(run_dir)
    code, out, _ = cli("train", config)
    assert code == 0
    assert "summary" in out
    after = files_of(run_dir)
    assert after.keys() - before.keys() == {"training.png"}
    # config.yaml names the directory, which the copy has of its own.
    assert [name for name in before if after[name] != before[name]] == ["config.yaml"]


def test_more_steps_than_at_first_continue_the_same_run(
    tiny_sums: Path, tmp_path: Path, straight: Callable[[str], tuple[Path, tuple[str, ...]]]
) -> None:
    expected, changes = straight("float32")
    short = ("trainer.total_training_steps=4", "trainer.save_freq=-1")
    trained(tiny_sums, tmp_path, *changes, *short)
    assert entries(tmp_path) == ["global_step_4"]
    trained(tiny_sums, tmp_path, *changes)
    # The shorter run has judged its own end.
    (tmp_path / "evaluations" / "step_4.json").unlink()
    rows = untimed_rows(tmp_path)
    rows[4] = {name: value for name, value in rows[4].items() if not name.startswith("val/")}
    assert rows == untimed_rows(expected)
    assert state_of(tmp_path)[1] == state_of(expected)[1]


def test_a_run_directory_has_one_writer(tiny_sums: Path, tmp_path: Path) -> None:
    config = load_config(None, settings(tiny_sums, tmp_path, "trainer.total_training_steps=1"))
    with start(config), pytest.raises(ValueError, match=rf"another process writes to {tmp_path}"):
        start(config)
    with start(config):  # the first has left
        pass


def test_resume_mode_disable_starts_anew_and_keeps_the_old_metrics(
    tiny_sums: Path, tmp_path: Path, straight: Callable[[str], tuple[Path, tuple[str, ...]]]
) -> None:
    expected, changes = straight("float32")
    shutil.copytree(expected, tmp_path / "run")
    trained(tiny_sums, tmp_path / "run", *changes, "trainer.resume_mode=disable")
    assert_same_run(tmp_path / "run", expected)
    previous = (tmp_path / "run" / "metrics.previous.jsonl").read_bytes()
    assert previous == (expected / "metrics.jsonl").read_bytes()
