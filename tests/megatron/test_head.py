"""The sharded head against linear_logprob of one process, on 1 to 4 ranks."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor

from flowrl.kernels.linear_logprob import linear_logprob
from flowrl.megatron.head import vocab_parallel_logprob

HIDDEN = 24
TEMPERATURE = 0.7
NUM_ROWS = 36  # a multiple of every number of ranks
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@dataclass
class Case:
    """Inputs of the whole, and how they are shared out."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor | None
    shards: list[int]  # vocabulary entries per rank
    options: dict[str, Any]
    has_main_grad: bool = False


def make_case(
    shards: list[int],
    dtype: torch.dtype = torch.float64,
    *,
    with_entropy: bool = False,
    scale: float = 1.0,
    num_ignored: int = 7,
    has_main_grad: bool = False,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    target = torch.randint(sum(shards), (NUM_ROWS,), generator=generator)
    target[torch.randperm(NUM_ROWS, generator=generator)[:num_ignored]] = -100
    return Case(
        (scale * normal(NUM_ROWS, HIDDEN)).to(dtype),
        (0.5 * normal(sum(shards), HIDDEN)).to(dtype),
        target,
        normal(NUM_ROWS).to(torch.promote_types(dtype, torch.float32)),
        normal(NUM_ROWS).to(torch.promote_types(dtype, torch.float32)) if with_entropy else None,
        shards,
        options,
        has_main_grad,
    )


def sharded(rank: int, case: Case) -> dict[str, Tensor]:
    """One rank's values and gradients; buffers start at NaN or one, to show what is written."""
    is_sequence_parallel = case.options.get("sequence_parallel", False)
    size = dist.get_world_size() if is_sequence_parallel else 1
    hidden = case.hidden.chunk(size)[rank if is_sequence_parallel else 0].clone().requires_grad_()
    weight = case.weight.split(case.shards)[rank].clone().requires_grad_()
    dropped = torch.full((NUM_ROWS,), torch.nan)
    main_grad = torch.ones_like(weight, dtype=torch.float32, requires_grad=False)
    logprob, entropy = vocab_parallel_logprob(
        hidden,
        weight,
        case.target,
        TEMPERATURE,
        sum(case.shards[:rank]),
        dist.group.WORLD,
        entropy=case.grad_entropy is not None,
        dropped_mass=dropped,
        weight_grad=main_grad if case.has_main_grad else None,
        **case.options,
    )
    outputs, grads = [logprob], [case.grad_logprob]
    if entropy is not None:
        outputs, grads = [logprob, entropy], [case.grad_logprob, case.grad_entropy]
    torch.autograd.backward(outputs, grads)
    return {
        "logprob": logprob.detach(),
        "entropy": torch.empty(0) if entropy is None else entropy.detach(),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
        "main_grad": main_grad,
        "dropped": dropped,
    }


def run(case: Case) -> dict[str, Tensor]:
    """All ranks' results put together; what every rank must have alike is checked to be so."""
    results = run_ranks(len(case.shards), sharded, case)
    joined = {}
    for name in ("logprob", "entropy"):
        for result in results[1:]:
            assert torch.equal(result[name], results[0][name])
        joined[name] = results[0][name]
    for name in ("grad_weight", "main_grad"):
        joined[name] = torch.cat([r[name] for r in results])
    if case.options.get("sequence_parallel"):
        joined["grad_hidden"] = torch.cat([r["grad_hidden"] for r in results])
    else:
        for result in results[1:]:
            assert torch.equal(result["grad_hidden"], results[0]["grad_hidden"])
        joined["grad_hidden"] = results[0]["grad_hidden"]
    joined["dropped"] = torch.stack([r["dropped"] for r in results]).sum(0)
    return joined


def whole(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same by linear_logprob in one process, by default by the reference, in float64."""
    hidden = case.hidden.to(dtype).requires_grad_()
    weight = case.weight.to(dtype).requires_grad_()
    has_entropy = case.grad_entropy is not None
    logprob, entropy = linear_logprob(hidden, weight, case.target, TEMPERATURE, entropy=has_entropy)
    outputs, grads = [logprob], [case.grad_logprob.to(logprob.dtype)]
    if entropy is not None and case.grad_entropy is not None:
        outputs, grads = [logprob, entropy], [*grads, case.grad_entropy.to(logprob.dtype)]
    torch.autograd.backward(outputs, grads)
    assert hidden.grad is not None and weight.grad is not None
    return {
        "logprob": logprob.detach(),
        "entropy": torch.empty(0) if entropy is None else entropy.detach(),
        "grad_hidden": hidden.grad,
        "grad_weight": weight.grad,
    }


def error(actual: Tensor, truth: Tensor) -> float:
    return float((actual.double() - truth).norm() / truth.norm())


LAYOUTS = pytest.mark.parametrize(
    "shards",
    [[300], [150, 150], [171, 129], [1, 200, 99], [75, 75, 75, 75], [100, 100, 100, 0]],
    ids=lambda shards: "-".join(map(str, shards)),
)


@LAYOUTS
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_values_and_gradients_equal_one_process(shards: list[int], sequence_parallel: bool) -> None:
    case = make_case(shards, with_entropy=True, sequence_parallel=sequence_parallel)
    actual, truth = run(case), whole(case)
    for name, expected in truth.items():
        assert error(actual[name], expected) < 1e-13, name
    is_ignored = case.target == -100
    for name in ("logprob", "entropy", "grad_hidden"):
        assert actual[name][is_ignored].abs().max() == 0
    assert actual["dropped"].abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
def test_loses_no_more_than_one_process_of_the_same_dtype(
    dtype: torch.dtype, with_entropy: bool
) -> None:
    case = make_case([171, 129], dtype, with_entropy=with_entropy, sequence_parallel=True)
    actual, truth, alone = run(case), whole(case), whole(case, dtype)
    for name, expected in truth.items():
        if expected.numel():
            assert error(actual[name], expected) <= 1.05 * error(alone[name], expected) + 2e-7, name
    assert actual["logprob"].dtype == torch.float32 and actual["grad_hidden"].dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_main_grad_is_added_to_and_autograd_gets_zeros(dtype: torch.dtype) -> None:
    case = make_case([171, 129], dtype, has_main_grad=True)
    actual, truth = run(case), whole(case)
    assert actual["grad_weight"].shape == case.weight.shape
    assert actual["grad_weight"].abs().max() == 0
    # One process loses 1e-7, or 2e-3 where processors with AVX512-BF16 round a logit's gradient.
    buffer = torch.ones_like(case.weight, dtype=torch.float32)
    logprob, _ = linear_logprob(
        case.hidden.requires_grad_(), case.weight, case.target, TEMPERATURE, weight_grad=buffer
    )
    logprob.backward(case.grad_logprob)
    alone = error(buffer - 1, truth["grad_weight"])
    assert alone < (2**-9 if dtype == torch.bfloat16 else 1e-6)
    assert error(actual["main_grad"] - 1, truth["grad_weight"]) <= 1.05 * alone + 1e-6


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_a_kept_softmax_gives_the_same_gradients(
    dtype: torch.dtype, sequence_parallel: bool
) -> None:
    """Also where one rank has room for it and another has not, or has no entries."""
    options: dict[str, Any] = {"sequence_parallel": sequence_parallel}
    shards = [171, 429, 0]
    truth = whole(make_case(shards, dtype))
    recomputed = run(make_case(shards, dtype, **options))
    for budget in (29 * 256 * 4, 2**20):
        kept = run(make_case(shards, dtype, **options, memory_budget=budget))
        assert torch.equal(kept["logprob"], recomputed["logprob"])
        for name in ("grad_hidden", "grad_weight"):
            bound = 1.5 * error(recomputed[name], truth[name])
            assert error(kept[name], truth[name]) < max(bound, 1e-6), name
        assert not torch.equal(kept["grad_weight"], recomputed["grad_weight"])


@pytest.mark.parametrize("has_entropy_grad", [False, True], ids=["sparse", "exact"])
def test_dropped_mass_is_bounded_over_all_shards(has_entropy_grad: bool) -> None:
    drop_mass = 0.25
    case = make_case(
        [700, 800, 500], torch.float32, scale=2.5, with_entropy=has_entropy_grad,
        drop_mass=drop_mass,
    )  # fmt: skip
    actual, truth = run(case), whole(case)
    if has_entropy_grad:  # the bound is one of log-prob gradients only
        assert actual["dropped"].max() == 0
        assert error(actual["grad_hidden"], truth["grad_hidden"]) < 1e-5
        return
    budget = drop_mass * (8 * (-torch.expm1(truth["logprob"])).clamp(min=2**-16)).clamp(max=1)
    assert (actual["dropped"] <= budget).all()
    assert actual["dropped"].max() > 0.01
    largest = case.weight.norm(dim=1).max().double()
    bound = case.grad_logprob.abs() * actual["dropped"] * 2 * largest / TEMPERATURE
    difference = (actual["grad_hidden"].double() - truth["grad_hidden"]).norm(dim=1)
    assert (difference <= bound + 1e-5).all()
    assert (difference > 1e-4).any()
    assert error(actual["logprob"], truth["logprob"]) < 1e-6


def test_given_rows_are_used_as_found_ones() -> None:
    case = make_case([150, 150])
    found = run(case)
    case.options["rows"] = (case.target != -100).nonzero()[:, 0]
    given = run(case)
    for name, value in found.items():
        assert torch.equal(given[name], value), name


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["replicated", "sequence"])
def test_no_rows_give_zeros(sequence_parallel: bool) -> None:
    case = make_case([150, 150], num_ignored=NUM_ROWS, sequence_parallel=sequence_parallel)
    actual = run(case)
    for name in ("logprob", "grad_hidden", "grad_weight", "dropped"):
        assert actual[name].abs().max() == 0, name


def test_repeats_bitwise() -> None:
    case = make_case([100, 80, 120], torch.float32, with_entropy=True, sequence_parallel=True)
    first, second = run(case), run(case)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_large_logits_neither_overflow_nor_cancel() -> None:
    case = make_case([150, 150], torch.float32, scale=300.0, with_entropy=True)
    actual, truth = run(case), whole(case)
    assert truth["logprob"].min() < -500
    # A logit of thousands carries an error of its own size times 6e-8.
    assert (actual["logprob"].double() - truth["logprob"]).abs().max() < 2e-3
    assert (actual["entropy"].double() - truth["entropy"]).abs().max() < 2e-3


def bad_targets(rank: int) -> list[str]:
    hidden, weight = torch.zeros(4, 8), torch.zeros(10, 8)
    group = dist.group.WORLD
    calls = [
        (hidden, weight, torch.tensor([0, 19, 20, 1]), False),
        (hidden, weight, torch.tensor([0, 19, 1, -1]), False),
        (hidden, weight, torch.tensor([0, 1]), False),
        (hidden, weight, torch.tensor([0, 1, 2, 3]), True),
        (hidden, weight[:, :7], torch.tensor([0, 1, 2, 3]), False),
    ]
    messages = []
    for states, shard, target, is_sequence_parallel in calls:
        with pytest.raises(ValueError) as caught:
            vocab_parallel_logprob(
                states, shard, target, 1.0, 10 * rank, group, sequence_parallel=is_sequence_parallel
            )
        messages.append(str(caught.value))
    return messages


def bad_buffers(rank: int) -> list[str]:
    hidden, weight = torch.zeros(4, 8, dtype=torch.bfloat16), torch.zeros(10, 8).bfloat16()
    buffers = [
        {"weight_grad": torch.zeros_like(weight)},
        {"weight_grad": torch.zeros(11, 8)},
        {"weight_grad": torch.zeros(10, 8, device="meta")},
        {"dropped_mass": torch.zeros(4, dtype=torch.bfloat16)},
        {"dropped_mass": torch.zeros(3)},
    ]
    messages = []
    for buffer in buffers:
        with pytest.raises(ValueError) as caught:
            vocab_parallel_logprob(
                hidden, weight, torch.arange(4), 1.0, 10 * rank, dist.group.WORLD, **buffer
            )
        messages.append(str(caught.value))
    return messages


def test_buffers_that_do_not_fit_are_refused_on_every_rank() -> None:
    first, second = run_ranks(2, bad_buffers)
    assert first == second
    expected = [
        "weight_grad must be [10, 8], torch.float32, on cpu; got [10, 8], torch.bfloat16, on cpu: "
        "a main_grad is float32 with DistributedDataParallelConfig(grad_reduce_in_fp32=True)",
        "got [11, 8], torch.float32, on cpu",
        "got [10, 8], torch.float32, on meta",
        "dropped_mass must be [4], torch.float32, on cpu; got [4], torch.bfloat16, on cpu",
        "got [3], torch.float32, on cpu",
    ]
    for message, part in zip(first, expected, strict=True):
        assert part in message


def test_bad_input_is_refused_on_every_rank() -> None:
    first, second = run_ranks(2, bad_targets)
    assert first == second
    expected = ["target[2] is 20", "target[3] is -1", "must be [4]", "must be [8]", "[V_rank, 8]"]
    for message, part in zip(first, expected, strict=True):
        assert part in message
