"""A mixture of experts in the whole loop, sampled from, spread over ranks and continued by one."""

from pathlib import Path

import pytest
from harness import run_ranks
from hf_reference import hf_config, hf_model
from safetensors.torch import load_file
from test_training_run import CHANGES, assert_same_rows, spread, train_rank
from tiny_model import tiny_tokenizer
from training_samples import settings, trained

from flowrl.checkpoint import latest_checkpoint

pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize("objective", ["flow_balance", "ppo"])
def test_experts_over_ranks_repeat_one_process_and_are_continued_by_it(
    objective: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    hf_model(hf_config("qwen3_moe", vocab_size=16)).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    changes = (
        *CHANGES,
        f"algorithm.objective={objective}",
        "trainer.test_freq=1",
        "actor.optim.lr=1e-2",
    )
    trained(model, tmp_path / "one", *changes, "trainer.total_training_steps=3")
    layout = {"expert_model_parallel_size": 2}
    two_steps = (*changes, *spread(layout), "trainer.total_training_steps=2")
    run_ranks(2, train_rank, settings(model, tmp_path / "relay", *two_steps), timeout_s=240)
    saved = latest_checkpoint(tmp_path / "relay")
    assert saved is not None and saved.step == 2
    files = load_file(saved.hf / "model.safetensors")
    assert files.keys() == load_file(model / "model.safetensors").keys()
    trained(model, tmp_path / "relay", *changes, "trainer.total_training_steps=3")
    assert_same_rows(tmp_path / "relay", tmp_path / "one")
