"""Penalties, masks and weights of samples by hand, through the losses, and in training."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_samples import kept_threads, settings

from flowrl.baselines import baseline_objective, set_advantages
from flowrl.batch import Sample, pack
from flowrl.config import load_config
from flowrl.interface import TokenOutputs, normalizer_count
from flowrl.objectives.flow_balance import flow_balance_loss
from flowrl.objectives.grpo import grpo_loss
from flowrl.rollout import Response, RolloutEngine, SamplingParams
from flowrl.run import start
from flowrl.settings import Config
from flowrl.settings_selection import RolloutCorrectionConfig
from flowrl.shaping import (
    correct_rollout,
    mask_truncated,
    mask_unknown,
    normalize_rewards,
    punish_overlong,
)
from flowrl.train import flow_objective, needs_old_logprobs, training_step

pytestmark = pytest.mark.timeout(300)


def config(*changes: str) -> Config:
    return load_config(None, settings(Path("model"), Path("run"), *changes))


def sample(group: int, length: int, score: float = 0.0, **known: object) -> Sample:
    return Sample([5], [6] * length, [-1.0] * length, group, score=score, **known)  # pyright: ignore[reportArgumentType]


# Overlong punishment and truncated responses


def test_the_penalty_enters_rewards_and_advantages_but_not_the_score() -> None:
    # Limit 7, buffer 4: length 3 is free, 5 costs 2 * 2/4, 7 costs 2.
    changes = (
        "reward.overlong_buffer.enable=true",
        "reward.overlong_buffer.len=4",
        "reward.overlong_buffer.penalty_factor=2",
        "algorithm.objective=grpo",
        "algorithm.norm_adv_by_std_in_grpo=false",
    )
    samples = [sample(0, 3, 1.0), sample(0, 5, 1.0), sample(1, 7, 0.0), sample(1, 2, 1.0)]
    normalize_rewards(samples, unbiased_std=True)
    assert [s.reward for s in samples][:2] == [0, 0]
    metrics = punish_overlong(config(*changes), samples)
    assert [s.overlong_penalty for s in samples] == [0, -1, -2, 0]
    assert [s.score for s in samples] == [1, 1, 0, 1]
    assert metrics == {
        "critic/overlong_penalty/mean": -0.75,
        "critic/overlong_penalty/max": 0,
        "critic/overlong_penalty/min": -2,
    }
    # Group 0: 1 and 0, deviation 1/sqrt(2). Group 1: -2 and 1, deviation 3/sqrt(2).
    root = math.sqrt(0.5)
    assert [s.reward for s in samples] == pytest.approx([root, -root, -root, root], rel=1e-5)
    set_advantages(config(*changes), samples)
    centred = [s.advantages[0].item() for s in samples if s.advantages is not None]
    assert centred == pytest.approx([0.5, -0.5, -1.5, 1.5])


def test_a_buffer_longer_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer.len = 8 exceeds .* = 7"):
        config("reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=8")


def test_truncated_responses_leave_the_loss() -> None:
    samples = [sample(0, 3), sample(0, 7, is_truncated=True), sample(0, 2)]
    mask_truncated(samples)
    assert [s.num_loss_tokens for s in samples] == [3, 0, 2]
    batch = pack(samples)
    assert batch.response_mask.sum() == 12 and batch.loss_mask.sum() == 5
    assert not (batch.loss_mask & ~batch.response_mask).any()
    assert batch.loss_mask[4:12].sum() == 0  # the second sequence
    assert normalizer_count("tokens", samples) == 5
    assert normalizer_count("sequences", samples) == 3


# Correction


def correction(**known: object) -> RolloutCorrectionConfig:
    return RolloutCorrectionConfig.model_validate(known)


def two_samples() -> list[Sample]:
    """Ratios pi_old / pi_rollout of 3/2 and 1/4, then of 3."""
    old = torch.tensor([0.375, 0.1, 0.6]).log()
    first = Sample([5, 6], [7, 8], [math.log(0.25), math.log(0.4)], 0, old_logprobs=old[:2])
    return [first, Sample([5], [7], [math.log(0.2)], 1, old_logprobs=old[2:])]


def values(samples: Sequence[Sample], name: str) -> list[list]:
    return [getattr(s, name).tolist() for s in samples]


@pytest.mark.parametrize(
    ("level", "weights", "sequence_weights"),
    [
        ("token", [[1.5, 0.25], [2]], [1, 1]),
        ("sequence", [[0.375, 0.375], [2]], [0.375, 2]),
        ("geometric", [[0.375**0.5] * 2, [2]], [0.375**0.5, 2]),
    ],
)
def test_weights_of_samples(level: str, weights: list, sequence_weights: list) -> None:
    samples = two_samples()
    metrics = correct_rollout(correction(rollout_is=level), samples)
    for found, expected in zip(values(samples, "token_weights"), weights, strict=True):
        assert found == pytest.approx(expected)
    assert [s.sequence_weight for s in samples] == pytest.approx(sequence_weights)
    assert all(s.loss_mask is None for s in samples)
    assert metrics["mismatch/rollout_is_mean"] == pytest.approx(sum(map(sum, weights)) / 3)
    assert metrics["mismatch/rollout_is_truncated"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("level", "masks", "tokens", "sequences"),
    [
        ("token", [[True, False], [False]], 2 / 3, 1),
        ("sequence", [[False, False], [False]], 1, 1),
        ("geometric", [[True, True], [False]], 1 / 3, 1 / 2),
    ],
)
def test_rejection_of_samples(level: str, masks: list, tokens: float, sequences: float) -> None:
    samples = two_samples()
    range_ = correction(rollout_rs=level, rollout_rs_threshold=2.5, rollout_rs_threshold_lower=0.6)
    assert correct_rollout(range_, samples) == pytest.approx(
        {
            "mismatch/rollout_rs_masked_fraction": tokens,
            "mismatch/rollout_rs_seq_masked_fraction": sequences,
        }
    )
    assert values(samples, "loss_mask") == masks
    assert all(s.token_weights is None and s.sequence_weight == 1 for s in samples)


def test_rejection_keeps_what_is_masked_masked() -> None:
    samples = two_samples()
    samples[0].is_truncated = True
    mask_truncated(samples)
    correct_rollout(correction(rollout_rs="token", rollout_rs_threshold=9.0), samples)
    assert values(samples, "loss_mask") == [[False, False], [True]]


def test_advantages_are_of_the_whole_response() -> None:
    changes = ("algorithm.objective=reinforce_pp", "algorithm.gamma=0.5")
    samples = [sample(0, 3, 1.0), sample(0, 2, 0.0), sample(1, 4, 2.0)]
    set_advantages(config(*changes), samples)
    whole = values(samples, "advantages")
    for one in samples:
        one.loss_mask = torch.arange(len(one.response_ids)) > 1
    set_advantages(config(*changes), samples)
    assert values(samples, "advantages") == whole


def test_tokens_without_an_old_logprob_leave_the_loss() -> None:
    old = torch.tensor([-1.0, math.nan, -math.inf, -2.0])
    samples = [sample(0, 4, old_logprobs=old), sample(0, 2, old_logprobs=torch.zeros(2))]
    samples[0].loss_mask = torch.tensor([False, True, True, True])
    mask_unknown(samples)
    assert values(samples[:1], "loss_mask") == [[False, False, False, True]]
    assert samples[1].loss_mask is None


def test_defaults_of_the_range() -> None:
    def kept(**known: float) -> tuple[float, float]:
        return correction(**known).kept_range

    assert kept() == (0.5, 2.0)
    assert kept(rollout_is_threshold=4.0) == (0.25, 4.0)
    assert kept(rollout_rs_threshold=5.0, rollout_is_threshold=4.0) == (0.2, 5.0)
    assert kept(rollout_rs_threshold=5.0, rollout_rs_threshold_lower=0.0) == (0.0, 5.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rollout_is=token"], "rollout_is = token: flow_balance has one loss per sequence"),
        (["rollout_is=batch"], "`algorithm.rollout_correction.rollout_is` = 'batch'"),
        (["rollout_rs_threshold_lower=3"], "ratios from 3 to 2 are none: raise"),
        (["rollout_is_threshold=0"], "greater than 0"),
    ],
)
def test_settings_without_sense_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(*[f"algorithm.rollout_correction.{change}" for change in changes])


def test_with_the_engines_logprobs_there_is_nothing_to_correct() -> None:
    level = "algorithm.rollout_correction.rollout_rs=token"
    with pytest.raises(ValueError, match=r"no effect with flow.old_logprobs = rollout"):
        config(level, "flow.old_logprobs=rollout")
    assert needs_old_logprobs(config(level)) and not needs_old_logprobs(config())


# Through the losses


def marked_samples() -> list[Sample]:
    """Masked tokens, a masked response, and weights."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for number, length in enumerate((3, 5, 2, 4)):
        old, ref = -3 * torch.rand(2, length, generator=generator)
        mask = torch.rand(length, generator=generator) < 0.6
        samples.append(
            Sample(
                [5] * (number + 1),
                [6] * length,
                [-1.0] * length,
                number // 2,
                reward=float(number) - 1.5,
                old_logprobs=old,
                ref_logprobs=ref,
                advantages=torch.randn(length, generator=generator),
                loss_mask=mask & (number != 2),
                token_weights=2 * torch.rand(length, generator=generator),
                sequence_weight=0.5 * number,
            )
        )
    return samples


