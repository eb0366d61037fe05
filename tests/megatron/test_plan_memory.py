"""What `flowrl plan` counts is what Megatron allocates: parameters, states, saved activations."""

from pathlib import Path

import pytest
import torch
from harness import run_ranks
from hf_reference import hf_config, shard
from megatron.core import parallel_state
from torch import Tensor
from transformers import PretrainedConfig

from flowrl.config import load_config
from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import build_chunks, wrap
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.partition import build_partition
from flowrl.plan.layout import PlannedLayout
from flowrl.plan.memory import layer_activation_bytes, optimizer_bytes
from flowrl.plan.sizes import (
    ModelSizes,
    partition_parameters,
    read_sizes,
    stage_parameters,
    trunk_parameters,
)

LAYOUTS = {
    "tp2": Layout(tensor=2),
    "pp2": Layout(pipeline=2),
    "tp2-pp2": Layout(tensor=2, pipeline=2),
    "tp4-of-2-groups": Layout(tensor=4),
    "pp2-vpp2": Layout(pipeline=2, virtual_pipeline=2),
}
# 19 tokens, so that every shard but those of tp1 is padded.
CONFIGS = [
    hf_config(kind, tied=tied) for kind in ("llama", "qwen2", "qwen3") for tied in (False, True)
]


EXPERT_LAYOUTS = {
    "ep2": Layout(expert=2),
    "tp2-sp-ep2": Layout(tensor=2, expert=2, sequence_parallel=True),
    "pp2-vpp2-ep2": Layout(pipeline=2, virtual_pipeline=2, expert=2),
}
EXPERT_CONFIGS = [hf_config(kind) for kind in ("qwen3_moe", "qwen3_moe_late")]


def sizes_of(config: PretrainedConfig, folder: Path) -> ModelSizes:
    config.save_pretrained(folder)
    return read_sizes(str(folder))


def planned(layout: Layout, data: int = 1) -> PlannedLayout:
    return PlannedLayout(
        layout.tensor,
        layout.pipeline,
        layout.context,
        data,
        layout.virtual_pipeline,
        layout.sequence_parallel,
        expert=layout.expert,
    )


def built_parameters(
    rank: int, layout: Layout, configs: list[PretrainedConfig]
) -> tuple[int, list[int]]:
    """This rank's pipeline stage, and its parameters of every config, of a critic as well."""
    initialize(layout)
    counts = []
    for config in configs:
        for head in (None, torch.nn.Linear(16, 1)):
            chunks = build_chunks(config, layout, torch.float32, value_head=head)
            counts.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
    return parallel_state.get_pipeline_model_parallel_rank(), counts


