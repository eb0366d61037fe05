"""Checkpoints: bit-exact round trips, what is kept, damage of every kind, and the export."""

import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    LATEST,
    TENSORS,
    entries,
    read_stamp,
    save,
    save_model,
    stamped_model,
)
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from flowrl.checkpoint import (
    TENSOR_KINDS,
    Checkpoint,
    check_tensors,
    export_hf,
    latest_checkpoint,
    load_training_state,
    save_checkpoint,
)
from flowrl.policy.optimizer import MasterAdamW, ParamGroup


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# Round trips


def test_tensors_and_state_return_bit_exact(tmp_path: Path) -> None:
    storage = torch.randn(6, 4)
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 5),
        "transposed": torch.randn(3, 5).t(),
        "shared": storage,
        "shared_too": storage,
        "rows": storage[2:4],
        "strided": storage[:, ::2],
        "bfloat16": torch.randn(7).bfloat16(),
        "half": torch.randn(3).half(),
        "double": torch.randn(3, dtype=torch.float64),
        "special": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
        "flags": torch.tensor([True, False, True]),
        "rng": torch.get_rng_state(),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    tensors |= {
        f"integer{i}": torch.arange(5).to(dtype)
        for i, dtype in enumerate([torch.int32, torch.int16, torch.int8])
    }
    state = {"step": 3, "sampler": {"epoch": 1, "position": [5, 6]}, "best": 0.1, "note": "z\u00e9"}
    save_model(tmp_path, 3, tiny_model(), tensors, state)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint == Checkpoint(3, tmp_path / "checkpoints" / "global_step_3")
    loaded, loaded_state = load_training_state(checkpoint)
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor.detach()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resumed_optimizer_takes_the_same_steps(tmp_path: Path, dtype: torch.dtype) -> None:
    def trained(num_steps: int, resume_at: int | None) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = tiny_model(tied=True, dtype=dtype)
        optimizer = new_optimizer(model)
        for step in range(num_steps):
            if step == resume_at:
                save_model(tmp_path, step, model, optimizer.state_tensors())
                model = tiny_model(tied=True, dtype=dtype)  # other weights, no moments
                optimizer = new_optimizer(model)
                checkpoint = latest_checkpoint(tmp_path)
                assert checkpoint is not None
                optimizer.load_state_tensors(load_training_state(checkpoint)[0])
            torch.manual_seed(step)
            ids = torch.randint(16, (2, 6))
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step(step)
        return optimizer.state_tensors()

    def new_optimizer(model: LlamaForCausalLM) -> MasterAdamW:
        return MasterAdamW(
            [ParamGroup(list(model.named_parameters()), lr=1e-2)],
            betas=(0.9, 0.95),
            weight_decay=0.1,
            warmup_steps=2,
            max_grad_norm=1.0,
        )

    straight, resumed = trained(5, None), trained(5, 3)
    assert straight["step.model.norm.weight"] == 5
    assert straight.keys() == resumed.keys()
    assert [n for n in straight if bits(straight[n]) != bits(resumed[n])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_hf_folder_gives_the_same_logits(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = tiny_model(tied, dtype).eval()
    path = save_model(tmp_path, 1, model)
    loaded = AutoModelForCausalLM.from_pretrained(path / "hf").eval()
    ids = torch.tensor([[1, 4, 13, 5, 14]])
    with torch.no_grad():
        expected, logits = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    assert logits.dtype == dtype
    assert torch.equal(logits, expected)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    tokenizer = AutoTokenizer.from_pretrained(path / "hf")
    assert tokenizer("1+2=")["input_ids"] == [4, 13, 5, 14]


def test_generation_config_is_saved_as_it_is(tmp_path: Path) -> None:
    model = tiny_model()
    # A temperature without do_sample: transformers loads it with a warning and refuses to save it.
    odd = GenerationConfig(temperature=0.6, eos_token_id=[2, 3])
    model.generation_config = odd
    path = save_model(tmp_path, 1, model)
    assert model.generation_config is odd
    loaded = GenerationConfig.from_pretrained(path / "hf")
    assert (loaded.temperature, loaded.eos_token_id) == (0.6, [2, 3])


def test_no_file_is_a_pickle_or_an_archive(tmp_path: Path) -> None:
    path = save(tmp_path, 4)
    files = {p.relative_to(path).as_posix(): p for p in path.rglob("*") if p.is_file()}
    assert {
        "state.json",
        "training_state.safetensors",
        "hf/config.json",
        "hf/generation_config.json",
        "hf/model.safetensors",
        "hf/tokenizer.json",
        "hf/tokenizer_config.json",
    } <= files.keys()
    for name, file in files.items():
        content = file.read_bytes()
        if name.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", content[:8])
            header = json.loads(content[8 : 8 + length])
            spans = [v["data_offsets"] for k, v in header.items() if k != "__metadata__"]
            assert max(end for _, end in spans) == len(content) - 8 - length, name
        else:
            assert name.endswith(".json"), name
            json.loads(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step = -1"),
        ({"keep": 0}, "keep = 0"),
        ({"state": {"best": float("nan")}}, r"state\['best'\] = nan is not JSON"),
        ({"state": {"rng": torch.zeros(2)}}, r"state\['rng'\] = tensor.* is not JSON"),
        ({"state": {"betas": (0.9, 0.95)}}, r"state\['betas'\].*lists in place of tuples"),
        ({"state": {"seen": {3: 1}}}, r"state\['seen'\].*str keys"),
        ({"tensors": {"z": torch.zeros(2, dtype=torch.complex64)}}, "tensor z has dtype"),
    ],
    ids=["step", "keep", "nan", "tensor", "tuple", "int-key", "dtype"],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, change: dict, message: str
) -> None:
    arguments = {"step": 1, "keep": 1, "tensors": {}, "state": {}} | change
    with pytest.raises(ValueError, match=message):
        save_checkpoint(tmp_path, model=stamped_model(), tokenizer=tiny_tokenizer(), **arguments)
    assert list(tmp_path.iterdir()) == []


# What is kept


def test_keep_counts_whole_checkpoints_up_to_the_step(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=2)
    assert entries(tmp_path) == ["global_step_20", "global_step_30"]
    (tmp_path / "checkpoints" / "global_step_30" / "state.json").unlink()
    save(tmp_path, 40, keep=2)  # 30 is damaged, so it does not push out 20
    assert entries(tmp_path) == ["global_step_20", "global_step_30", "global_step_40"]
    save(tmp_path, 35, keep=1)  # 40 is of a run that went further; it is not older
    assert entries(tmp_path) == ["global_step_35", "global_step_40"]
    assert (tmp_path / LATEST).read_text() == "35"
    assert read_stamp(latest_checkpoint(tmp_path)) == 35


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, stamp=5)
    save(tmp_path, 2, stamp=6)
    assert entries(tmp_path) == ["global_step_1", "global_step_2"]
    assert read_stamp(latest_checkpoint(tmp_path)) == 6


