"""The parts of a run around a tiny Megatron policy, for checkpoints without a training loop."""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from parallel_cases import (
    Case,
    Spread,
    build_policy,
    make_model,
    make_objective,
    make_partition,
    make_samples,
)
from tiny_model import tiny_tokenizer
from torch import Tensor

from flowrl.main_rank import MainRankEngine, MainRankRewards, is_main_rank
from flowrl.megatron.watchdog import Watchdog
from flowrl.megatron_parts import MegatronParts, trained_shapes
from flowrl.rollout.publication import expected_weights


class KeepingEngine:
    """A rollout engine that samples nothing and keeps what is published."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.weight_version = 0

    def generate(self, prompts: object, params: object, seed: int) -> list:
        raise AssertionError("nothing samples here")

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weights = {name: weight.clone() for name, weight in named_weights}
        self.weight_version = version

    def close(self) -> None:
        pass


def build_parts(case: Case, spread: Spread, timeout_s: float = 60.0) -> MegatronParts:
    """This rank's parts; rewards and reference are not there."""
    policy = build_policy(case, spread)
    chunk = policy.chunks[-1].module
    engine = MainRankEngine(KeepingEngine() if is_main_rank() else None)
    shapes = expected_weights(chunk.hf_config)
    watchdog = Watchdog(timeout_s)
    watchdog.num_steps = lambda: engine.weight_version
    model, hf_config = make_model(case), deepcopy(chunk.hf_config)
    # As in files a run begins with: the model's class is named, and most weights are bfloat16.
    hf_config.architectures, hf_config.dtype = [type(model).__name__], torch.bfloat16
    return MegatronParts(
        policy=policy,
        engine=engine,
        rewards=MainRankRewards(None),
        reference=[],
        reference_fingerprint="of the reference",
        model_path="tiny",
        tokenizer=tiny_tokenizer(),
        hf_config=hf_config,
        generation_config=model.generation_config,
        shapes=shapes,
        trained_shapes=trained_shapes(shapes, make_partition(case), None),
        offload_reference=False,
        watchdog=watchdog,
    )


def train_steps(policy, case: Case, first: int, last: int) -> list[tuple[float, float]]:
    """(loss sum, gradient norm) of the steps first .. last - 1, all on the same samples."""
    samples, objective = make_samples(case.num_samples), make_objective(case)
    figures = []
    for step in range(first, last):
        results = policy.accumulate_gradients(samples, objective)
        grad_norm, is_applied = policy.optimizer.step(step)
        assert is_applied
        figures.append((float(sum(r.output.loss_sum for r in results)), grad_norm))
    return figures


def run_state(step: int) -> dict[str, Any]:
    """What a run saves beside the tensors; nothing samples here."""
    fingerprint = "of the reference"
    return {"step": step, "reference_fingerprint": fingerprint, "sampler": {}, "lookahead": {}}


def save_step(parts: MegatronParts, run_dir: Path, step: int) -> Path:
    return parts.save(run_dir, step, run_state(step), keep=2)
