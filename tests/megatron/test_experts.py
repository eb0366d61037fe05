"""Mixtures of experts: the marks on their parameters, and the policy of one process."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from critic_cases import (
    CRITIC_ROWS,
    build_torch_critic,
    make_value_objective,
    value_samples,
)
from harness import run_ranks
from hf_reference import DENSE_LAYERS, EXPERTS
from parallel_cases import (
    Case,
    Outcome,
    Spread,
    build_torch_policy,
    make_objective,
    make_samples,
    on_ranks,
    one_process,
    relative,
    worst,
)
from parallel_matrix import BOUNDS, EXPERT_LAYOUTS, ROWS, Row
from torch import Tensor

from flowrl.batch import Sample
from flowrl.megatron import model

NUM_STEPS = 4  # as many as the tests of checkpoints train
TRUTH = Case("qwen3_moe", dtype=torch.float64)
PPO_POLICY = replace(TRUTH, objective="grpo", has_partition=False)  # of test_critic_checkpoint.py


def expert_cases(rows: list[Row]) -> list[Case]:
    """What rows with experts train, in float64."""
    cases = {replace(row.case, dtype=torch.float64) for row in rows}
    return sorted((case for case in cases if case.kind in DENSE_LAYERS), key=str)


def case_id(case: Case) -> str:
    return f"{case.kind}-{case.objective}-{case.num_samples}"


def margins(trained: Any, samples: list[Sample], objective: Any) -> list[float]:
    """By layer and step, how close a logit comes to the border of its token's choice."""
    found = []

    def keep(gate: torch.nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        best = outputs[0].topk(EXPERTS["num_experts_per_tok"] + 1).values
        found.append(float((best[:, -2] - best[:, -1]).min()))

    gates = [m for name, m in trained.model.named_modules() if name.endswith("mlp.gate")]
    assert len(gates) == 4 - len(trained.model.config.mlp_only_layers)
    for gate in gates:
        gate.register_forward_hook(keep)
    for step in range(NUM_STEPS):
        trained.accumulate_gradients(samples, objective)
        trained.optimizer.step(step)
    assert len(found) == NUM_STEPS * len(gates)
    return found


@pytest.mark.parametrize("case", [*expert_cases(ROWS), PPO_POLICY], ids=case_id)
def test_no_token_is_close_to_another_choice(case: Case) -> None:
    """Else rounding would decide what is compared: float32's error of a logit is 1e-6."""
    found = margins(build_torch_policy(case), make_samples(case.num_samples), make_objective(case))
    assert min(found) > 1e-4


@pytest.mark.parametrize("case", expert_cases(CRITIC_ROWS), ids=case_id)
def test_no_token_of_the_critic_is_close_to_another_choice(case: Case) -> None:
    found = margins(build_torch_critic(case), value_samples(case), make_value_objective(case))
    assert min(found) > 1e-4


def unmarked(rank: int, case: Case, spread: Spread) -> Outcome:
    model.mark_experts = lambda model: None
    return on_ranks(rank, case, spread, None)


def test_experts_without_their_mark_lack_the_tokens_of_other_ranks() -> None:
    spread = EXPERT_LAYOUTS["TP2 SP"]
    outcomes = run_ranks(spread.num_ranks, unmarked, Case("qwen3_moe", num_steps=0), spread)
    exported = outcomes[0].gradients, one_process(TRUTH).gradients
    name = "model.layers.0.mlp.experts.down_proj"
    assert relative(exported[0][name], exported[1][name]) > 1e-2


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_experts_of_transformers_train_in_one_process(implementation: str) -> None:
    """Packed, with shared prompts and the head's op; the first is what a run uses."""
    policy = build_torch_policy(Case("qwen3_moe"))
    assert policy.model.config._experts_implementation == "grouped_mm"
    policy.model.set_experts_implementation(implementation)
    (result,) = policy.accumulate_gradients(make_samples(11), make_objective(TRUTH))
    truth, optimizer = one_process(TRUTH), policy.optimizer
    expected = truth.results[0]
    gradients = {n: optimizer.main_grads[p] for n, p in optimizer.parameters.items()}
    table = {
        "loss": relative(result.output.loss_sum, expected.output.loss_sum),
        "log-probs": relative(result.logprobs, expected.logprobs),
        "gradients": worst(gradients, truth.gradients),
    }
    bound = BOUNDS[torch.float32]
    assert {name: value for name, value in table.items() if not value <= bound} == {}
    used = gradients["model.layers.0.mlp.experts.gate_up_proj"].flatten(1).norm(dim=1)
    assert (used > 0).all()  # every expert had a token
