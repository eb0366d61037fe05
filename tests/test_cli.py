"""The `flowrl` command from end to end: what it prints, writes and leaves alone."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_samples import cli, config_file, files_of, refused, training_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

import flowrl.rollout.serve
from flowrl.config import Config, config_keys, load_config

pytestmark = pytest.mark.timeout(300)

SHORT = (
    "data.val_max_samples=3",
    "validation.n=2",
    "validation.greedy=true",
    "trainer.total_training_steps=2",
    "trainer.logger=[console,jsonl,tensorboard]",
)


@pytest.fixture(scope="module")
def finished(tiny_sums: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory of a run made by `flowrl train`, and what that printed."""
    folder = tmp_path_factory.mktemp("cli")
    config = config_file(folder / "run.yaml", tiny_sums, folder / "run", *SHORT)
    code, out, err = cli("train", config, "trainer.total_training_steps=2")
    assert code == 0, err
    return folder / "run", out


def test_run_directory_holds_what_it_should(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "evaluations",
        "latest_checkpointed_iteration.txt",
        "metrics.jsonl",
        "tensorboard",
        "training.png",
    }
    assert (run_dir / "latest_checkpointed_iteration.txt").read_text() == "2"
    checkpoints = {path.relative_to(run_dir).as_posix() for path in run_dir.glob("*/*/*")}
    step = "checkpoints/global_step_2"
    assert checkpoints == {f"{step}/hf", f"{step}/state.json", f"{step}/training_state.safetensors"}
    hf = {path.name for path in (run_dir / step / "hf").iterdir()}
    assert hf >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    evaluations = {path.name for path in (run_dir / "evaluations").iterdir()}
    assert evaluations == {"step_0.json", "step_2.json"}
    assert (run_dir / "training.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert load_config(run_dir / "config.yaml").run_dir == run_dir


def test_metrics_have_the_names_of_the_design(finished: tuple[Path, str]) -> None:
    rows = training_rows(finished[0])
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        kinds = {name.split("/")[0] for name in row}
        assert kinds >= {"actor", "critic", "response_length", "timing_s", "perf", "flow"}
        assert {"flow/log_z", "flow/residual", "flow/weight", "flow/ess"} <= row.keys()
        assert {"mismatch/kl", "actor/ppo_kl", "actor/entropy", "actor/grad_norm"} <= row.keys()
        assert row["prompt_length/mean"] == 3
        assert row["perf/total_num_tokens"] == 16 * (3 + row["response_length/mean"])
        assert 0 < row["timing_s/update_actor"] < row["timing_s/step"]
    assert [row["actor/lr"] for row in rows] == pytest.approx([5e-4, 1e-3])
    assert {"val/accuracy", "val/accuracy_greedy"} <= rows[1].keys()


def test_output_tells_before_during_and_after(finished: tuple[Path, str]) -> None:
    run_dir, out = finished
    assert "sums, reward auto" in out
    assert "4 prompts x 4 responses, 2 steps" in out
    for step in (0, 2):
        kept = json.loads((run_dir / "evaluations" / f"step_{step}.json").read_text())
        accuracy = 100 * kept["accuracy"]["avg@2"]["mean"]
        assert f"step {step}: held-out accuracy {accuracy:.1f} %" in out
    summary = out.partition("summary")[2]
    assert "before" in summary and "after" in summary and "points" in summary
    assert "example 1 of 3" in summary
    assert f"plot     {run_dir / 'training.png'}" in summary
    assert f"run      {run_dir}" in summary
    assert "\x1b" not in out


def accuracies(run_dir: Path, step: int) -> list[str]:
    """Percentages of a kept evaluation, as `flowrl eval` prints them."""
    kept = json.loads((run_dir / "evaluations" / f"step_{step}.json").read_text())
    return [f"{100 * kept['accuracy'][name]['mean']:.1f}" for name in ("avg@2", "greedy")]


def test_eval_of_a_run_repeats_its_last_evaluation(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    before = files_of(run_dir)
    code, out, err = cli("eval", run_dir)
    assert code == 0, err
    printed = [re.findall(r"[\d.]+ %", line)[0][:-2] for line in out.splitlines() if " %" in line]
    assert printed[-2:] == accuracies(run_dir, 2)
    assert files_of(run_dir) == before


def test_eval_of_a_folder_repeats_the_evaluation_before_training(
    finished: tuple[Path, str], tiny_sums: Path
) -> None:
    run_dir, _ = finished
    code, out, err = cli("eval", tiny_sums, "--config", run_dir / "config.yaml", "validation.n=2")
    assert code == 0, err
    printed = [re.findall(r"[\d.]+ %", line)[0][:-2] for line in out.splitlines() if " %" in line]
    assert printed[-2:] == accuracies(run_dir, 0)


def test_eval_says_what_it_misses(tiny_sums: Path, finished: tuple[Path, str]) -> None:
    assert "no run directory (no config.yaml); name a --config" in refused("eval", tiny_sums)
    run_dir, _ = finished
    (other := run_dir.with_name("no_checkpoint")).mkdir()
    shutil.copy(run_dir / "config.yaml", other)
    assert f"{other} is a run directory without a checkpoint" in refused("eval", other)


def test_exported_model_is_the_trained_one(finished: tuple[Path, str], tmp_path: Path) -> None:
    run_dir, _ = finished
    code, out, err = cli("export", run_dir, tmp_path / "exported")
    assert code == 0, err
    assert out.strip() == str(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    state = run_dir / "checkpoints" / "global_step_2" / "training_state.safetensors"
    masters = load_file(state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[f"master.{name}"]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.encode("17=") == [1, 7, 11]
    assert "is not an empty folder" in refused("export", run_dir, tmp_path / "exported")
    assert "no checkpoint of step 7" in refused("export", run_dir, tmp_path / "x", "--step", "7")
    assert "is no run directory" in refused("export", tmp_path, tmp_path / "x")


@pytest.mark.parametrize(
    "changes",
    [("validation.n=3",), ("data.val_max_samples=4",), ("validation.greedy=false",)],
    ids=["samples", "prompts", "greedy"],
)
def test_run_continues_with_another_evaluation(
    finished: tuple[Path, str], tmp_path: Path, changes: tuple[str, ...]
) -> None:
    shutil.copytree(finished[0], tmp_path / "run")
    place = f"trainer.default_local_dir={tmp_path / 'run'}"
    config = finished[0] / "config.yaml"
    code, out, err = cli("train", config, place, "trainer.total_training_steps=3", *changes)
    assert code == 0, err
    assert "summary" in out
    assert [row["step"] for row in training_rows(tmp_path / "run")] == [1, 2, 3]
    # Nothing is left to train, and the last evaluation is of another kind.
    other = ("validation.n=5", "trainer.total_training_steps=3")
    assert cli("train", config, place, *other)[0] == 0


def test_console_alone_leaves_no_metrics_file(tiny_sums: Path, tmp_path: Path) -> None:
    changes = ("trainer.logger=[console]", "trainer.total_training_steps=1", "validation.n=1")
    config = config_file(tmp_path / "run.yaml", tiny_sums, tmp_path / "run", *changes)
    code, out, err = cli("train", config)
    assert code == 0, err
    assert "summary" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "checkpoints",
        "config.yaml",
        "evaluations",
        "latest_checkpointed_iteration.txt",
    }


def test_dry_run_checks_everything_and_writes_nothing(tiny_sums: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "run.yaml", tiny_sums, tmp_path / "run")
    code, out, err = cli("train", config, "flow.beta=7", "--dry-run")
    assert code == 0, err
    assert "  beta: 7.0\n" in out
    assert "prompts: 17 for training, 4 held out, longest 3 tokens" in out
    assert re.search(r"first prompt: '\d\d='", out)
    assert "reward of an empty response: 0\n" in out
    assert "would run on cpu from the start" in out
    assert not (tmp_path / "run").exists()


def test_dry_run_looks_at_the_source_of_every_row(tiny_sums: Path, tmp_path: Path) -> None:
    rows = [
        {
            "data_source": source,
            "prompt": [{"role": "user", "content": "17="}],
            "reward_model": {"ground_truth": "17"},
        }
        for source in ("sums", "my/sums")
    ]
    for name, row in zip(("train", "val"), rows, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    files = [f"data.{name}_files=[{tmp_path / name}.jsonl]" for name in ("train", "val")]
    config = config_file(
        tmp_path / "run.yaml", tiny_sums, tmp_path / "run", "data.task=files", *files
    )
    message = refused("train", config, "--dry-run")
    assert "no reward is known for data_source 'my/sums'" in message


def test_dry_run_of_a_finished_run_says_where_it_stands(finished: tuple[Path, str]) -> None:
    code, out, _ = cli("train", finished[0] / "config.yaml", "--dry-run")
    assert code == 0
    assert "would run on cpu after step 2" in out


def test_a_trainers_file_serves_as_it_is(
    tiny_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config_file(tmp_path / "run.yaml", tiny_sums, tmp_path)
    started: list[tuple[Config, str, int, list[str]]] = []
    monkeypatch.setattr(flowrl.rollout.serve, "serve", lambda *given: started.append(given))
    settings = ["rollout.gpu_memory_utilization=0.9", "rollout.tensor_model_parallel_size=2"]
    code, _, err = cli("serve", str(file), "--port", "8123", *settings, "--", "--seed", "7")
    assert code == 0, err
    ((config, host, port, arguments),) = started
    assert config.rollout.engine == "vllm" and config.rollout.tensor_model_parallel_size == 2
    assert (host, port, arguments) == ("127.0.0.1", 8123, ["--seed", "7"])


def test_keys_lists_every_setting() -> None:
    code, out, _ = cli("keys")
    assert code == 0
    assert out.splitlines() == config_keys()
    assert {"flow.beta", "trainer.seed", "actor.optim.lr"} <= set(out.splitlines())


@pytest.mark.parametrize("command", [(), ("train",), ("eval",), ("export",)], ids=str)
def test_help_names_the_commands_and_arguments(command: tuple[str, ...]) -> None:
    code, out, _ = cli(*command, "--help")
    assert code == 0
    words = {
        (): ("train", "eval", "export", "keys", "doctor"),
        ("train",): ("CONFIG", "OVERRIDES", "--dry-run"),
        ("eval",): ("SOURCE", "OVERRIDES", "--config"),
        ("export",): ("SOURCE", "DESTINATION", "--step"),
    }[command]
    assert [word for word in words if word.lower() not in out.lower()] == []


def test_doctor_knows_this_machine() -> None:
    code, out, err = cli("doctor")
    assert code == 0, err
    assert torch.__version__.partition("+")[0] in out
    assert "linear_logprob_forward" in out and "residual_from_sums" in out
