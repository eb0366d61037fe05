"""Which device and compute dtype a run takes when its configuration leaves them to the machine."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from flowrl import device
from flowrl.config import load_config
from flowrl.device import has_fast_bfloat16, resolve_device, resolve_dtype, with_resolved_dtype
from flowrl.rollout.serve import server_command
from flowrl.summary import describe
from flowrl.train import train

CPU = torch.device("cpu")
RUN = ("trainer.total_training_steps=1", "validation.n=1", "data.val_max_samples=2")


@pytest.fixture(params=[True, False], ids=["fast", "slow"])
def is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The tests run on machines of one kind, so the other's answer has to be given."""
    monkeypatch.setattr(device, "has_fast_bfloat16", lambda _: request.param)
    monkeypatch.setattr("flowrl.summary.has_fast_bfloat16", lambda _: request.param)
    return request.param


def test_resolve_device() -> None:
    assert resolve_device("cpu") == CPU
    if torch.cuda.is_available():
        assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    else:
        assert resolve_device("auto") == CPU
        with pytest.raises(ValueError, match="sees no GPU"):
            resolve_device("cuda")


def test_fast_bfloat16_is_what_the_processor_lists() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    if "flags" not in flags:
        pytest.skip("no x86 processor")
    assert has_fast_bfloat16(CPU) == ("avx512_bf16" in flags)


def test_auto_follows_the_machine_and_nothing_else_does(is_fast: bool) -> None:
    assert resolve_dtype("auto", CPU) == ("bfloat16" if is_fast else "float32")
    assert resolve_dtype("bfloat16", CPU) == "bfloat16"
    assert resolve_dtype("float32", CPU) == "float32"
    config = load_config("configs/quickstart.yaml", ["trainer.device=cpu"])
    assert config.model.dtype == "auto"
    resolved = with_resolved_dtype(config)
    assert resolved == config.with_dtype("bfloat16" if is_fast else "float32")
    assert with_resolved_dtype(resolved) == resolved


def test_run_computes_in_it_and_keeps_it(is_fast: bool, tmp_path: Path) -> None:
    config = load_config(
        "configs/tiny.yaml",
        [*RUN, "model.dtype=auto", "trainer.device=cpu", f"trainer.default_local_dir={tmp_path}"],
    )
    name = "bfloat16" if is_fast else "float32"
    run = train(config)
    assert run.parts.policy.model.dtype == getattr(torch, name)
    kept = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert kept["model"]["dtype"] == name
    (folder,) = tmp_path.glob("checkpoints/*/hf")
    assert json.loads((folder / "config.json").read_text())["dtype"] == name


def test_emulated_bfloat16_is_said(
    is_fast: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"trainer.default_local_dir={tmp_path}"
    describe(load_config("configs/tiny.yaml", ["model.dtype=float32", folder]))
    assert not caplog.records
    describe(load_config("configs/tiny.yaml", ["model.dtype=bfloat16", folder]))
    assert [r.message.startswith("model.dtype = bfloat16, but") for r in caplog.records] == (
        [] if is_fast else [True]
    )


def test_server_starts_in_it(is_fast: bool) -> None:
    config = load_config("configs/tiny.yaml", ["model.dtype=auto", "rollout.engine=vllm"])
    command = server_command(with_resolved_dtype(config), "folder", "127.0.0.1", 8000, [], True)
    assert command[command.index("--dtype") + 1] == ("bfloat16" if is_fast else "float32")