def test_losses_read_masks_and_weights() -> None:
    samples = marked_samples()
    batch = pack(samples)
    logprobs = -3 * torch.rand(len(batch.input_ids))
    zeros = torch.zeros_like(logprobs)
    outputs = TokenOutputs(logprobs, zeros, zeros[:, None], None)
    log_z = torch.tensor([0.1, -0.2, 0.3, 0.4])
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    assert batch.advantages is not None and batch.token_weights is not None
    mask = torch.zeros_like(batch.loss_mask)
    start = 0
    for one in samples:  # packed by hand
        start += len(one.prompt_ids)
        mask[start : start + len(one.response_ids)] = one.kept_tokens
        start += len(one.response_ids)

    flow = flow_objective(config())(batch, outputs, log_z)
    tokens = (logprobs, batch.old_logprobs, batch.ref_logprobs, mask, batch.cu_seqlens)
    plain = flow_balance_loss(*tokens, batch.rewards, log_z, beta=5.0)
    weights = torch.tensor([0.0, 0.5, 1.0, 1.5])
    torch.testing.assert_close(flow.diagnostics["loss"], weights * plain.diagnostics["loss"])
    assert flow.diagnostics["loss"][2] == 0 and flow.diagnostics["loss"][3] > 0

    grpo = baseline_objective(config("algorithm.objective=grpo"))(batch, outputs, None)
    weights = torch.cat([s.token_weights for s in samples if s.token_weights is not None])
    token_weights = zeros.masked_scatter(batch.response_mask, weights)
    expected = grpo_loss(
        *tokens[:2],
        batch.advantages,
        mask,
        batch.cu_seqlens,
        token_weights=token_weights,
        clip_ratio_c=3.0,
    )
    assert torch.equal(grpo.loss_sum, expected.loss_sum) and grpo.loss_sum != 0
    assert grpo.diagnostics["num_tokens"].sum() == normalizer_count("tokens", samples)


