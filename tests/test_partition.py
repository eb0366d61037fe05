"""The partition network: reference values, pooling and initialisation."""

import json
from pathlib import Path

import pytest
import torch

from flowrl.batch import Sample, pack
from flowrl.partition import (
    PartitionNetwork,
    Pooling,
    build_partition,
    pool_prompt_states,
    pooling_mask,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "flowrl.json").read_text())
CASE = VECTORS["cases"]["E_partition_head"]
EXPECTED = {
    "all": "mean_over_all_prompt_tokens_paper",
    "without_last": "mean_without_last_prompt_token_code",
}
POOLINGS = pytest.mark.parametrize("pooling", ["all", "without_last"])


def reference_network() -> PartitionNetwork:
    """The network of the reference case, in float64."""
    network = PartitionNetwork(4).double().eval()
    names = ["W1", "b1", "ln1_gamma", "ln1_beta", "W2", "b2", "ln2_gamma", "ln2_beta", "W3", "b3"]
    with torch.no_grad():
        for parameter, name in zip(network.parameters(), names, strict=True):
            value = torch.tensor(CASE["inputs"][name], dtype=torch.float64)
            assert parameter.shape == value.shape
            parameter.copy_(value)
    return network


@POOLINGS
def test_reference_case(pooling: Pooling) -> None:
    states = torch.tensor(CASE["inputs"]["prompt_hidden"], dtype=torch.float64)
    mask = torch.tensor(CASE["inputs"]["prompt_mask"], dtype=torch.bool)
    expected = CASE["expected"][EXPECTED[pooling]]
    lengths = mask.sum(1).tolist()
    samples = [Sample([10 + i] * n, [1, 2], [0.0, 0.0], group_id=i) for i, n in enumerate(lengths)]
    batch = pack(samples)
    hidden = torch.full((len(batch.input_ids), 4), torch.nan, dtype=torch.float64)  # responses
    hidden[batch.prompt_mask] = states[mask]
    hidden.requires_grad_()
    pooled = pool_prompt_states(hidden, batch, pooling, detach=False)
    log_z = reference_network()(pooled)
    log_z.sum().backward()
    torch.testing.assert_close(pooled, torch.tensor(expected["pooled"], dtype=torch.float64))
    torch.testing.assert_close(
        log_z, torch.tensor(expected["log_z"], dtype=torch.float64), rtol=1e-6, atol=1e-8
    )
    gradient = torch.tensor(expected["grad_prompt_hidden_for_unit_upstream"], dtype=torch.float64)
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[batch.prompt_mask], gradient[mask], rtol=1e-6, atol=1e-8)
    assert hidden.grad[batch.loss_mask].abs().max() == 0


def test_masks_of_a_hand_case() -> None:
    batch = pack([Sample([3, 4, 5], [6], [0.0], 0), Sample([3], [6, 7], [0.0, 0.0], 1)])
    assert pooling_mask(batch, "all").int().tolist() == [1, 1, 1, 0, 1, 0, 0]
    assert pooling_mask(batch, "without_last").int().tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert batch.prompt_mask.int().tolist() == [1, 1, 1, 0, 1, 0, 0]  # not cut in place


def test_a_one_token_prompt_pools_to_zero_without_its_last() -> None:
    batch = pack([Sample([3], [6], [0.0], 0), Sample([3, 4], [6], [0.0], 1)])
    hidden = torch.arange(1.0, 11.0).reshape(5, 2)
    assert pool_prompt_states(hidden, batch, "without_last", True).tolist() == [[0, 0], [5, 6]]
    assert pool_prompt_states(hidden, batch, "all", True).tolist() == [[1, 2], [6, 7]]


@POOLINGS
def test_shared_prompts_pool_the_same_rows_and_add_their_gradients(pooling: Pooling) -> None:
    prompts = [[3, 4, 5], [7, 8], [3, 4, 5], [3, 4, 5]]
    batch = pack([Sample(p, [6 + i], [0.0], 0) for i, p in enumerate(prompts)])
    assert len(batch.trunk_ids) == 3 + 2 + 4
    hidden = torch.randn(9, 6, requires_grad=True)
    pooled = pool_prompt_states(hidden, batch, pooling, detach=False)
    assert torch.equal(pooled[0], pooled[2]) and torch.equal(pooled[0], pooled[3])
    pooled.sum().backward()
    count = 3 if pooling == "all" else 2
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[:count], torch.full((count, 6), 3 / count))
    assert hidden.grad[3].abs().max() == 0  # a response


def test_detach_stops_the_gradient_and_leaves_the_value() -> None:
    batch = pack([Sample([3, 4], [6], [0.0], 0)])
    hidden = torch.randn(3, 4, requires_grad=True)
    stopped = pool_prompt_states(hidden, batch, "all", detach=True)
    assert not stopped.requires_grad
    assert torch.equal(stopped, pool_prompt_states(hidden, batch, "all", detach=False))


def test_bfloat16_states_are_averaged_in_float32() -> None:
    batch = pack([Sample([3] * 300, [6], [0.0], 0)])
    hidden = torch.full((301, 1), 1.0, dtype=torch.bfloat16)
    hidden[0] = 2.0**-7 + 1
    pooled = pool_prompt_states(hidden, batch, "all", detach=True)
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(1 + 2.0**-7 / 300, rel=1e-7)


def test_initialisation_depends_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    first = build_partition(8, 3, 0.1, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, other = build_partition(8, 3, 0.1, seed=4), build_partition(8, 3, 0.1, seed=5)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        is_layer_norm = ((a == 0) | (a == 1)).all()
        assert is_layer_norm or not torch.equal(a, c)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_layers_follow_the_released_network(num_layers: int) -> None:
    network = PartitionNetwork(6, num_layers, dropout=0.1)
    kinds = [type(layer).__name__ for layer in network.layers]
    block = ["Linear", "GELU", "LayerNorm", "Dropout"]
    assert kinds == block * (num_layers - 1) + ["Linear"]
    parts = (num_layers - 1) * (6 * 6 + 6 + 2 * 6) + 6 + 1
    assert sum(p.numel() for p in network.parameters()) == parts
    assert network(torch.randn(5, 6)).shape == (5,)


def test_dropout_acts_in_training_only() -> None:
    network = build_partition(32, 3, 0.5, seed=0)
    pooled = torch.randn(4, 32)
    assert not torch.equal(network(pooled), network(pooled))
    network.eval()
    assert torch.equal(network(pooled), network(pooled))
