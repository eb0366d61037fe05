"""Wrong data, settings, models and rewards: one readable line, exit code 2, nothing written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from training_samples import cli, config_file, files_of, refused, training_rows

pytestmark = pytest.mark.timeout(300)


def row(question: str = "17=", **changes: Any) -> dict[str, Any]:
    """One row in veRL's schema."""
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": question}],
        "reward_model": {"style": "rule", "ground_truth": question.strip("=")},
        **changes,
    }


def jsonl(*rows: object) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in rows)


GOOD = [row(f"{target}=") for target in range(10, 20)]


@pytest.fixture
def config(tiny_sums: Path, tmp_path: Path) -> Path:
    """A run on good files in `tmp_path`, which tests then spoil."""
    (tmp_path / "train.jsonl").write_bytes(jsonl(*GOOD))
    (tmp_path / "val.jsonl").write_bytes(jsonl(row("20="), row("21=")))
    return config_file(
        tmp_path / "run.yaml",
        tiny_sums,
        tmp_path / "run",
        "data.task=files",
        f"data.train_files=[{tmp_path / 'train.jsonl'}]",
        f"data.val_files=[{tmp_path / 'val.jsonl'}]",
        "trainer.total_training_steps=1",
    )


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != name}


BAD_LINES = {
    "no_prompt": (jsonl(GOOD[0], without("prompt")), ["line 2", "'prompt'", "is missing"]),
    "no_source": (jsonl(without("data_source")), ["line 1", "'data_source'", "is missing"]),
    "misspelt": (
        jsonl(GOOD[0], {**without("reward_model"), "reward_modle": {}}),
        ["line 2", "'reward_model'", "did you mean 'reward_modle'"],
    ),
    "no_truth": (
        jsonl(row(reward_model={"style": "rule"})),
        ["line 1", "'reward_model.ground_truth'", "missing or null"],
    ),
    "text_prompt": (jsonl(row(prompt="17=")), ["line 1", "'prompt'", "'17='", "input_key"]),
    "number_prompt": (jsonl(GOOD[0], row(prompt=3)), ["line 2", "'prompt'", "is 3"]),
    "no_messages": (jsonl(row(prompt=[])), ["line 1", "'prompt'", "is []"]),
    "empty_message": (
        jsonl(row(prompt=[{"role": "user", "content": ""}])),
        ["line 1", "'prompt'", "only empty messages"],
    ),
    "image": (
        jsonl(row(prompt=[{"role": "user", "content": [{"type": "image"}]}])),
        ["line 1", "'prompt[0].content'", "'image'"],
    ),
    "source_number": (jsonl(row(data_source=5)), ["line 1", "'data_source'", "is 5"]),
    "model_text": (jsonl(row(reward_model="x")), ["line 1", "'reward_model'", "'x'"]),
    "extra_list": (jsonl(row(extra_info=[1])), ["line 1", "'extra_info'", "[1]"]),
    "empty": (b"", ["has no rows"]),
    "blank": (b"\n \n", ["has no rows"]),
    "not_json": (jsonl(GOOD[0]) + b"{'prompt': 1}\n", ["line 2", "not JSON", "column 2"]),
    "torn": (jsonl(*GOOD)[:-20], ["line 10", "not JSON"]),
    "list": (b"[1, 2]\n", ["line 1", "[1, 2]", "no object"]),
    "not_utf8": (jsonl(GOOD[0]) + b'{"prompt": "\xff"}\n', ["line 2", r"b'\xff'", "UTF-8"]),
    "nul": (b"\x00" * 100 + b"\n", ["line 1", "not JSON"]),
    "surrogate": (jsonl(row("\ud800=")), ["line 1", "surrogate"]),
    "nested": (b'{"prompt": ' + b"[" * 100_000 + b"\n", ["line 1", "JSON"]),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_line_is_named(config: Path, tmp_path: Path, case: str) -> None:
    content, words = BAD_LINES[case]
    (tmp_path / "train.jsonl").write_bytes(content)
    message = refused("train", config)
    assert message.startswith(str(tmp_path / "train.jsonl"))
    assert [word for word in words if word not in message] == []
    assert len(message) < 600
    assert not (tmp_path / "run").exists()


def test_line_of_20_megabytes_is_refused_by_its_number(config: Path, tmp_path: Path) -> None:
    long = row("1" * 20_000_000)
    (tmp_path / "train.jsonl").write_bytes(jsonl(GOOD[0], long))
    message = refused("train", config)
    assert "train.jsonl, line 2: longer than 16777216 bytes" in message
    assert "max_line_bytes" in message
    assert len(message) < 500


def test_wrong_paths_are_named(config: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "rows.csv").write_text("prompt\n17=\n")
    for name, words in {
        "folder.jsonl": "is a directory",
        "rows.csv": "suffix '.csv' is not supported: use .parquet or .jsonl",
        "nowhere.jsonl": "no such file",
    }.items():
        for key in ("train_files", "val_files"):
            message = refused("train", config, f"data.{key}=[{tmp_path / name}]")
            assert message.startswith(f"{tmp_path / name}: {words}")
    assert not (tmp_path / "run").exists()


def test_bad_parquet_is_named(config: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    files = f"data.train_files=[{path}]"
    path.write_bytes(b"PAR1 this is none PAR1")
    assert "not a readable parquet file" in refused("train", config, files)
    path.write_bytes(b"")
    assert "not a readable parquet file" in refused("train", config, files)
    pq.write_table(pa.Table.from_pylist([{"question": "17="}]), path)
    assert "'prompt' is missing" in refused("train", config, files)
    pq.write_table(pa.Table.from_pylist([*GOOD[:3], row(data_source=None)]), path)
    assert f"{path}, row 3: column 'data_source' is None" in refused("train", config, files)


def test_overlong_prompts_are_dropped_and_counted(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*GOOD[:5], row("1234567890=")]
    (tmp_path / "train.jsonl").write_bytes(jsonl(*rows))
    code, out, err = cli("train", config, "--dry-run")
    assert code == 0, err
    expected = "1 of 6 train prompts exceed data.max_prompt_length = 8 and were dropped"
    assert expected in caplog.text
    assert "prompts: 5 for training, 2 held out, longest 3 tokens" in out

    message = refused("train", config, "data.filter_overlong_prompts=false")
    assert "prompt 5 has 11 tokens, over max_prompt_length 8" in message
    message = refused("train", config, "data.max_prompt_length=2")
    assert "all 6 prompts are over max_prompt_length 2" in message
    assert "min 3, median 3, max 11" in message
    assert "batch_size is 7, more than the 5 prompts" in refused(
        "train", config, "data.train_batch_size=7", "actor.ppo_mini_batch_size=7"
    )
    assert not (tmp_path / "run").exists()


def test_refused_input_leaves_a_finished_run_alone(config: Path, tmp_path: Path) -> None:
    code, _, err = cli("train", config)
    assert code == 0, err
    assert [item["step"] for item in training_rows(tmp_path / "run")] == [1]
    before = files_of(tmp_path / "run")
    more = "trainer.total_training_steps=2"
    fewer = jsonl(*GOOD[:6])
    (tmp_path / "fewer.jsonl").write_bytes(fewer)
    message = refused("train", config, more, f"data.train_files=[{tmp_path / 'fewer.jsonl'}]")
    assert "the saved sampler has num_prompts 10, this run has 6" in message
    refused("train", config, more, "data.val_files=[nowhere.jsonl]")
    refused("train", config, more, "reward.function=nowhere.py:score")
    refused("train", config, more, "flow.betta=3")
    assert files_of(tmp_path / "run") == before
    latest = tmp_path / "run" / "checkpoints" / "global_step_1" / "training_state.safetensors"
    latest.write_bytes(latest.read_bytes()[:1000])
    assert "no checkpoint in" in refused("train", config, more)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["flow.betta=3"], ["unknown key `flow.betta`", "did you mean flow.beta"]),
        (["beta=3"], ["unknown key `beta`", "flow.beta"]),
        (["actor_rollout_ref.rollout.n=3"], ["unknown key", "here it is rollout.n"]),
        (["flow.beta=big"], ["`flow.beta` = 'big'", "valid number"]),
        (["flow.beta=-1"], ["`flow.beta` = -1", "greater than 0"]),
        (["rollout.n=2.5"], ["`rollout.n` = 2.5", "integer"]),
        (["flow.preset=papper"], ["`flow.preset` = 'papper'", "'paper'"]),
        (["trainer.logger=[tensorbord]"], ["tensorbord", "'tensorboard'"]),
        (["data.train_batch_size=6"], ["= 6 is not a multiple of", "= 4"]),
        (["data.max_response_length=900"], ["= 908 exceeds", "= 256"]),
        (["rollout.top_p=0.9"], ["rollout.top_p = 0.9", "flow.old_logprobs=rollout"]),
        (["data.train_files=[]"], ["data.train_files is empty"]),
        (["flow.beta"], ["`flow.beta` is not of the form key=value"]),
        (["flow=3"], ["flow", "3"]),
        (["flow.beta.x=3"], ["flow.beta"]),
        (["data.task=sumz", "data.train_files=[]"], ["unknown task 'sumz'", "'sums'"]),
        (["data.task_options={deduplicat: true}"], ["'deduplicat'", "'deduplicate'"]),
        (["data.chat_template=true"], ["has no chat template", "data.chat_template=false"]),
        (["model.path=builtin:tiny-sum"], ["builtin:tiny-sum", "tiny-sums"]),
        (["reward.function=numerik"], ["'numerik'", "did you mean 'numeric'"]),
        (["reward.function=nowhere.py:score"], ["there is no file 'nowhere.py'"]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) and "=" in value[0] else None,
)
def test_wrong_setting_is_named(
    config: Path, tmp_path: Path, changes: list[str], words: list[str]
) -> None:
    message = refused("train", config, *changes)
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run").exists()


