"""Groups of a layout, and layouts that are refused."""

import multiprocessing
from typing import Any

import pytest
from harness import run_ranks

from flowrl.megatron.layout import (
    Layout,
    check_device,
    context_group,
    data_rank,
    data_size,
    expert_group,
    initialize,
    is_last_stage,
    tensor_group,
)


def place(rank: int, layout: Layout) -> tuple[int, int, int, int, bool]:
    initialize(layout)
    return tensor_group().rank(), context_group().rank(), data_rank(), data_size(), is_last_stage()


def expert_place(rank: int, layout: Layout) -> tuple[int, int]:
    initialize(layout)
    return expert_group().rank(), expert_group().size()


def test_ranks_are_dealt_tensor_first() -> None:
    """Tensor, then context, then data, then pipeline, as Megatron's checkpoints expect."""
    places = run_ranks(4, place, Layout(tensor=2))
    assert [p[:3] for p in places] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert all(p[3:] == (2, True) for p in places)
    places = run_ranks(4, place, Layout(pipeline=2, context=2))
    assert [p[1] for p in places] == [0, 1, 0, 1]
    assert [p[2:] for p in places] == [(0, 1, False)] * 2 + [(0, 1, True)] * 2


def test_ranks_of_all_axes_share_the_experts() -> None:
    layout = Layout(tensor=2, expert=4, sequence_parallel=True)
    places = run_ranks(4, expert_place, layout)
    assert places == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert layout.model_ranks == 4 and Layout(context=2, pipeline=3, expert=4).model_ranks == 12


def refusal(rank: int, layout: Layout) -> str:
    with pytest.raises(ValueError) as caught:
        initialize(layout)
    return str(caught.value)


def test_world_that_does_not_divide_is_refused() -> None:
    texts = run_ranks(3, refusal, Layout(tensor=2))
    assert all("3 ranks are no multiple" in text and "multiple of 2" in text for text in texts)
    texts = run_ranks(2, refusal, Layout(context=2, expert=4))
    assert all("pipeline * expert = 1 * 4: start a multiple of 4 ranks" in text for text in texts)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tensor": 0}, "tensor = 0"),
        ({"context": -1}, "context = -1"),
        ({"virtual_pipeline": 2}, "virtual_pipeline = 2"),
        ({"sequence_parallel": True}, "sequence_parallel = True"),
        ({"expert": 0}, "expert = 0"),
    ],
    ids=lambda x: str(x),
)
def test_impossible_layout_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Layout(**settings)


def test_multiple_of_a_padded_sequence() -> None:
    assert Layout().sequence_multiple == 1
    assert Layout(context=3).sequence_multiple == 6
    assert Layout(tensor=2, sequence_parallel=True).sequence_multiple == 2
    assert Layout(tensor=2, context=2, sequence_parallel=True).sequence_multiple == 8


def test_without_torchrun_the_remedy_is_named() -> None:
    fork = multiprocessing.get_context("fork")  # what initialize changes stays in the child
    with fork.Pool(1) as pool, pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        pool.apply(initialize, (Layout(tensor=2),))


@pytest.mark.parametrize(
    ("device", "local_rank", "num_gpus"),
    [("auto", 7, 0), ("cpu", 7, 0), ("auto", 7, 8), ("cuda", 0, 1)],
)
def test_device_of_a_rank(device: str, local_rank: int, num_gpus: int) -> None:
    check_device(device, local_rank, num_gpus)


def test_device_that_a_rank_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        check_device("auto", 2, 2)
    assert "rank 2 of this machine has no GPU: torch sees 2" in str(caught.value)
    assert '--nproc-per-node 2, or with CUDA_VISIBLE_DEVICES=""' in str(caught.value)
    with pytest.raises(ValueError, match="trainer.device = cpu, but torch sees 4 GPU") as caught:
        check_device("cpu", 0, 4)
    assert 'CUDA_VISIBLE_DEVICES=""' in str(caught.value)