# Damage


def cut(path: Path, num_bytes: int = 1) -> None:
    os.truncate(path, path.stat().st_size - num_bytes)


def swap_for_pickle(path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(path) + ".executed",)

    path.write_bytes(pickle.dumps(Bomb()))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated-tensors": (TENSORS, cut),
    "empty-tensors": (TENSORS, lambda p: os.truncate(p, 0)),
    "longer-tensors": (TENSORS, lambda p: p.write_bytes(p.read_bytes() + b"x")),
    "bad-header": (
        TENSORS,
        lambda p: p.write_bytes(p.read_bytes().replace(b"data_offsets", b"data_0ffsets")),
    ),
    "pickled-tensors": (TENSORS, swap_for_pickle),
    "no-tensors": (TENSORS, Path.unlink),
    "truncated-state": ("state.json", cut),
    "state-not-utf8": ("state.json", lambda p: p.write_bytes(b'{"step": "\xff"}')),
    "state-not-a-dict": ("state.json", lambda p: p.write_text("[1]")),
    "pickled-state": ("state.json", swap_for_pickle),
    "no-state": ("state.json", Path.unlink),
    "no-config": ("hf/config.json", Path.unlink),
    "truncated-weights": ("hf/model.safetensors", cut),
    "no-weights": ("hf/model.safetensors", Path.unlink),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_checkpoint_falls_back_aloud(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], object],
) -> None:
    save(tmp_path, 1)
    file = save(tmp_path, 2) / name
    damage(file)
    with caplog.at_level(logging.WARNING, "flowrl.checkpoint"):
        assert read_stamp(latest_checkpoint(tmp_path)) == 1
    (record,) = [r for r in caplog.records if r.name == "flowrl.checkpoint"]
    assert f"{file} is missing or damaged" in record.getMessage()
    if not name.startswith("hf/"):
        with pytest.raises(ValueError, match=rf"{file} is missing or damaged.*restore it"):
            load_training_state(Checkpoint(2, tmp_path / "checkpoints" / "global_step_2"))
    shutil.rmtree(tmp_path / "checkpoints" / "global_step_1")
    with pytest.raises(ValueError, match=rf"no checkpoint in .* is whole: .*{file}.*remove"):
        latest_checkpoint(tmp_path)
    assert list(tmp_path.rglob("*.executed")) == []