@pytest.mark.parametrize("name", [*LAYOUTS, *EXPERT_LAYOUTS])
def test_parameters_are_those_that_megatron_builds(name: str, tmp_path: Path) -> None:
    layout = (LAYOUTS | EXPERT_LAYOUTS)[name]
    configs = EXPERT_CONFIGS if name in EXPERT_LAYOUTS else CONFIGS
    all_sizes = [sizes_of(c, tmp_path / str(i)) for i, c in enumerate(configs)]
    stages = set()
    for stage, counts in run_ranks(layout.model_ranks, built_parameters, layout, configs):
        stages.add(stage)
        plan = planned(layout, layout.model_ranks // (layout.tensor * layout.pipeline))
        num_head = 17 if stage == layout.pipeline - 1 else 0
        assert counts[::2] == [stage_parameters(s, plan, stage) for s in all_sizes]
        assert counts[1::2] == [trunk_parameters(s, plan, stage) + num_head for s in all_sizes]
    assert stages == set(range(layout.pipeline))


def built_state(rank: int, layout: Layout, is_spread: bool) -> tuple[int, int, int]:
    """Elements of main gradients, of Z, and bytes of the optimiser's state after a step."""
    initialize(layout)
    partition = build_partition(16, 3, 0.0, seed=0)
    chunks = build_chunks(CONFIGS[0], layout, torch.bfloat16, partition=partition)
    wrapped = wrap(chunks, distributed_optimizer=is_spread)
    optimizer = MegatronAdamW(
        wrapped,
        lr=1e-3,
        z_lr=1e-3,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        warmup_steps=0,
        max_grad_norm=1.0,
    )
    for parameter in wrapped[0].parameters():
        parameter.main_grad.fill_(1.0)  # pyright: ignore[reportAttributeAccessIssue]
    wrapped[0].finish_grad_sync()
    assert optimizer.step(0)[1]
    states, masters = 0, 0
    for part in optimizer.optimizer.chained_optimizers:
        inner = part.optimizer
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                states += sum(4 * state[name].numel() for name in ("exp_avg", "exp_avg_sq"))
                masters += 4 * parameter.numel()
    grads = sum(p.main_grad.numel() for p in wrapped[0].parameters())  # pyright: ignore
    num_z = sum(p.numel() for p in partition.parameters())
    return grads, num_z, states + masters


@pytest.mark.parametrize(
    ("layout", "is_spread"),
    [(Layout(), True), (Layout(context=2), True), (Layout(), False)],
    ids=["dp2", "cp2", "dp2-whole"],
)
def test_optimizer_state_is_divided_as_counted(
    layout: Layout, is_spread: bool, tmp_path: Path
) -> None:
    sizes = sizes_of(CONFIGS[0], tmp_path)
    config = load_config(
        None, ["model.path=x", "data.task=sums", f"parallel.use_distributed_optimizer={is_spread}"]
    )
    plan = planned(layout, data=2 // layout.context)
    num = stage_parameters(sizes, plan, 0)
    num_z = partition_parameters(16, 3)
    results = run_ranks(2, built_state, layout, is_spread)
    assert [result[:2] for result in results] == [(num + num_z, num_z)] * 2
    # Z is its own master: its 4 bytes are counted with its weights.
    num_ranks = 2 if is_spread else 1
    expected = optimizer_bytes(config, num, plan) + 12 * num_z / num_ranks
    for _, _, num_bytes in results:
        # Shards end at buckets, which are padded to 128 elements a rank.
        assert abs(num_bytes - expected) <= 12 * 128
    if not is_spread:
        assert results[0][2] == expected


NUM_TOKENS = 128


def wide_config(kind: str, num_layers: int) -> PretrainedConfig:
    """Width 64, 4 heads of 16 in 2 groups, 160 in the gate."""
    return hf_config(
        kind, hidden_size=64, intermediate_size=160, head_dim=16, num_hidden_layers=num_layers
    )


def saved_bytes(rank: int, kind: str, layout: Layout, recompute: str | None) -> float:
    """Bytes per token that autograd keeps for one layer: 4 layers less 2, over 2."""
    initialize(layout)
    totals = []
    for num_layers in (2, 4):
        config = wide_config(kind, num_layers)
        chunk = build_chunks(config, layout, torch.bfloat16, recompute=recompute)[0].train()
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        weights = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, weights=weights, kept=kept) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        ids, positions, packed, _ = shard([torch.arange(NUM_TOKENS) % 19], layout, 0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk(ids, positions, None, packed_seq_params=packed)
        totals.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    return (totals[1] - totals[0]) / 2 / NUM_TOKENS


def unfused_bytes(kind: str, layout: Layout) -> float:
    """What a layer on the CPU saves per token beyond fused norms, gate and rotation."""
    stream = layout.tensor if layout.sequence_parallel else 1
    norms = 2 * (8 * 64 + 4 - 2 * 64) / stream  # two float32 copies and a scale, not the input
    gate = 2 * 2 * 160 / layout.tensor  # silu's output and its product
    joined = 2 * 64 / layout.tensor  # the sequences' attention outputs end to end
    rotation = 4 * 2 * 16  # cosines and sines for queries and for keys
    qk_norms = (8 * (64 + 32) + 4 * (4 + 2)) / layout.tensor if kind == "qwen3" else 0
    return norms + gate + joined + rotation + qk_norms


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)],
    ids=["single", "tp2", "tp2-sp"],
)
def test_saved_activations_are_those_counted(kind: str, layout: Layout, tmp_path: Path) -> None:
    sizes = sizes_of(wide_config(kind, 2), tmp_path)
    counted = layer_activation_bytes(sizes, planned(layout), NUM_TOKENS, 2) / NUM_TOKENS
    expected = counted + unfused_bytes(kind, layout)
    assert run_ranks(layout.tensor, saved_bytes, kind, layout, None) == [expected] * layout.tensor


def test_recomputation_saves_the_input_of_a_layer() -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    assert run_ranks(2, saved_bytes, "llama", layout, "full") == [2 * 64 / 2] * 2
