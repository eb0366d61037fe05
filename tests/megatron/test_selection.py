"""Masks and weights of samples spread over ranks: the same update as in one process."""

from functools import cache
from pathlib import Path

import pytest
import torch
from harness import run_ranks
from parallel_cases import (
    Case,
    Spread,
    build_policy,
    build_torch_policy,
    make_samples,
    relative,
)
from torch import Tensor
from training_samples import settings, trained, training_rows, untimed_rows

from flowrl.baselines import baseline_objective
from flowrl.batch import Sample
from flowrl.config import load_config
from flowrl.interface import Objective
from flowrl.megatron.layout import Layout
from flowrl.settings import Config
from flowrl.train import flow_objective, train

pytestmark = pytest.mark.timeout(300)

CASE = Case(num_samples=11)
SPREADS = {
    "cp2": Spread(2, Layout(context=2)),
    "dp2": Spread(2, Layout()),
    "tp2xpp2": Spread(4, Layout(tensor=2, pipeline=2, sequence_parallel=True)),
}
CHANGES = {
    "flow": (),
    "token-mean": ("algorithm.objective=grpo",),
    "gspo": (
        "algorithm.objective=grpo",
        "actor.loss_mode=gspo",
        "actor.loss_agg_mode=seq-mean-token-mean",
    ),
}


def config_of(name: str) -> Config:
    # A wide clip: a token within rounding of the border could fall on either side.
    wide = ("actor.clip_ratio_high=1000", "actor.clip_ratio_low=1", "actor.clip_ratio_c=null")
    if name == "flow":
        wide = ("flow.weighting=one",)
    return load_config(None, ["model.path=model", "data.task=sums", *wide, *CHANGES[name]])


def objective_of(name: str) -> Objective:
    config = config_of(name)
    return flow_objective(config) if name == "flow" else baseline_objective(config)


def selected_samples() -> list[Sample]:
    """Masked tokens, two responses without any token left, and weights."""
    generator = torch.Generator().manual_seed(2)
    samples = make_samples(CASE.num_samples)
    for number, sample in enumerate(samples):
        length = len(sample.response_ids)
        mask = torch.rand(length, generator=generator) < 0.6
        sample.loss_mask = None if number in (1, 3) else mask & (number not in (0, 5))
        sample.token_weights = 2 * torch.rand(length, generator=generator)
        sample.sequence_weight = float(2 * torch.rand((), generator=generator))
    return samples


def updated(policy, name: str) -> tuple[Tensor, Tensor, float, dict[str, Tensor]]:
    """Loss, losses by sequence, gradient norm, and the weights after one optimiser step."""
    results = policy.accumulate_gradients(selected_samples(), objective_of(name))
    losses = torch.cat([r.output.diagnostics["loss"] for r in results])
    loss = torch.stack([r.output.loss_sum.detach() for r in results]).sum()
    grad_norm, is_applied = policy.optimizer.step(0)
    assert is_applied
    weights = {n: weight.clone() for n, weight in policy.named_weights()}
    return loss, losses, grad_norm, weights


def on_rank(rank: int, spread: Spread, name: str) -> tuple:
    return updated(build_policy(CASE, spread), name)


@cache
def one_process(name: str) -> tuple:
    return updated(build_torch_policy(CASE), name)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("cp2", "flow"),
        ("cp2", "token-mean"),
        ("cp2", "gspo"),
        ("dp2", "token-mean"),
        ("tp2xpp2", "flow"),
        ("tp2xpp2", "token-mean"),
    ],
)
def test_spread_update_is_that_of_one_process(layout: str, name: str) -> None:
    loss, losses, grad_norm, weights = one_process(name)
    spread = SPREADS[layout]
    for found in run_ranks(spread.num_ranks, on_rank, spread, name):
        assert relative(found[0], loss) < 2e-5
        assert relative(found[1], losses) < 2e-5
        assert abs(found[2] - grad_norm) < 2e-5 * grad_norm
        assert found[3].keys() == weights.keys()
        for tensor, expected in weights.items():
            assert relative(found[3][tensor], expected) < 1e-4, tensor


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_masked_has_no_part(name: str) -> None:
    """Log-probs that only masked tokens have change nothing."""
    _, losses, grad_norm, _ = one_process(name)
    assert losses[0] == losses[5] == losses[6] == 0  # masked, masked, empty
    assert losses.count_nonzero() == CASE.num_samples - 3
    policy = build_torch_policy(CASE)
    samples = selected_samples()
    for sample in samples:
        assert sample.old_logprobs is not None and sample.ref_logprobs is not None
        for values in (sample.old_logprobs, sample.ref_logprobs, sample.advantages):
            assert values is not None
            values[~sample.kept_tokens] = torch.nan
    policy.accumulate_gradients(samples, objective_of(name))
    assert policy.optimizer.step(0) == (grad_norm, True)


def train_rank(rank: int, overrides: list[str]) -> None:
    train(load_config(None, overrides))


def test_ranks_choose_the_same_groups_and_tokens(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=50",
        "algorithm.mask_truncated=true",
        "algorithm.rollout_correction.rollout_is=sequence",
        "algorithm.rollout_correction.rollout_rs=geometric",
        "reward.overlong_buffer.enable=true",
        "reward.overlong_buffer.len=2",
        "data.train_batch_size=2",
        "data.max_response_length=5",
        "actor.ppo_mini_batch_size=1",
        "actor.ppo_max_token_len_per_gpu=32",
        "data.val_max_samples=1",
        "trainer.val_before_train=false",
        "trainer.total_training_steps=3",
    )
    trained(tiny_sums, tmp_path / "one", *changes)
    spread = ("actor.strategy=megatron", "parallel.context_parallel_size=2")
    overrides = settings(tiny_sums, tmp_path / "many", *changes, *spread)
    run_ranks(2, train_rank, overrides, timeout_s=240)
    rows, expected = untimed_rows(tmp_path / "many"), untimed_rows(tmp_path / "one")
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    steps = training_rows(tmp_path / "many")
    assert max(row["train/num_gen_batches"] for row in steps) > 1
    assert min(row["critic/overlong_penalty/min"] for row in steps) == -1
    assert all(row["mismatch/rollout_is_mean"] == pytest.approx(1, abs=1e-4) for row in steps)