# In training


class NoisyEngine:
    """An engine whose log-probs are off, as those of other kernels are, and some not finite."""

    def __init__(self, engine: RolloutEngine, noise: float, bad_every: int = 0) -> None:
        self.engine, self.noise, self.bad_every = engine, noise, bad_every
        self.weight_version = engine.weight_version

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        generator = torch.Generator().manual_seed(seed)
        count = 0

        def off(response: Response) -> Response:
            nonlocal count
            count += 1
            noise = self.noise * torch.randn(len(response.logprobs), generator=generator)
            logprobs = (torch.tensor(response.logprobs) + noise).tolist()
            if self.bad_every and count % self.bad_every == 0:
                logprobs[0] = -math.inf if count % 2 else math.nan
            return replace(response, logprobs=logprobs)

        return [[off(r) for r in group] for group in self.engine.generate(prompts, params, seed)]

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.engine.publish(named_weights, version)

    def close(self) -> None:
        self.engine.close()


def step_with_noise(
    model: Path, run_dir: Path, *changes: str, noise: float = 0.3, bad_every: int = 0
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of one training step and the weights after it."""
    run_config = load_config(None, settings(model, run_dir, *changes, "data.val_max_samples=1"))
    with kept_threads(), start(run_config) as run:
        run.parts.engine = NoisyEngine(run.engine, noise, bad_every)  # pyright: ignore
        run.lookahead.engine = run.engine
        metrics = training_step(run)
        return metrics, {name: weight.clone() for name, weight in run.policy.named_weights()}


CORRECTION = "algorithm.rollout_correction."
ACROSS = {
    "grpo-token": ("algorithm.objective=grpo", CORRECTION + "rollout_is=token"),
    "ppo-geometric": ("algorithm.objective=ppo", CORRECTION + "rollout_is=geometric"),
    "reinforce_pp-icepop": (
        "algorithm.objective=reinforce_pp",
        CORRECTION + "rollout_is=token",
        CORRECTION + "rollout_is_threshold=5",
        CORRECTION + "rollout_rs=token",
        CORRECTION + "rollout_rs_threshold_lower=0.5",
    ),
    "flow-sequence": (CORRECTION + "rollout_is=sequence", CORRECTION + "rollout_rs=geometric"),
    "flow-vargrad": ("flow.log_z=vargrad", CORRECTION + "rollout_rs=token"),
}


def test_bad_logprobs_of_the_engine_as_old_ones(tiny_sums: Path, tmp_path: Path) -> None:
    metrics, _ = step_with_noise(tiny_sums, tmp_path, "flow.old_logprobs=rollout", bad_every=4)
    assert metrics["mismatch/nonfinite_tokens"] == 4
    assert metrics["actor/skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["flow/clipfrac"] > 0.2  # noise of 0.3 a token is taken for drift


@pytest.mark.parametrize("name", ACROSS)
def test_a_step_is_corrected(tiny_sums: Path, tmp_path: Path, name: str) -> None:
    changes = ACROSS[name]
    metrics, _ = step_with_noise(tiny_sums, tmp_path, *changes, bad_every=4)
    assert metrics["mismatch/nonfinite_tokens"] == 4  # of 16 responses
    assert metrics["mismatch/logprob_abs_diff_mean"] == pytest.approx(0.3 * 0.8, rel=0.25)
    assert 0 < metrics["mismatch/ess_sequence"] < metrics["mismatch/ess"] < 1
    assert metrics["actor/skipped_updates"] == 0 and math.isfinite(metrics["actor/loss"])
    if any("rollout_is=" in change for change in changes):
        # A token of sixteen responses, or all of its response, weighs nothing.
        assert 0.5 < metrics["mismatch/rollout_is_mean"] < 1.1
    if any("rollout_rs=" in change for change in changes):
        assert 0 < metrics["mismatch/rollout_rs_masked_fraction"] < 0.6
        assert 0.25 <= metrics["mismatch/rollout_rs_seq_masked_fraction"] <= 0.6
    if name == "flow-sequence":
        assert metrics["flow/weight_max"] <= 2 and metrics["flow/ess"] < 0.9


def test_an_exact_engine_needs_no_correction(tiny_sums: Path, tmp_path: Path) -> None:
    correct = (CORRECTION + "rollout_is=token", CORRECTION + "rollout_rs=sequence")
    grpo = "algorithm.objective=grpo"
    corrected, _ = step_with_noise(tiny_sums, tmp_path / "a", grpo, *correct, noise=0)
    plain, _ = step_with_noise(tiny_sums, tmp_path / "b", grpo, noise=0)
    assert corrected["mismatch/rollout_is_mean"] == pytest.approx(1, abs=1e-5)
    assert corrected["mismatch/rollout_rs_masked_fraction"] == 0
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy"):
        assert corrected[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("objective", ["flow_balance", "ppo"])
def test_when_all_is_rejected_nothing_is_learned(
    tiny_sums: Path, tmp_path: Path, objective: str
) -> None:
    changes = (
        f"algorithm.objective={objective}",
        CORRECTION + "rollout_rs=token",
        CORRECTION + "rollout_rs_threshold=1e-9",
        CORRECTION + "rollout_rs_threshold_lower=0",
    )
    metrics, weights = step_with_noise(tiny_sums, tmp_path, *changes)
    assert metrics["mismatch/rollout_rs_masked_fraction"] == 1
    assert metrics["actor/loss"] == metrics["actor/grad_norm"] == 0
    start_weights = load_file(tiny_sums / "model.safetensors")
    assert all(torch.equal(weight, start_weights[name]) for name, weight in weights.items())


def test_truncated_responses_and_penalties_in_training(tiny_sums: Path, tmp_path: Path) -> None:
    limit = ("algorithm.objective=grpo", "data.max_response_length=5")
    cases = {
        "plain": (),
        "masked": ("algorithm.mask_truncated=true",),
        "punished": ("reward.overlong_buffer.enable=true", "reward.overlong_buffer.len=2"),
    }
    steps = {
        name: step_with_noise(tiny_sums, tmp_path / name, *limit, *changes, noise=0)
        for name, changes in cases.items()
    }
    (plain, trained), (masked, without), (punished, shorter) = steps.values()
    assert 0 < plain["response_length/clip_ratio"] == masked["response_length/clip_ratio"] < 1
    assert plain["critic/rewards/max"] == masked["critic/rewards/max"]
    assert plain["critic/score/mean"] == punished["critic/score/mean"]
    assert punished["critic/overlong_penalty/min"] == -1
    assert punished["critic/overlong_penalty/mean"] < 0
    tensor = "model.layers.0.mlp.up_proj.weight"
    assert (trained[tensor] - without[tensor]).abs().max() > 1e-6
    assert (trained[tensor] - shorter[tensor]).abs().max() > 1e-6
