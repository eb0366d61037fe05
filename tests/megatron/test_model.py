"""Hidden states and every gradient of FlowModel equal those of transformers, in all layouts."""

import functools
import operator
from typing import Any

import pytest
import torch
from harness import run_ranks
from hf_reference import hf_config, hf_hidden, hf_model, shard
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from transformers import PretrainedConfig

from flowrl.megatron.layout import Layout, context_group, data_rank, data_size, initialize
from flowrl.megatron.model import FlowModel, build_chunks, wrap
from flowrl.megatron.weights import export_hf_weights, load_hf_weights

LENGTHS = [[5, 1, 7], [9], [2, 2, 2, 3], [11, 4]]  # of four micro-batches
LAYOUTS = {
    "single": Layout(),
    "tp2": Layout(tensor=2),
    "tp2-sp": Layout(tensor=2, sequence_parallel=True),
    "tp4-of-2-groups": Layout(tensor=4),
    "pp2": Layout(pipeline=2),
    "pp2-vpp2": Layout(pipeline=2, virtual_pipeline=2),
    "cp2": Layout(context=2),
    "cp4": Layout(context=4),
    "tp2-pp2-sp": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "tp2-cp2-sp": Layout(tensor=2, context=2, sequence_parallel=True),
    "pp2-cp2": Layout(pipeline=2, context=2),
}
EXPERT_LAYOUTS = {
    "single": Layout(),
    "ep2": Layout(expert=2),
    "tp2-sp-ep2": Layout(tensor=2, expert=2, sequence_parallel=True),
    "pp2-ep2": Layout(pipeline=2, expert=2),
}
ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 123.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.7,
    },
}


def error(value: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def micro_batches() -> tuple[list[list[Tensor]], list[Tensor]]:
    """Sequences, and the direction [N, H] in which each micro-batch's states are summed."""
    generator = torch.Generator().manual_seed(1)
    sequences = [[torch.randint(19, (n,), generator=generator) for n in x] for x in LENGTHS]
    return sequences, [torch.randn(sum(x), 16, generator=generator).bfloat16() for x in LENGTHS]


def model_config(kind: str, tied: bool, rope: str | None) -> PretrainedConfig:
    if rope is None:
        return hf_config(kind, tied=tied)
    return hf_config(kind, tied=tied, rope_parameters={"rope_theta": 100.0, **ROPES[rope]})


@functools.cache
def hf_results(
    kind: str, tied: bool, rope: str | None, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Tensor]]:
    """Weights, states of every micro-batch, gradients of their sums along the directions."""
    model = hf_model(model_config(kind, tied, rope), dtype)
    states = []
    for sequences, direction in zip(*micro_batches(), strict=True):
        hidden = hf_hidden(model, sequences)
        (hidden * direction.to(dtype)).sum().backward()
        states.append(hidden.detach())
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return model.state_dict(), states, grads


def megatron_results(
    rank: int,
    config: PretrainedConfig,
    weights: dict[str, Tensor],
    layout: Layout,
    dtype: torch.dtype,
    recompute: str | None,
) -> tuple[list[tuple[int, Tensor, Tensor]], dict[str, Tensor]]:
    """(micro-batch, rows, states there) as far as this rank has them, and all gradients."""
    initialize(layout)
    chunks = build_chunks(config, layout, dtype, recompute=recompute)
    load_hf_weights(chunks, weights.items())
    wrapped: list[Any] = [*wrap(chunks)]
    own = range(data_rank(), len(LENGTHS), data_size())
    sequences, directions = micro_batches()
    states = []

    def forward_step(iterator: Any, model: Any) -> Any:
        batch = next(iterator)
        ids, positions, packed, rows = shard(sequences[batch], layout, context_group().rank())
        if layout.sequence_parallel:
            tensor_rank = parallel_state.get_tensor_model_parallel_rank()
            rows = rows.chunk(layout.tensor)[tensor_rank]
        is_real = rows >= 0

        def loss(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            direction = directions[batch].to(dtype)[rows[is_real]]
            return (hidden[is_real, 0] * direction).sum(), torch.tensor(1, dtype=torch.int), {}

        def keep(model: FlowModel, hidden: Tensor) -> Tensor:
            states.append((batch, rows[is_real], hidden.detach()[is_real, 0].clone()))
            return hidden

        model.module.postprocess = keep
        return model(ids, positions, None, packed_seq_params=packed), loss

    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(own) for _ in chunks] if len(chunks) > 1 else iter(own),
        model=wrapped if len(chunks) > 1 else wrapped[0],
        num_microbatches=len(own),
        seq_length=1,  # lengths vary, so they are exchanged
        micro_batch_size=1,
        forward_only=False,
    )
    # Every data- and context-parallel rank counted 1 per micro-batch, and Megatron divided by all.
    count = len(LENGTHS) * layout.context
    kind = torch.promote_types(chunks[0].config.params_dtype, torch.float32)
    main_grads = export_hf_weights(chunks, read=operator.attrgetter("main_grad"), dtype=kind)
    return states, {name: value * count for name, value in main_grads}