def test_missing_shard_is_damage(tmp_path: Path) -> None:
    hf = save(tmp_path, 1) / "hf"
    os.rename(hf / "model.safetensors", hf / "model-00001-of-00002.safetensors")
    index = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing or damaged"):
        latest_checkpoint(tmp_path)
    shutil.copy(hf / "model-00001-of-00002.safetensors", hf / "model-00002-of-00002.safetensors")
    assert latest_checkpoint(tmp_path) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, f"{LATEST} is missing"),
        ("7", f"{LATEST} names '7', which is not among the checkpoints"),
        ("", f"{LATEST} names ''"),
        ("latest\n", f"{LATEST} names 'latest'"),
    ],
    ids=["missing", "removed-step", "empty", "not-a-step"],
)
def test_bad_latest_file_falls_back_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str | None, message: str
) -> None:
    save(tmp_path, 9)
    save(tmp_path, 10)
    if text is None:
        (tmp_path / LATEST).unlink()
    else:
        (tmp_path / LATEST).write_text(text)
    with caplog.at_level(logging.WARNING, "flowrl.checkpoint"):
        assert read_stamp(latest_checkpoint(tmp_path)) == 10
    assert message in caplog.text


def test_latest_file_decides_over_a_higher_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / LATEST).write_text("1\n")
    assert read_stamp(latest_checkpoint(tmp_path)) == 1
    assert [r for r in caplog.records if r.name == "flowrl.checkpoint"] == []


def test_fresh_and_emptied_run_directories(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "checkpoints" / ".global_step_1.tmp-1-host").mkdir(parents=True)
    assert latest_checkpoint(tmp_path) is None
    (tmp_path / LATEST).write_text("5")
    with pytest.raises(ValueError, match="names '5'.*to start from the beginning"):
        latest_checkpoint(tmp_path)


def test_moments_are_those_of_a_whole_optimizer_or_of_none(tmp_path: Path) -> None:
    def checkpoint(*names: str) -> Checkpoint:
        tensors = {name: torch.zeros(1) for name in names}
        return Checkpoint(1, save_model(tmp_path, 1, stamped_model(), tensors))

    def whole(name: str) -> list[str]:
        return [f"{kind}.{name}" for kind in TENSOR_KINDS]

    trained = [["a", "b"], ["critic.a"]]
    check_tensors(checkpoint("master.a", "master.b", "master.critic.a", "else"), trained)
    check_tensors(checkpoint("master.a", "master.b", *whole("critic.a")), trained)
    check_tensors(checkpoint(*whole("a"), *whole("b"), "master.critic.a"), trained)
    check_tensors(checkpoint(*whole("a")), [["a"], []])
    with pytest.raises(ValueError, match=r"lacks 1 of 1 entries, first master\.critic\.a: "):
        check_tensors(checkpoint(*whole("a"), *whole("b")), trained)
    with pytest.raises(ValueError, match=r"lacks 3 of 8 entries, first exp_avg\.b: "):
        check_tensors(checkpoint(*whole("a"), "master.b"), [["a", "b"]])


# Export


@pytest.mark.parametrize(
    ("source", "step", "stamp"),
    [("", None, 2), ("", 1, 1), ("checkpoints/global_step_1", None, 1)],
    ids=["latest", "step", "folder"],
)
def test_export_copies_the_hf_folder(
    tmp_path: Path, source: str, step: int | None, stamp: int
) -> None:
    run_dir = tmp_path / "run"
    save(run_dir, 1)
    save(run_dir, 2)
    destination = tmp_path / "models" / "mine"
    assert export_hf(run_dir / source, destination, step) == destination
    hf = run_dir / "checkpoints" / f"global_step_{stamp}" / "hf"
    expected = {p.name: p.read_bytes() for p in hf.iterdir()}
    assert {p.name: p.read_bytes() for p in destination.iterdir()} == expected
    assert [p.name for p in destination.parent.iterdir()] == ["mine"]
    head = AutoModelForCausalLM.from_pretrained(destination).lm_head.weight
    assert torch.equal(head.data, torch.full((16, 8), float(stamp)))
    with pytest.raises(ValueError, match="mine exists and is not an empty folder"):
        export_hf(run_dir, destination)


def test_export_fills_an_empty_folder_behind_a_link(tmp_path: Path) -> None:
    save(tmp_path / "run", 1)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert export_hf(tmp_path / "run", tmp_path / "link") == tmp_path / "real"
    assert (tmp_path / "link" / "model.safetensors").exists()


def test_export_refusals(tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    step_dir = save(run_dir, 1)
    (tmp_path / "file").write_text("")
    for source, destination, step, message in [
        (tmp_path / "nowhere", out, None, "nowhere is no run directory"),
        (run_dir, out, 3, r"no checkpoint of step 3, but of \[1\]"),
        (step_dir, out, 3, "is one checkpoint; give the run directory"),
        (run_dir, tmp_path / "file", None, "file exists and is not an empty folder"),
        (run_dir, step_dir / "hf" / "copy", None, "lies in"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_hf(source, destination, step)
    cut(step_dir / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors is missing or damaged"):
        export_hf(step_dir, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]
