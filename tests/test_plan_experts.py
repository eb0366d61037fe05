"""`flowrl plan` for a mixture of experts: published sizes, memory by hand, layouts."""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from flowrl.config import load_config
from flowrl.plan import Plan, make_plan
from flowrl.plan.layout import PlannedLayout
from flowrl.plan.memory import layer_activation_bytes
from flowrl.plan.report import render
from flowrl.plan.search import layout_problem
from flowrl.plan.sizes import KNOWN_MODELS, active_parameters, model_parameters, read_sizes

QWEN_30B = KNOWN_MODELS["qwen3-30b-a3b"]
BASE = ["model.path=Qwen/Qwen3-30B-A3B", "data.task=sums", "data.max_response_length=8192"]


def plan_of(*overrides: str, rollout: int = 0) -> Plan:
    config = load_config(None, [*BASE, *overrides])
    return make_plan(config, num_gpus=16, gpu="h200", num_rollout_gpus=rollout)


def test_parameters_are_as_published() -> None:
    """Published as 30.5 billion, of which 3.3 billion are active."""
    assert model_parameters(QWEN_30B) == 30_532_122_624
    # 48 layers with 8 of 128 experts, attention, router and norms; two tables and the last norm.
    expert, attention = 3 * 2048 * 768, 2048 * (2 * 4096 + 2 * 512)
    layer = 8 * expert + attention + 128 * 2048 + 2 * 2048 + 2 * 128
    assert active_parameters(QWEN_30B) == 3_353_032_704 == 48 * layer + 2 * 151936 * 2048 + 2048


def test_memory_of_a_mixture_by_hand() -> None:
    spread = plan_of(
        "parallel.tensor_model_parallel_size=2",
        "parallel.sequence_parallel=true",
        "parallel.expert_model_parallel_size=8",
    ).configured
    assert spread is not None and str(spread.layout) == "tp 2 pp 1 cp 1 dp 8 ep 8 sp"
    (memory,) = spread.memory
    experts = 48 * 16 * 3 * 2048 * 768  # 16 of 128, whole, with a copy on two ranks
    shared = 48 * (2048 * (2 * 4096 + 2 * 512) // 2 + 128 * 2048 + 2 * 2048 + 2 * 128)
    shared += 151936 // 2 * 2048 * 2 + 2048
    assert memory.weights == memory.reference == 2 * (experts + shared)
    assert memory.optimizer == 12 * (experts / 2 + shared / 8)
    # A token of 8 experts: 3 x 768 each, and a copy of its input for each.
    layer = layer_activation_bytes(QWEN_30B, PlannedLayout(), 1, 2)
    attention = 4 * 2048 + 3 * 4096 + 3 * 512
    assert layer == 2 * (attention + 8 * (3 * 768 + 2048)) + 4 * 32


def test_layouts_of_a_mixture() -> None:
    plan = plan_of(rollout=8)
    assert plan.best is not None and plan.best.layout.expert > 1
    sizes = {c.layout.expert for c in plan.candidates}
    assert sizes == {1, 2, 4, 8}
    for candidate in plan.candidates:
        assert candidate.layout.stage_gpus % candidate.layout.expert == 0
    console = Console(width=200)
    with console.capture() as capture:
        console.print(render(plan))
    assert "30.53 billion parameters (3.35 billion active)" in capture.get()
    best = f"parallel.expert_model_parallel_size={plan.best.layout.expert}"
    assert best in capture.get()


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (PlannedLayout(data=8, expert=3), "num_experts = 128 does not divide over .* = 3: choose"),
        (PlannedLayout(pipeline=4, data=2, expert=4), "= 4 does not divide the 2 GPUs of a pipe"),
        (PlannedLayout(tensor=2, data=4), "size = 2 would send every token .*sequence_parallel"),
        (PlannedLayout(tensor=2, data=4, expert=8, sequence_parallel=True), None),
    ],
)
def test_layout_of_a_mixture_that_cannot_work_says_why(
    layout: PlannedLayout, message: str | None
) -> None:
    problem = layout_problem(QWEN_30B, layout, 8, 8)
    if message is None:
        assert problem is None
    else:
        assert problem is not None and re.search(message, problem)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_config_json_of_a_mixture_is_read(tmp_path: Path, name: str) -> None:
    values = {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        name: 128,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    assert read_sizes(str(file)) == QWEN_30B
    file.write_text(json.dumps({**values, "decoder_sparse_step": 4, "mlp_only_layers": [3, 47]}))
    assert read_sizes(str(file)).expert_layers == (*range(7, 47, 4),)


def test_dense_models_use_all_their_parameters() -> None:
    for name, sizes in KNOWN_MODELS.items():
        is_dense = name != "qwen3-30b-a3b"
        assert (active_parameters(sizes) == model_parameters(sizes)) == is_dense