def test_wrong_config_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    assert str(path) in refused("train", path)
    path.write_text("flow: [1, 2\n")
    assert str(path) in cli("train", path)[2]
    path.write_text("- 1\n")
    assert "holds list, not sections" in refused("train", path)
    path.write_text("{}\n")
    assert "`model` is required" in refused("train", path, "data.task=sums")


def test_missing_parts_of_a_model_are_named(config: Path, tiny_sums: Path, tmp_path: Path) -> None:
    message = refused("train", config, f"model.path={tmp_path / 'nowhere'}")
    assert f"model.path = {tmp_path / 'nowhere'}" in message

    no_tokenizer = tmp_path / "no_tokenizer"
    shutil.copytree(tiny_sums, no_tokenizer, ignore=shutil.ignore_patterns("tokenizer*"))
    message = refused("train", config, f"model.path={no_tokenizer}")
    assert f"model.path = {no_tokenizer}: no tokenizer there" in message

    no_weights = tmp_path / "no_weights"
    shutil.copytree(tiny_sums, no_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused("train", config, f"model.path={no_weights}")
    assert f"model.path = {no_weights}" in message
    assert not (tmp_path / "run").exists()


def test_run_directory_and_loggers_that_cannot_be_are_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    message = refused("train", config, f"trainer.default_local_dir={tmp_path / 'file'}/run")
    assert str(tmp_path / "file") in message
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused("train", config, "trainer.logger=[jsonl,wandb]")
    assert "the logger 'wandb' needs its package: pip install wandb" in message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_gpu_that_is_not_there_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for option in ([], ["--dry-run"]):
        message = refused("train", config, "trainer.device=cuda", *option)
        assert message == "trainer.device = cuda, but torch sees no GPU; use auto or cpu"


def test_reward_without_the_function_or_its_arguments_is_refused(
    config: Path, tmp_path: Path
) -> None:
    path = tmp_path / "reward.py"
    path.write_text("def score(data_source, solution_str, ground_truth, extra_info): return 1.0\n")
    message = refused("train", config, f"reward.function={path}:scor")
    assert "no function 'scor'" in message and "['score']" in message
    path.write_text("def score(text): return 1.0\n")
    assert "(text)" in refused("train", config, f"reward.function={path}:score")
    path.write_text("import nonexistent_package\n")
    # The traceback of the user's own file is what they need here.
    code, _, err = cli("train", config, f"reward.function={path}:score")
    assert code == 2
    assert err.startswith("error: reward function")
    assert err.rstrip().endswith("No module named 'nonexistent_package'")
    assert not (tmp_path / "run").exists()


def test_process_ends_with_one_line_and_code_2(config: Path, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(jsonl(GOOD[0], without("prompt")))
    ended = subprocess.run(
        [sys.executable, "-m", "flowrl.cli", "train", str(config)],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 2
    line = ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("error:") == 1
    assert line.startswith(f"error: {tmp_path / 'train.jsonl'}, line 2: column 'prompt' is missing")
    assert not (tmp_path / "run").exists()
