"""The published relatives of GRPO, as docs/objectives.md sets them, on configs/tiny.yaml."""

from pathlib import Path

import pytest
from training_samples import kept_threads, training_rows

from flowrl.config import load_config
from flowrl.settings import Config
from flowrl.train import train

pytestmark = pytest.mark.timeout(300)

TINY = Path(__file__).resolve().parents[1] / "configs" / "tiny.yaml"
GRPO = ("algorithm.objective=grpo",)
PRESETS = {
    "dapo": (
        *GRPO,
        "actor.clip_ratio_high=0.28",
        "actor.loss_agg_mode=token-mean",
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=20",
        "reward.overlong_buffer.enable=true",
        "reward.overlong_buffer.len=3",
    ),
    "dr_grpo": (
        *GRPO,
        "algorithm.norm_adv_by_std_in_grpo=false",
        "actor.loss_agg_mode=seq-mean-token-sum-norm",
        "actor.clip_ratio_c=null",
    ),
    "gspo": (
        *GRPO,
        "actor.loss_mode=gspo",
        "actor.clip_ratio_low=3e-4",
        "actor.clip_ratio_high=4e-4",
        "actor.loss_agg_mode=seq-mean-token-mean",
    ),
}


def config_of(name: str, model: Path, run_dir: Path) -> Config:
    return load_config(
        TINY,
        [
            *PRESETS[name],
            f"model.path={model}",
            f"trainer.default_local_dir={run_dir}",
            "data.train_batch_size=4",
            "actor.ppo_mini_batch_size=2",  # four updates a step: ratios leave 1
            "actor.ppo_epochs=2",
            "actor.optim={lr: 1e-3, lr_warmup_steps: 0}",
            "data.val_max_samples=1",
            "validation.n=1",
            "validation.greedy=false",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=false",
            "trainer.num_threads=1",
            "trainer.logger=[jsonl]",
        ],
    )


@pytest.mark.parametrize("name", PRESETS)
def test_preset_trains(tiny_sums: Path, tmp_path: Path, name: str) -> None:
    config = config_of(name, tiny_sums, tmp_path)
    with kept_threads():
        train(config)
    rows = training_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["actor/skipped_updates"] == 0 and row["actor/ratio"] != 1
        assert row["actor/grad_norm"] > 0
    if name == "dapo":
        # No group agrees, and what is beyond 5 of 8 tokens costs up to 1.
        assert [row["flow/zero_variance_groups"] for row in rows] == [0, 0]
        assert max(row["train/num_gen_batches"] for row in rows) > 1
        assert min(row["critic/overlong_penalty/min"] for row in rows) >= -1
        assert min(row["critic/overlong_penalty/mean"] for row in rows) < 0
        assert all(row["critic/score/max"] == 1 for row in rows)
    else:
        assert "train/num_gen_batches" not in rows[0]
        assert "critic/overlong_penalty/mean" not in rows[0]
    if name == "gspo":  # of later updates, many sequences leave the narrow clip
        assert max(row["actor/pg_clipfrac"] for row in rows) > 0.1


def test_presets_differ(tiny_sums: Path, tmp_path: Path) -> None:
    actors = [config_of(name, tiny_sums, tmp_path).actor for name in PRESETS]
    assert len({actor.loss_agg_mode for actor in actors}) == 3
