"""Mixtures of experts in bfloat16: no further from float64 than one process in bfloat16 is.

Which experts a token goes to is not continuous. So routers are compared on equal states, and whole
steps with a model whose logits are further apart than bfloat16 moves them.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from critic_cases import (
    HEAD,
    TOKEN_MEAN,
    build_torch_critic,
    critic_errors,
    critic_on_ranks,
    make_value_objective,
    value_samples,
)
from critic_cases import one_process as critic_of_one_process
from harness import run_ranks
from hf_reference import EXPERTS, hf_config, hf_model
from parallel_cases import (
    Case,
    Spread,
    build_torch_policy,
    errors,
    make_objective,
    make_samples,
    on_ranks,
    one_process,
)
from parallel_matrix import EXPERT_LAYOUTS
from torch import Tensor

from flowrl.batch import Sample
from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import build_chunks
from flowrl.megatron.weights import load_hf_weights

NUM_CHOSEN = EXPERTS["num_experts_per_tok"]
# Without Z: of its few values one process may have errors several times smaller, or larger, than a
# rank, with a dense model too.
POLICY = Case("qwen3_moe_apart", has_partition=False, dtype=torch.bfloat16)
CRITIC = replace(TOKEN_MEAN, kind="qwen3_moe_apart", dtype=torch.bfloat16)
SPREADS = {
    "one rank": EXPERT_LAYOUTS["one rank"],
    "DP2 EP2": EXPERT_LAYOUTS["DP2 EP2"],
    "TP2 SP EP2": EXPERT_LAYOUTS["TP2 SP EP2"],
    "PP2 DP2 EP2, distributed optimiser": replace(
        EXPERT_LAYOUTS["PP2 DP2 EP2"], distributed_optimizer=True
    ),
}


def routed(rank: int, kind: str, states: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and choices [T, E] of the first layer's router."""
    initialize(Layout())
    model = hf_model(hf_config(kind), torch.bfloat16)
    (chunk,) = build_chunks(model.config, Layout(), torch.bfloat16)
    load_hf_weights([chunk], model.state_dict().items())
    with torch.no_grad():
        return chunk.decoder.layers[0].mlp.router(states[:, None])


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_moe_raw"])
def test_router_chooses_as_that_of_transformers(kind: str) -> None:
    """However close two logits are; of equal ones either may be chosen."""
    config = hf_config(kind)
    gate = hf_model(config, torch.bfloat16).base_model.layers[0].mlp.gate
    states = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        logits, weights, indices = gate(states)
    ((probs, is_chosen),) = run_ranks(1, routed, kind, states)
    chosen = logits.masked_fill(~is_chosen, -torch.inf).topk(NUM_CHOSEN)
    assert (is_chosen.sum(1) == NUM_CHOSEN).all()
    assert torch.equal(chosen.values, logits.gather(1, indices))
    truth = logits.double().softmax(1).gather(1, chosen.indices)
    if config.norm_topk_prob:
        truth = truth / truth.sum(1, keepdim=True)
    assert (weights - truth).abs().max() > 1e-3  # theirs are rounded to bfloat16
    assert (probs.gather(1, chosen.indices) - truth).abs().max() < 1e-6


def gate_logits(trained: Any, samples: list[Sample], objective: Any) -> Tensor:
    """Logits of all routers in the steps that are compared, [tokens, E]."""
    found = []

    def keep(gate: torch.nn.Module, inputs: object, outputs: tuple[Tensor, ...]) -> None:
        found.append(outputs[0].detach().double())

    for name, module in trained.model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(keep)
    for step in range(POLICY.num_steps):
        trained.accumulate_gradients(samples, objective)
        trained.optimizer.step(step)
    return torch.cat(found)


def assert_far_from_another_choice(exact: Tensor, rounded: Tensor) -> None:
    """Two logits would have to move by half of what is between them."""
    best = exact.topk(NUM_CHOSEN + 1)
    margin = (best.values[:, -2] - best.values[:, -1]).min()
    assert 20 * (exact - rounded).abs().max() < margin
    pairs = best.indices[:, :NUM_CHOSEN].sort().values.unique(dim=0)
    assert len(pairs) == 6  # all of four experts' occur


def test_bfloat16_moves_no_token_of_the_policy() -> None:
    samples, objective = make_samples(POLICY.num_samples), make_objective(POLICY)
    exact, rounded = (
        gate_logits(build_torch_policy(replace(POLICY, dtype=dtype)), samples, objective)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_far_from_another_choice(exact, rounded)


def test_bfloat16_moves_no_token_of_the_critic() -> None:
    samples, objective = value_samples(CRITIC), make_value_objective(CRITIC)
    exact, rounded = (
        gate_logits(build_torch_critic(replace(CRITIC, dtype=dtype)), samples, objective)
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert_far_from_another_choice(exact, rounded)


def assert_bounded(table: dict[str, float], own: dict[str, float], spread: Spread) -> None:
    """`own`: the errors of one process in bfloat16."""
    if spread.distributed_optimizer:
        # A rank's main_grad is then whole only in the part that it updates.
        table = {name: value for name, value in table.items() if "gradients" not in name}
    wrong = {n: (x, own[n]) for n, x in table.items() if not x <= 2 * own[n] + 1e-3}
    assert wrong == {}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_policy_is_as_near_to_float64_as_one_process(spread: Spread) -> None:
    truth = one_process(replace(POLICY, dtype=torch.float64))
    outcomes = run_ranks(spread.num_ranks, on_ranks, POLICY, spread, None)
    assert_bounded(errors(outcomes, truth), errors([one_process(POLICY)], truth), spread)
    for outcome in outcomes:
        assert {weight.dtype for weight in outcome.weights.values()} == {torch.bfloat16}
        assert {gradient.dtype for gradient in outcome.gradients.values()} == {torch.float32}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=SPREADS)
def test_critic_is_as_near_to_float64_as_one_process(spread: Spread) -> None:
    truth = critic_of_one_process(replace(CRITIC, dtype=torch.float64))
    outcomes = run_ranks(spread.num_ranks, critic_on_ranks, CRITIC, spread, None)
    own = critic_errors([critic_of_one_process(CRITIC)], truth)
    assert_bounded(critic_errors(outcomes, truth), own, spread)
    for outcome in outcomes:
        for name, weight in outcome.weights.items():
            assert weight.dtype == (torch.float32 if name.startswith(HEAD) else torch.bfloat16)
