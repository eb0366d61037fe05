"""What a publication must carry: names and shapes of the model, once each, and its checksum."""

from collections.abc import Callable

import pytest
import torch
from tiny_model import CONFIGS, random_model
from torch import Tensor

from flowrl.rollout.publication import (
    checked,
    checksum,
    expected_weights,
    tensor_checksum,
)

Weights = list[tuple[str, Tensor]]


def weights_of(kind: str, tied: bool) -> Weights:
    return [(n, p.detach()) for n, p in random_model(kind, tied=tied).named_parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_expected_weights_are_those_of_the_policy(kind: str, tied: bool) -> None:
    expected = expected_weights(random_model(kind, tied=tied).config)
    weights = dict(weights_of(kind, tied))
    assert expected == {name: weight.shape for name, weight in weights.items()}
    assert ("lm_head.weight" in expected) is not tied


def test_weights_pass_as_they_come_in_any_order() -> None:
    weights = weights_of("llama", False)[::-1]
    expected = {name: weight.shape for name, weight in weights}
    taken = []

    def stream():
        for pair in weights:
            assert len(taken) == weights.index(pair)  # the one before was passed on already
            yield pair

    for pair in checked(stream(), expected):
        taken.append(pair)
    assert [name for name, _ in taken] == [name for name, _ in weights]
    assert all(a is b for (_, a), (_, b) in zip(taken, weights, strict=True))


def without_last(weights: Weights) -> Weights:
    return weights[:-1]


def with_unknown(weights: Weights) -> Weights:
    return [*weights, ("model.extra.weight", torch.zeros(2))]


def with_repeated(weights: Weights) -> Weights:
    return [*weights, weights[1]]


def with_transposed_last(weights: Weights) -> Weights:
    return [*weights[:-1], (weights[-1][0], torch.zeros(17, 16).T)]


@pytest.mark.parametrize(
    ("spoil", "num_passed", "message"),
    [
        (without_last, 20, r"1 of 21 weights were not published, first lm_head.weight"),
        (with_unknown, 21, r"model.extra.weight is not one of the model's"),
        (with_repeated, 21, r"model.layers.0.self_attn.q_proj.weight came twice"),
        (with_transposed_last, 20, r"lm_head.weight has shape \[16, 17\].*\[16, 16\]"),
        (lambda weights: [], 0, r"21 of 21 weights were not published, first lm_head.weight"),
    ],
    ids=["short", "unknown", "repeated", "shape", "empty"],
)
def test_wrong_weights_are_named(
    spoil: Callable[[Weights], Weights], num_passed: int, message: str
) -> None:
    weights = weights_of("llama", False)
    expected = {name: weight.shape for name, weight in weights}
    passed = []
    with pytest.raises(ValueError, match=message):
        for pair in checked(spoil(weights), expected):
            passed.append(pair)
    assert len(passed) == num_passed


def test_checksum_is_of_names_shapes_dtypes_and_bytes_in_any_order() -> None:
    weights = weights_of("llama", True)
    expected = checksum(weights)
    assert checksum(reversed(weights)) == expected
    assert checksum(iter([(n, w.clone()) for n, w in weights])) == expected

    def changed(place: int, name: str, weight: Tensor) -> str:
        return checksum([*weights[:place], (name, weight), *weights[place + 1 :]])

    name, weight = weights[3]
    flipped = weight.clone()
    flipped.view(torch.int32)[0, 0] ^= 1
    others = [
        changed(3, name, flipped),
        changed(3, name + "x", weight),
        changed(3, name, weight.flatten()),
        changed(3, name, weight.view(torch.int32)),
        changed(3, weights[4][0], weight),
        checksum(weights[:-1]),
    ]
    assert expected not in others and len(set(others)) == len(others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_values_not_memory(dtype: torch.dtype) -> None:
    weight = torch.randn(6, 4).to(dtype)
    assert tensor_checksum(weight.T.contiguous()) == tensor_checksum(weight.T)
    assert tensor_checksum(weight) != tensor_checksum(weight.T)
    assert tensor_checksum(torch.zeros(0, 3, dtype=dtype)) != tensor_checksum(
        torch.zeros(3, 0, dtype=dtype)
    )
