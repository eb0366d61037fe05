"""A step is the same on every layout: all quantities of every row within the bound."""

from collections.abc import Callable

import pytest
import torch
from parallel_cases import Case
from parallel_matrix import BOUNDS, LAYOUTS, ROWS, Row, measure
from torch import Tensor

from flowrl.megatron import collectives, pipeline, policy, step


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_equals_one_process(row: Row) -> None:
    table = measure(row)
    bound = BOUNDS[row.case.dtype]
    assert {name: value for name, value in table.items() if not value <= bound} == {}
    assert torch.tensor(list(table.values())).max() > 0  # two computations and not one


# A factor that is wrong must show, or the table proves nothing. Each breaks one named function.


def without_summed_backward(values: Tensor, group) -> Tensor:
    return collectives.sum_over_tensor_ranks(values, group)


def with_summed_backward(values: Tensor, group) -> Tensor:
    return collectives.sum_over_context_ranks(values, group)


def tokens_over_context() -> None:
    pipeline.sum_over_context_ranks = without_summed_backward


def z_over_context() -> None:
    step.sum_over_context_ranks = without_summed_backward


def z_over_tensor() -> None:
    step.sum_over_tensor_ranks = with_summed_backward


def count_of_micro_batches() -> None:
    step.reported_count = lambda normalizer, batch, num_filled: (1.0, 1)


def count_divided_by_context() -> None:
    whole = step.reported_count

    def halved(normalizer, batch, num_filled):
        factor, count = whole(normalizer, batch, num_filled)
        return 2 * factor, count

    step.reported_count = halved


def count_of_own_rank() -> None:
    whole = step.reported_count

    def halved(normalizer, batch, num_filled):
        return whole(normalizer, batch, num_filled / 2)

    step.reported_count = halved


def z_marked_as_sharded_sequence() -> None:
    # Set before the first step and after the weights were wrapped: finalize_model_grads reads it.
    original = step.read_out

    def read_out(chunk, hidden, batch, settings):
        for parameter in chunk.partition.parameters():
            parameter.sequence_parallel = True
        return original(chunk, hidden, batch, settings)

    step.read_out = read_out


def unmarked_shards() -> None:
    original = policy.MegatronPolicy.accumulate_gradients

    def forget(self, samples, objective):
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                parameter.tensor_model_parallel = False
        return original(self, samples, objective)

    policy.MegatronPolicy.accumulate_gradients = forget


SABOTAGE: list[tuple[Callable[[], None], str, Case, set[str]]] = [
    (tokens_over_context, "CP2", Case(), {"gradients"}),
    (z_over_context, "CP2", Case(), {"gradients"}),
    (z_over_tensor, "TP2 SP", Case(), {"gradients"}),
    (count_of_micro_batches, "DP2", Case(), {"gradients", "Z gradients"}),
    (count_divided_by_context, "CP2", Case(), {"gradients", "Z gradients"}),
    (count_of_own_rank, "DP2", Case(objective="constant", has_partition=False), {"gradients"}),
    (z_marked_as_sharded_sequence, "TP2 SP", Case(), {"Z gradients"}),
    (unmarked_shards, "TP2", Case(), {"grad norm"}),
]


@pytest.mark.parametrize(
    ("sabotage", "layout", "case", "expected"), SABOTAGE, ids=[s[0].__name__ for s in SABOTAGE]
)
def test_a_wrong_factor_shows(
    sabotage: Callable[[], None], layout: str, case: Case, expected: set[str]
) -> None:
    row = Row("", "", layout, case, LAYOUTS[layout])
    table = measure(row, sabotage)
    wrong = {name for name, value in table.items() if value > 1e-3}
    assert expected <= wrong
    assert not {"loss", "log-probs", "entropy", "Z"} & wrong  # none of them shows in the forward
