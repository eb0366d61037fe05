"""Metrics of a training step on hand-made cases, intervals, and kept evaluations."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.batch import Sample, pack
from flowrl.diagnostics import (
    flow_metrics,
    mismatch_metrics,
    rollout_metrics,
    stationary_log_z,
    throughput_metrics,
    token_metrics,
)
from flowrl.evaluate import (
    Evaluation,
    Judged,
    evaluation_path,
    load_evaluation,
    save_evaluation,
)
from flowrl.files import write_whole
from flowrl.interface import MicroBatchResult
from flowrl.intervals import Accuracy, bootstrap_interval
from flowrl.objectives import ObjectiveOutput
from flowrl.objectives.flow_balance import PRESETS
from flowrl.parts import resolve_flow, step_seed
from flowrl.settings import FlowConfig

BETA = 15.0


def result(
    group_ids: list[int], log_z: list[float] | None, **diagnostics: list[float]
) -> MicroBatchResult:
    """A micro-batch of one-token responses with the given diagnostics, the rest 0."""
    count = len(group_ids)
    names = ["loss", "residual", "weight", "num_tokens", "clipped", "skipped"]
    values = {n: torch.zeros(count) for n in [*names, "num_dropped_tokens"]}
    values |= {name: torch.tensor(v) for name, v in diagnostics.items()}
    batch = pack([Sample([1], [2], [-1.0], g) for g in group_ids])
    return MicroBatchResult(
        batch=batch,
        output=ObjectiveOutput(torch.zeros(()), "sequences", values),
        log_z=None if log_z is None else torch.tensor(log_z),
        logprobs=torch.zeros(2 * count),
        entropy=torch.zeros(2 * count),
        dropped_mass=None,
    )


# Stationary log Z


def test_stationary_log_z_by_hand() -> None:
    # Group 7: c = d - log Z = 2, -4 with weights 1, 3: -(2 - 12) / 4 = 2.5; own mean 0.5.
    # Group 2: c = 1: -1, own mean 5.
    stationary, own = stationary_log_z(
        weight=torch.tensor([1.0, 0.5, 3.0]),
        residual=torch.tensor([2.0, 6.0, -3.0]),
        log_z=torch.tensor([0.0, 5.0, 1.0]),
        group_ids=torch.tensor([7, 2, 7]),
    )
    assert stationary.tolist() == [-1.0, 2.5]
    assert own.tolist() == [5.0, 0.5]


def test_gradient_of_z_vanishes_at_the_stationary_value() -> None:
    generator = torch.Generator().manual_seed(0)
    group_ids = torch.tensor([0, 1, 0, 2, 1, 0, 2, 2])
    weight, residual, log_z = torch.rand(3, 8, generator=generator, dtype=torch.float64) * 4 - 1
    weight = weight.abs()
    stationary, _ = stationary_log_z(weight, residual, log_z, group_ids)
    shared = stationary.clone().requires_grad_()
    (weight * (shared[group_ids] + residual - log_z) ** 2).sum().backward()
    assert shared.grad is not None and shared.grad.abs().max() < 1e-14


def test_groups_without_weight_are_left_out() -> None:
    stationary, own = stationary_log_z(
        torch.tensor([0.0, 0.0, 2.0]),
        torch.tensor([9.0, 9.0, 1.0]),
        torch.tensor([0.0, 0.0, 3.0]),
        torch.tensor([0, 0, 1]),
    )
    assert stationary.tolist() == [2.0] and own.tolist() == [3.0]
    nothing = torch.zeros(0)
    empty = stationary_log_z(nothing, nothing, nothing, torch.zeros(0, dtype=torch.int64))
    assert [len(values) for values in empty] == [0, 0]


# Metrics


def test_flow_metrics_of_a_hand_case() -> None:
    results = [
        result(
            [0, 0],
            [1.0, 3.0],
            loss=[2.0, 4.0],
            residual=[1.0, -1.0],
            weight=[1.0, 1.0],
            num_tokens=[4.0, 2.0],
            clipped=[1.0, 0.0],
            num_dropped_tokens=[1.0, 2.0],
        ),
        result([1], [0.0], loss=[0.0], residual=[3.0], weight=[4.0], num_tokens=[6.0], skipped=[1]),
    ]
    metrics = flow_metrics(iter(results), BETA)
    # Group 0: c = 0, -4, so the stationary value is 2, as the own mean is. Group 1: c = 3, so -3.
    assert metrics == pytest.approx(
        {
            "actor/loss": 2.0,
            "flow/residual": 1.0,
            "flow/residual_std": math.sqrt(8 / 3),
            "flow/log_z": 4 / 3,
            "flow/weight": 2.0,
            "flow/weight_max": 4.0,
            "flow/clipfrac": 1 / 3,
            "flow/skipped": 1 / 3,
            "flow/dropped_tokens": 3.0,
            "flow/ess": 36 / (3 * 18),
            "flow/tilt": BETA * 4.0,
            "flow/log_z_stationary": -0.5,
            "flow/log_z_gap": 1.5,
        },
        rel=1e-12,
    )


def test_a_group_split_over_micro_batches_is_one_group() -> None:
    whole = result([0, 0], [1.0, 3.0], residual=[1.0, 5.0], weight=[1.0, 3.0])
    parts = [
        result([0], [1.0], residual=[1.0], weight=[1.0]),
        result([0], [3.0], residual=[5.0], weight=[3.0]),
    ]
    assert flow_metrics(parts, BETA) == flow_metrics([whole], BETA)


def test_without_a_network_log_z_is_what_the_loss_took() -> None:
    without = result([0], None, residual=[2.0], weight=[1.0])
    metrics = flow_metrics([without], BETA)
    assert metrics["flow/log_z"] == 0 and metrics["flow/log_z_stationary"] == -2
    without.batch.vargrad_log_z = torch.tensor([0.5])  # flow.log_z=vargrad
    metrics = flow_metrics([without], BETA)
    assert metrics["flow/log_z"] == 0.5 and metrics["flow/log_z_stationary"] == -1.5


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([0.3] * 5, 1.0), ([0, 0, 7, 0], 0.25), ([0.0, 0.0], 0.0), ([1e-150, 1e-150], 1.0)],
    ids=["equal", "one", "none", "tiny"],
)
def test_ess_of_hand_cases(weights: list[float], expected: float) -> None:
    values = torch.tensor(weights, dtype=torch.float64).tolist()
    one = result([0] * len(weights), None)
    one.output.diagnostics["weight"] = torch.tensor(values, dtype=torch.float64)
    assert flow_metrics([one], BETA)["flow/ess"] == pytest.approx(expected, rel=1e-6)


def test_ess_lies_between_one_sequence_and_all() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 7, 50):
        weights = torch.randn(count, generator=generator).mul(3).exp().tolist()
        ess = flow_metrics([result([0] * count, None, weight=weights)], BETA)["flow/ess"]
        assert 1 / count - 1e-12 <= ess <= 1 + 1e-12


def token_result(old: bool, dropped: list[float] | None = None) -> MicroBatchResult:
    one = result([0, 0], None)
    one.batch.rollout_logprobs = torch.tensor([0.0, -1.0, 0.0, -2.0])
    one.batch.old_logprobs = torch.tensor([0.0, -1.5, 0.0, -2.0]) if old else None
    one.logprobs = torch.tensor([9.0, -1.25, 9.0, -3.0])
    one.entropy = torch.tensor([9.0, 0.5, 9.0, 1.5])
    one.dropped_mass = None if dropped is None else torch.tensor(dropped)
    return one


def test_token_metrics_of_a_hand_case() -> None:
    # Old minus policy is -0.25 and 1 where old log-probs are known, and 0 where they are not.
    results = [token_result(old=True, dropped=[0.01, 0.03]), token_result(old=False, dropped=[0.0])]
    assert token_metrics(iter(results)) == pytest.approx(
        {
            "actor/entropy": 1.0,
            "actor/ppo_kl": (-0.25 + 1.0) / 4,
            "head/dropped_mass": 0.03,
        },
        rel=1e-6,
    )
    assert token_metrics([token_result(old=False)]) == {"actor/entropy": 1.0, "actor/ppo_kl": 0.0}


@pytest.mark.parametrize("old", [True, False], ids=["old known", "old unknown"])
def test_mismatch_metrics_of_a_hand_case(old: bool) -> None:
    # Policy minus rollout is -0.25 and -1, whatever the old log-probs are. One token a sequence.
    ess = (math.exp(-0.25) + math.exp(-1.0)) ** 2 / (2 * (math.exp(-0.5) + math.exp(-2.0)))
    assert mismatch_metrics(iter([token_result(old), token_result(old)])) == pytest.approx(
        {
            "mismatch/logprob_abs_diff_mean": 0.625,
            "mismatch/logprob_abs_diff_max": 1.0,
            "mismatch/kl": (math.exp(-0.25) - 0.75 + math.exp(-1.0)) / 2,
            "mismatch/ess": ess,
            "mismatch/ess_sequence": ess,
            "mismatch/nonfinite_tokens": 0.0,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_mismatch_metrics_leave_out_and_count_what_is_not_finite(bad: float) -> None:
    batch = pack([Sample([1], [2, 3], [-1.0, bad], 0), Sample([1], [2, 3], [-1.0, -2.0], 0)])
    one = MicroBatchResult(
        batch=batch,
        output=ObjectiveOutput(torch.zeros(()), "sequences", {}),
        log_z=None,
        logprobs=torch.tensor([9.0, -1.5, -2.0, 9.0, -1.0, -1.75]),
        entropy=torch.zeros(6),
        dropped_mass=None,
    )
    metrics = mismatch_metrics([one])
    assert metrics["mismatch/nonfinite_tokens"] == 1
    assert metrics["mismatch/logprob_abs_diff_mean"] == pytest.approx((0.5 + 0.0 + 0.25) / 3)
    ratios = [math.exp(-0.5), 1.0, math.exp(0.25)]
    expected = sum(ratios) ** 2 / (3 * sum(r * r for r in ratios))
    assert metrics["mismatch/ess"] == pytest.approx(expected, rel=1e-6)
    assert metrics["mismatch/ess_sequence"] == 1.0  # of the one sequence that is known
    batch.rollout_logprobs.fill_(bad)
    assert mismatch_metrics([one]) == {"mismatch/nonfinite_tokens": 4.0}


def test_rollout_metrics_of_a_hand_case() -> None:
    def one(group: int, score: float, length: int, **known: object) -> Sample:
        return Sample([1] * (group + 1), [2] * length, [0.0] * length, group, score=score, **known)  # pyright: ignore[reportArgumentType]  # fmt: skip

    samples = [
        one(0, 1.0, 3, reward=0.5),
        one(0, 1.0, 1, reward=-0.5),
        one(1, 0.0, 4, is_truncated=True),
        one(1, 1.0, 2),
        one(1, 1.0, 2),
        one(2, 0.0, 6),
    ]
    metrics = rollout_metrics(samples, ["4", " 4\n", "7", "5", "6", "4"], correct_threshold=1.0)
    assert metrics == pytest.approx(
        {
            "critic/score/mean": 4 / 6,
            "critic/score/max": 1.0,
            "critic/score/min": 0.0,
            "critic/rewards/mean": 0.0,
            "critic/rewards/max": 0.5,
            "critic/rewards/min": -0.5,
            "response_length/mean": 3.0,
            "response_length/max": 6.0,
            "response_length/min": 1.0,
            "prompt_length/mean": 11 / 6,
            "prompt_length/max": 3.0,
            "prompt_length/min": 1.0,
            "response_length/clip_ratio": 1 / 6,
            "critic/accuracy": 4 / 6,
            "flow/zero_variance_groups": 2 / 3,
            "flow/distinct_correct": (1 + 2 + 0) / 3,
        },
        rel=1e-12,
    )


def test_throughput_counts_prompts_and_responses() -> None:
    samples = [Sample([1, 2], [3], [0.0], 0), Sample([1], [3, 4, 5], [0.0] * 3, 0)]
    assert throughput_metrics(samples, 2.0) == {
        "timing_s/step": 2.0,
        "perf/total_num_tokens": 7,
        "perf/time_per_step": 2.0,
        "perf/throughput": 3.5,
    }


# Intervals and evaluations


def test_bootstrap_of_constants_is_a_point() -> None:
    assert bootstrap_interval([0.25] * 9) == Accuracy(0.25, 0.25, 0.25)
    assert bootstrap_interval([1.0]) == Accuracy(1.0, 1.0, 1.0)


def test_bootstrap_of_coin_flips_matches_the_binomial() -> None:
    # 100 prompts at 0.3: resampled means are Binomial(100, 0.3) / 100, 95 % within 0.21 .. 0.39.
    interval = bootstrap_interval([1.0] * 30 + [0.0] * 70)
    assert interval.mean == pytest.approx(0.3, rel=1e-12)
    assert interval.low == pytest.approx(0.21, abs=0.0101)
    assert interval.high == pytest.approx(0.39, abs=0.0101)
    assert bootstrap_interval([1.0] * 30 + [0.0] * 70) == interval
    assert bootstrap_interval([1.0] * 30 + [0.0] * 70, seed=1).mean == interval.mean


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        interval = bootstrap_interval(draw.beta(2, 3, size=80).tolist())
        hits += interval.low <= 0.4 <= interval.high
    assert hits >= 52  # of 60 at 95 %: 57 expected, standard deviation 1.7


def test_evaluations_come_back_as_they_were_saved(tmp_path: Path) -> None:
    evaluation = Evaluation(
        {"avg@4": Accuracy(1 / 3, 0.1, 0.7), "greedy": Accuracy(0.0, 0.0, 0.0)},
        [Judged("2+2=\n\u00e9", '4 "quoted" \ufffd', True), Judged("", "", False)],
    )
    assert load_evaluation(tmp_path, 7) is None
    save_evaluation(tmp_path, 7, evaluation)
    assert load_evaluation(tmp_path, 7) == evaluation
    assert load_evaluation(tmp_path, 8) is None
    assert [p.name for p in evaluation_path(tmp_path, 7).parent.iterdir()] == ["step_7.json"]


def test_write_whole_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text"
    write_whole(path, "first, long")
    write_whole(path, "\u00e9\n")
    assert path.read_bytes() == b"\xc3\xa9\n"
    assert [p.name for p in path.parent.iterdir()] == ["text"]


# What a run derives from its configuration


def test_resolve_flow_keeps_the_preset_and_applies_overrides() -> None:
    for name in ("paper", "original", "recipe", "cispo"):
        assert resolve_flow(FlowConfig(preset=name)) == PRESETS[name]  # pyright: ignore[reportCallIssue]
    changed = resolve_flow(
        FlowConfig(  # pyright: ignore[reportCallIssue]
            preset="recipe",
            weighting="clip",
            clip_low=0.0,
            clip_high=0.5,
            weight_cap=3.0,
            z_pooling="all",
            z_dropout=0.0,
            z_detach=True,
        )
    )
    assert vars(changed) == {
        "weighting": "clip",
        "clip_low": 0.0,
        "clip_high": 0.5,
        "weight_cap": 3.0,
        "pooling": "all",
        "z_dropout": 0.0,
        "detach_z": True,
    }


def test_step_seeds_are_fixed_and_distinct() -> None:
    seeds = {step_seed(seed, step) for seed in range(30) for step in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert step_seed(10**30, 3) == int(np.random.SeedSequence([10**30, 3]).generate_state(1)[0])
