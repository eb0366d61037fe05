"""A step of PPO's critic is the same on every layout, and a wrong factor shows."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from critic_cases import (
    CRITIC_ROWS,
    TOKEN_MEAN,
    critic_on_ranks,
    measure_critic,
    one_process,
)
from harness import run_ranks
from parallel_cases import Spread, relative
from parallel_matrix import BOUNDS, LAYOUTS, Row
from torch import Tensor

from flowrl.megatron import collectives, critic, pipeline
from flowrl.megatron.layout import Layout


@pytest.mark.parametrize("row", CRITIC_ROWS, ids=[row.name for row in CRITIC_ROWS])
def test_critic_equals_one_process(row: Row) -> None:
    table = measure_critic(row)
    bound = BOUNDS[row.case.dtype]
    assert {name: value for name, value in table.items() if not value <= bound} == {}
    assert max(table.values()) > 0  # two computations and not one


def head_of_one_rank() -> None:
    read_values = critic.read_values

    def unmarked(model, hidden, batch):
        for parameter in model.value_head.parameters():
            parameter.sequence_parallel = False
        return read_values(model, hidden, batch)

    critic.read_values = unmarked


def values_summed_over_tensor() -> None:
    gather = critic.gather_from_sequence_parallel_region

    def summed(values: Tensor, tensor_parallel_output_grad: bool) -> Tensor:
        return gather(values, tensor_parallel_output_grad=True)

    critic.gather_from_sequence_parallel_region = summed


def tokens_over_context() -> None:
    def without_summed_backward(values: Tensor, group) -> Tensor:
        return collectives.sum_over_tensor_ranks(values, group)

    pipeline.sum_over_context_ranks = without_summed_backward


SABOTAGE = [
    (head_of_one_rank, "TP2 SP", {"head gradients"}),
    (values_summed_over_tensor, "TP2 SP", {"gradients", "head gradients"}),
    (tokens_over_context, "CP2", {"gradients", "head gradients"}),
]


@pytest.mark.parametrize(
    ("sabotage", "layout", "expected"), SABOTAGE, ids=[s[0].__name__ for s in SABOTAGE]
)
def test_a_wrong_factor_of_the_critic_shows(
    sabotage: Callable[[], None], layout: str, expected: set[str]
) -> None:
    table = measure_critic(Row("", "", layout, TOKEN_MEAN, LAYOUTS[layout]), sabotage)
    wrong = {name for name, value in table.items() if value > 1e-3}
    assert expected <= wrong
    assert not {"loss", "values"} & wrong  # none of them shows in the forward


def test_bfloat16_critic_keeps_its_head_in_float32() -> None:
    truth = one_process(TOKEN_MEAN)
    spread = Spread(2, Layout(tensor=2, sequence_parallel=True), distributed_optimizer=True)
    case = replace(TOKEN_MEAN, dtype=torch.bfloat16)
    for outcome in run_ranks(2, critic_on_ranks, case, spread, None):
        assert all(value.dtype == torch.float32 for value in outcome.values)
        assert outcome.loss == pytest.approx(truth.loss, rel=0.02)
        assert outcome.grad_norms[0] == pytest.approx(truth.grad_norms[0], rel=0.05)
        for name, weight in outcome.weights.items():
            is_head = name.startswith("critic.head.")
            assert weight.dtype == (torch.float32 if is_head else torch.bfloat16)
            assert relative(weight, truth.weights[name]) < 0.05, name
