"""The training loop spread over ranks repeats one process, and each continues from the other."""

from pathlib import Path

import pytest
from harness import run_ranks
from training_samples import settings, trained, untimed_rows

from flowrl.config import load_config
from flowrl.train import train

pytestmark = pytest.mark.timeout(300)

SPREAD = {
    "tp2xpp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2xdp2": (4, {"context_parallel_size": 2}),
}
CHANGES = (
    "actor.ppo_mini_batch_size=2",
    "actor.ppo_max_token_len_per_gpu=32",
    "flow.preset=recipe",  # Z's gradient reaches the trunk
    "flow.z_dropout=0",  # its mask would be drawn in another order
    "trainer.val_before_train=false",
)


def spread(layout: dict[str, int]) -> tuple[str, ...]:
    return ("actor.strategy=megatron", *(f"parallel.{k}={v}" for k, v in layout.items()))


def train_rank(rank: int, overrides: list[str]) -> None:
    train(load_config(None, overrides))


def assert_same_rows(run_dir: Path, expected_dir: Path) -> None:
    rows, expected = untimed_rows(run_dir), untimed_rows(expected_dir)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-4), (row["step"], name)


@pytest.mark.parametrize("objective", ["flow_balance", "grpo", "ppo"])
@pytest.mark.parametrize("name", SPREAD)
def test_run_repeats_one_process(
    tiny_sums: Path, tmp_path: Path, name: str, objective: str
) -> None:
    num_ranks, layout = SPREAD[name]
    changes = (*CHANGES, f"algorithm.objective={objective}", "trainer.total_training_steps=5")
    trained(tiny_sums, tmp_path / "one", *changes)
    overrides = settings(tiny_sums, tmp_path / "many", *changes, *spread(layout))
    run_ranks(num_ranks, train_rank, overrides, timeout_s=240)
    assert_same_rows(tmp_path / "many", tmp_path / "one")


def test_layouts_continue_from_each_other(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (*CHANGES, "trainer.test_freq=1")
    trained(tiny_sums, tmp_path / "one", *changes, "trainer.total_training_steps=4")
    run_dir = tmp_path / "relay"
    for steps, (num_ranks, layout) in enumerate(SPREAD.values(), start=1):
        total = f"trainer.total_training_steps={steps}"
        overrides = settings(tiny_sums, run_dir, *changes, *spread(layout), total)
        run_ranks(num_ranks, train_rank, overrides, timeout_s=240)
    trained(tiny_sums, run_dir, *changes, "trainer.total_training_steps=3")
    num_ranks, layout = SPREAD["tp2xpp2"]
    total = "trainer.total_training_steps=4"
    overrides = settings(tiny_sums, run_dir, *changes, *spread(layout), total)
    run_ranks(num_ranks, train_rank, overrides, timeout_s=240)
    assert_same_rows(run_dir, tmp_path / "one")