def check(
    kind: str,
    layout: Layout,
    *,
    tied: bool = False,
    rope: str | None = None,
    dtype: torch.dtype = torch.float64,
    factor: float = 1.0,
    floor: float = 1e-13,
    recompute: str | None = None,
    num_replicas: int = 1,
) -> None:
    """Compare with float64; allowed are `factor` times the error of transformers, and `floor`."""
    config = model_config(kind, tied, rope)
    _, true_states, true_grads = hf_results(kind, tied, rope, torch.float64)
    weights, hf_states, hf_grads = hf_results(kind, tied, rope, dtype)
    wrong, seen = {}, set()
    for states, grads in run_ranks(
        layout.model_ranks * num_replicas,
        megatron_results,
        config,
        weights,
        layout,
        dtype,
        recompute,
    ):
        assert set(grads) - {"lm_head.weight"} == set(true_grads)
        pairs = {name: (grads[name], hf_grads[name], x) for name, x in true_grads.items()}
        for batch, rows, value in states:
            if len(rows):
                seen.add(batch)
                pairs[f"states {batch}"] = value, hf_states[batch][rows], true_states[batch][rows]
        for name, (value, hf_value, truth) in pairs.items():
            if not error(value, truth) <= factor * error(hf_value, truth) + floor:
                wrong[name] = error(value, truth), error(hf_value, truth)
    assert not wrong
    assert seen == set(range(len(LENGTHS)))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_matches_transformers(name: str) -> None:
    check("llama", LAYOUTS[name], tied=LAYOUTS[name].pipeline > 1)


def test_data_parallel_matches_transformers() -> None:
    check("llama", Layout(), num_replicas=2)


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("qwen2", False), ("qwen2", True), ("qwen3", False)]
)
def test_family_matches_transformers(kind: str, tied: bool) -> None:
    check(kind, LAYOUTS["tp2-sp"], tied=tied)


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_experts_match_transformers(name: str) -> None:
    """Megatron's softmax over the chosen experts is float32 whatever the model's dtype."""
    check("qwen3_moe", EXPERT_LAYOUTS[name], dtype=torch.float32, factor=1.5, floor=1e-6)


def test_experts_whose_weights_do_not_sum_to_1_match_transformers() -> None:
    layout = EXPERT_LAYOUTS["ep2"]
    check("qwen3_moe_raw", layout, dtype=torch.float32, factor=1.5, floor=1e-6)


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_precision_matches_transformers(dtype: torch.dtype, floor: float) -> None:
    check("qwen3", LAYOUTS["tp2"], dtype=dtype, factor=1.5, floor=floor)


@pytest.mark.parametrize("rope", ROPES)
def test_rope_matches_transformers(rope: str) -> None:
    check("llama", Layout(), rope=rope)


@pytest.mark.parametrize(("recompute", "name"), [("selective", "pp2-cp2"), ("full", "tp2-sp")])
def test_recomputation_changes_nothing(recompute: str, name: str) -> None:
    check("qwen3", LAYOUTS[name], recompute=recompute)


def overlapped_weights(rank: int, overlap: bool) -> list[Tensor]:
    """The output weight that the head sees, before and after an optimizer step."""
    initialize(Layout())
    config = hf_config("llama")
    chunks = build_chunks(config, Layout(), torch.float32)
    load_hf_weights(chunks, hf_model(config).state_dict().items())
    wrapped: list[Any] = [
        *wrap(
            chunks,
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=overlap,
            bucket_size=64,  # the output weight has a bucket of its own
        )
    ]
    settings = OptimizerConfig(
        lr=0.1, use_distributed_optimizer=True, overlap_param_gather=overlap, clip_grad=0.0
    )
    optimizer = get_megatron_optimizer(settings, wrapped)
    seen = []

    def head(model: FlowModel, hidden: Tensor) -> Tensor:
        seen.append(model.output_weight().detach().clone())
        return hidden.sum() * model.output_weight().sum()

    chunks[0].postprocess = head
    sequences = [torch.arange(5), torch.arange(3)]
    ids, positions, packed, _ = shard(sequences, Layout(), 0)
    for _ in range(2):
        wrapped[0].zero_grad_buffer()
        wrapped[0](ids, positions, None, packed_seq_params=packed).backward()
        wrapped[0].finish_grad_sync()
        optimizer.step()
    return seen


def test_head_sees_fresh_weights_when_their_gather_overlaps() -> None:
    for late, waited in zip(
        run_ranks(2, overlapped_weights, True), run_ranks(2, overlapped_weights, False), strict=True
    ):
        assert not torch.equal(waited[0], waited[1])
        assert all(torch.equal(x, y) for x, y in zip(late, waited, strict=True))
