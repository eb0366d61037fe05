"""`flowrl plan` against numbers worked out by hand, published sizes and bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowrl.cli import app
from flowrl.config import is_megatron, load_config
from flowrl.plan import Plan, make_plan
from flowrl.plan.hardware import GIB
from flowrl.plan.layout import PlannedLayout
from flowrl.plan.memory import (
    activation_bytes,
    chunks_in_flight,
    head_bytes,
    kv_bytes_per_token,
    layer_activation_bytes,
    logits_bytes,
)
from flowrl.plan.report import render
from flowrl.plan.search import layout_problem
from flowrl.plan.sizes import KNOWN_MODELS, model_parameters, read_sizes
from flowrl.plan.step_time import layer_flops, takes_old_logprobs
from flowrl.settings import Config

QWEN_7B = KNOWN_MODELS["qwen2.5-7b"]
NUM_7B = 7_615_616_512  # as published with the model
BASE = [
    "model.path=Qwen/Qwen2.5-7B",
    "data.task=sums",
    "data.train_batch_size=512",
    "data.max_response_length=8192",
    "rollout.max_num_seqs=64",
    "actor.ppo_mini_batch_size=128",
]


def config_of(*overrides: str) -> Config:
    return load_config(None, [*BASE, *overrides])


def plan_of(*overrides: str, gpus: int = 8, gpu: str = "h200", rollout: int = 0) -> Plan:
    return make_plan(config_of(*overrides), num_gpus=gpus, gpu=gpu, num_rollout_gpus=rollout)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", NUM_7B),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-3-8b", 8_030_261_248),
    ],
)
def test_known_models_have_their_published_size(name: str, count: int) -> None:
    assert model_parameters(KNOWN_MODELS[name]) == count


def test_memory_of_qwen_7b_by_hand() -> None:
    one = plan_of(
        "model.enable_gradient_checkpointing=true", "actor.strategy=torch", gpus=1
    ).configured
    assert one is not None and not one.fits
    memory = one.memory[0]
    assert memory.weights == memory.reference == 2 * NUM_7B
    assert memory.main_grads == 4 * NUM_7B
    assert memory.optimizer == 12 * NUM_7B
    num_z = 2 * (3584 * 3584 + 3 * 3584) + 3585
    assert memory.partition == 16 * num_z
    assert memory.engine_weights == memory.critic == 0
    # 28 layers, 4 key-value heads of 128, keys and values, 2 bytes; 64 sequences of 9216 tokens.
    assert memory.kv_cache == 28 * 4 * 128 * 2 * 2 * 64 * 9216
    assert memory.peak == memory.resident + max(memory.activations + memory.head, memory.kv_cache)


def test_memory_of_qwen_7b_on_eight_ranks_by_hand() -> None:
    spread = plan_of(
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        "parallel.sequence_parallel=true",
    ).configured
    assert spread is not None
    first, last = spread.memory
    # One layer by hand; all but 2 norms are halved, as is the table of 152064 x 3584.
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944 + (3584 + 2 * 512)
    num = 14 * (layer // 2 + 2 * 3584) + 152064 // 2 * 3584
    assert first.weights == 2 * num
    assert last.weights == 2 * (num + 3584)
    assert first.optimizer == 12 * num / 2  # two data-parallel ranks
    assert first.engine_weights == 2 * NUM_7B and last.engine_weights == 0
    assert first.kv_cache > 0 and last.kv_cache == 0
    assert first.head == first.partition == 0 and last.head > 0 and last.partition > 0
    num_z = 2 * (3584 * 3584 + 3 * 3584) + 3585
    assert last.partition == 8 * num_z + 8 * num_z / 2


def test_switches_of_memory() -> None:
    def memory(*overrides: str):
        candidate = plan_of(*overrides, gpus=2).configured
        assert candidate is not None
        return candidate.memory[0]

    spread, whole = memory(), memory("parallel.use_distributed_optimizer=false")
    assert whole.optimizer == 2 * spread.optimizer == 12 * NUM_7B
    assert memory("model.dtype=float32").optimizer == 8 * NUM_7B / 2
    assert memory("flow.log_z=none").partition == 0
    assert memory("algorithm.objective=grpo").partition == 0
    kept = memory("actor.memory_budget=10000000000").head - spread.head
    assert kept == 2 * 16384 * 152064 and memory("actor.memory_budget=1000").head == spread.head
    assert memory("ref.offload=true").reference == 0
    assert memory("algorithm.objective=grpo").reference == 0  # read for a KL penalty only
    assert memory("algorithm.objective=grpo", "actor.use_kl_loss=true").reference > 0
    alone = plan_of("ref.offload=true", gpus=1).configured
    assert alone is not None and alone.memory[0].reference == 0


def test_memory_of_a_critic_by_hand() -> None:
    table, value_head = 152064 * 3584, 3584 + 1
    one = plan_of("algorithm.objective=ppo", gpus=1).configured
    assert one is not None  # its model also has the output weight, which is not trained
    alone = 2 * NUM_7B + 16 * (NUM_7B - table) + 16 * value_head
    assert one.memory[0].critic == alone
    two = plan_of("algorithm.objective=ppo", gpus=2).configured
    assert two is not None  # two data-parallel ranks share the moments, and of weights the masters
    trunk = NUM_7B - table
    assert two.memory[0].critic == (2 + 4) * trunk + 12 * trunk / 2 + (8 + 8 / 2) * value_head
    staged = plan_of(
        "algorithm.objective=ppo", "parallel.pipeline_model_parallel_size=2", gpus=2
    ).configured
    policy = plan_of(
        "algorithm.objective=grpo", "parallel.pipeline_model_parallel_size=2", gpus=2
    ).configured
    assert staged is not None and policy is not None
    assert sum(memory.critic for memory in staged.memory) == 18 * trunk + 16 * value_head
    for with_critic, without in zip(staged.memory, policy.memory, strict=True):
        # Critic and policy train in turn, and the policy's head needs more.
        assert with_critic.peak == without.peak + with_critic.critic


def test_layer_activations_by_hand() -> None:
    # Per token: 4 H + 3 Q + 3 K + 3 F elements of 2 bytes, and 28 float32 log-sum-exps.
    elements = 4 * 3584 + 3 * 3584 + 3 * 512 + 3 * 18944
    assert layer_activation_bytes(QWEN_7B, PlannedLayout(), 10, 2) == 10 * (2 * elements + 4 * 28)
    tensor = PlannedLayout(tensor=4)
    shards = (3 * 3584 + 3 * 512 + 3 * 18944) // 4
    assert layer_activation_bytes(QWEN_7B, tensor, 10, 2) == 10 * (2 * (4 * 3584 + shards) + 4 * 7)
    both = PlannedLayout(tensor=4, sequence_parallel=True)
    assert layer_activation_bytes(QWEN_7B, both, 10, 2) == 10 * (2 * (3584 + shards) + 4 * 7)


def test_recompute_keeps_one_input_a_layer() -> None:
    def total(recompute: bool) -> float:
        return activation_bytes(QWEN_7B, PlannedLayout(recompute=recompute), 0, 100, 9, 2)

    layer = layer_activation_bytes(QWEN_7B, PlannedLayout(), 100, 2)
    assert total(False) - total(True) == 28 * (layer - 100 * 2 * 3584) - layer


@pytest.mark.parametrize(
    ("stages", "chunks", "stage", "num_micro_batches", "expected"),
    [
        (4, 1, 0, 16, 4),
        (4, 1, 3, 16, 1),
        (4, 1, 0, 2, 2),
        (4, 2, 0, 16, 2 * 4 + 3),  # p (1 + (p - 1) / (p v)) micro-batches of v chunks
        (4, 2, 3, 16, 5),
        (4, 2, 0, 4, 8),
    ],
)
def test_chunks_in_flight(
    stages: int, chunks: int, stage: int, num_micro_batches: int, expected: int
) -> None:
    layout = PlannedLayout(pipeline=stages, virtual_pipeline=chunks)
    assert chunks_in_flight(layout, stage, num_micro_batches) == expected


def test_head_by_hand() -> None:
    rows, tiles = 1000 * 3584, 4 * 1000 * 1188  # 152064 = 1188 * 128
    assert head_bytes(QWEN_7B, PlannedLayout(), 1000, 2) == 2 * rows + tiles + (
        4 * rows + 4 * rows + 128 * 2**20
    )
    assert logits_bytes(QWEN_7B, PlannedLayout(), 1000) == 8 * 1000 * 152064
    layout = PlannedLayout(tensor=8)
    shard = 152064 // 8
    # grad_hidden of both halves and their sums
    backward = 12 * rows + 128 * 2**20 + 2 * shard * 3584
    assert head_bytes(QWEN_7B, layout, 1000, 2) == 2 * rows + 4 * 1000 * 149 + backward
    # grad_hidden, again in place among all tokens, a half of that twice, and an eighth: the sums
    layout = PlannedLayout(tensor=8, sequence_parallel=True)
    backward = (4 + 4 + 2 * 2) * rows + rows // 2 + 128 * 2**20 + 2 * shard * 3584
    assert head_bytes(QWEN_7B, layout, 1000, 2) == 2 * rows + 4 * 1000 * 149 + backward
    assert kv_bytes_per_token(QWEN_7B, 2) == 57344


def test_flops_by_hand() -> None:
    # 6 FLOPs per parameter and token is forward and backward; a third of that forward.
    matrices, attention = layer_flops(QWEN_7B, 1000, 2048)
    num = 3584 * (2 * 3584 + 2 * 512 + 3 * 18944)
    assert matrices == 2 * num * 1000
    assert attention == 1000 * 2 * 2048 * 3584


def test_time_of_one_process_by_hand() -> None:
    plan = plan_of("data.max_prompt_length=1000", gpus=1)
    assert plan.configured is not None
    time = plan.configured.time
    tokens, rows, length = 4096 * 4596, 4096 * 4096, 500 + 4096
    matrices, attention = layer_flops(QWEN_7B, tokens, length)
    head = 2 * rows * 3584 * 152064
    peak = 0.4 * 989e12
    assert time.reference is not None
    assert time.reference.seconds == pytest.approx((28 * (matrices + attention) + head) / peak)
    update = 28 * (3 * matrices + 3.5 * attention) + 4 * head
    assert time.num_updates == 4
    assert 4 * time.update.seconds == pytest.approx(update / peak)
    assert time.old_logprobs == time.reference
    total = 2 * time.reference.seconds + 4 * time.update.seconds
    assert time.trainer_s == pytest.approx(total)
    assert time.update.communication_s == time.update.bubble == time.critic_s == 0
    ppo = plan_of("data.max_prompt_length=1000", "algorithm.objective=ppo", gpus=1).configured
    assert ppo is not None
    assert ppo.time.reference is None  # nothing reads it
    trunk = 28 * (4 * matrices + 4.5 * attention)
    assert ppo.time.critic_s == pytest.approx(trunk / peak)


def test_drop_mass_and_recompute_change_the_update() -> None:
    def seconds(*overrides: str) -> float:
        candidate = plan_of(*overrides, gpus=1).configured
        assert candidate is not None
        return candidate.time.update.seconds

    tokens, rows, peak = 1024 * 4608, 1024 * 4096, 0.4 * 989e12
    forward = 28 * sum(layer_flops(QWEN_7B, tokens, 4608)) / peak
    head = 2 * rows * 3584 * 152064 / peak
    extra = seconds("model.enable_gradient_checkpointing=true") - seconds()
    assert extra == pytest.approx(forward)
    assert seconds() - seconds("actor.drop_mass=0.002") == pytest.approx(0.95 * 3 * head)
    assert seconds() - seconds("actor.memory_budget=10000000000") == pytest.approx(head)
    assert seconds() == seconds("actor.memory_budget=100000000")  # too little: 16384 rows


def test_bubble_of_a_pipeline() -> None:
    def update(*overrides: str):
        candidate = plan_of("parallel.pipeline_model_parallel_size=4", *overrides).configured
        assert candidate is not None
        return candidate.time.update

    plain = update()
    num = plain.num_micro_batches  # 1024 sequences of 4608 tokens on 2 ranks, 16384 at once
    assert num == 144
    assert plain.bubble == pytest.approx(3 / (num + 3))
    interleaved = update("parallel.virtual_pipeline_model_parallel_size=7")
    assert interleaved.num_micro_batches == 144
    assert interleaved.bubble == pytest.approx(3 / 7 / (144 + 3 / 7))


def test_communication_by_hand() -> None:
    plan = plan_of(
        "parallel.tensor_model_parallel_size=2",
        "parallel.context_parallel_size=2",
        "model.enable_gradient_checkpointing=true",
        gpus=16,
    )
    assert plan.configured is not None
    update = plan.configured.time.update
    tokens = 1024 * 4608 / 4 / 2  # of one mini-batch on one rank: dp 4, cp 2
    link, network = 0.7 * 450e9, 0.7 * 50e9
    # Forward, recomputation and backward sum N H twice a layer; on two ranks a ring moves it once.
    sums = 28 * 3 * 2 * tokens * 3584 * 2 / link
    # Keys and values of the other context-parallel rank, three times, and their gradients.
    keys = 28 * 4 * 2 * 512 / 2 * tokens * 2 / link
    # dp 4 and cp 2 share gradients (4 bytes) and weights (2) between two nodes.
    num = plan.configured.memory[0].weights / 2
    reduction = num * 6 * 7 / 8 / network
    assert update.communication_s == pytest.approx(sums + keys + reduction)


def test_generation_on_the_main_rank_by_hand() -> None:
    plan = plan_of("data.max_prompt_length=1000", gpus=2)
    generation = plan.generation
    assert (generation.num_engines, generation.concurrency) == (1, 64)
    # 64 batches of 8 prompts, each as long as the limit; 1 ms for each of 28 layers is the most.
    prefill = 2 * NUM_7B * 512 * 500 / (0.4 * 989e12)
    assert generation.seconds == pytest.approx(64 * 8192 * 28e-3 + prefill)


def test_generation_on_its_own_gpus_by_hand() -> None:
    generation = plan_of("data.max_prompt_length=1000", gpus=16, rollout=8).generation
    assert (generation.num_engines, generation.concurrency) == (8, 64)
    num_bytes = 2 * NUM_7B + 64 * (500 + 2048) * 57344
    step = num_bytes / (0.7 * 4.8e12)
    prefill = 2 * NUM_7B * 64 * 500 / (0.4 * 989e12)
    assert generation.seconds == pytest.approx(512 / 64 * 4096 * step + prefill)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], True),  # four optimiser steps
        (["actor.ppo_mini_batch_size=512"], False),
        (["actor.ppo_mini_batch_size=512", "actor.ppo_epochs=2"], True),
        (["actor.ppo_mini_batch_size=512", "flow.log_z=vargrad"], True),
        (["flow.old_logprobs=rollout"], False),
        (["actor.ppo_mini_batch_size=512", "algorithm.objective=grpo"], False),
        (
            ["actor.ppo_mini_batch_size=512", "algorithm.rollout_correction.rollout_rs=token"],
            True,
        ),
    ],
)
def test_old_logprobs_are_taken_when_the_loop_does(overrides: list[str], expected: bool) -> None:
    assert takes_old_logprobs(config_of(*overrides)) is expected


def test_search_ranks_layouts_that_fit() -> None:
    plan = plan_of(gpus=16, rollout=8)
    assert plan.best is not None and plan.best.fits
    fitting = [c for c in plan.candidates if c.fits]
    assert fitting == plan.candidates[: len(fitting)]
    seconds = [c.time.trainer_s for c in fitting]
    assert seconds == sorted(seconds)
    layouts = [c.layout for c in plan.candidates] + [x for y in plan.reasons.values() for x in y]
    assert len(layouts) == 20  # ways to write 8 as an ordered product of tp, pp, cp and dp
    assert all(layout.num_gpus == 8 for layout in layouts)
    assert [s.step_s for s in plan.splits] == sorted(s.step_s for s in plan.splits)
    # No layout divides 28 layers or 28 heads by 8.
    assert all(max(c.layout.tensor, c.layout.pipeline) < 8 for c in plan.candidates)


def test_recompute_is_tried_where_it_is_needed() -> None:
    layouts = {c.layout for c in plan_of(gpus=16, rollout=8).candidates}
    assert PlannedLayout(1, 1, 1, 8, recompute=True) in layouts
    assert PlannedLayout(2, 1, 1, 4, sequence_parallel=True) in layouts


def test_large_engines_take_several_gpus() -> None:
    plan = plan_of("model.path=qwen2.5-32b", gpus=32, gpu="h100", rollout=8)
    # 65.5 GB of weights are to take half of 0.9 * 85 GB a GPU.
    assert (plan.generation.gpus_per_engine, plan.generation.num_engines) == (2, 4)
    assert plan.configured is not None and plan.configured.memory[0].engine_weights == 0
    with pytest.raises(ValueError, match="--rollout-gpus 1: .* needs 2 H100"):
        plan_of("model.path=qwen2.5-32b", gpus=32, gpu="h100", rollout=1)


@pytest.mark.parametrize(
    ("layout", "num_gpus", "message"),
    [
        (PlannedLayout(tensor=3), 8, "8 GPUs are no multiple of .* 3: choose"),
        (PlannedLayout(tensor=16), 16, "tensor_model_parallel_size = 16 spans nodes of 8"),
        (PlannedLayout(tensor=8), 8, "num_attention_heads = 28 .* tensor = 8: choose"),
        (PlannedLayout(pipeline=8), 8, "num_hidden_layers = 28 .* = 8: choose a divisor"),
        (PlannedLayout(data=8, virtual_pipeline=2), 8, "parallel_size = 2 interleaves"),
        (PlannedLayout(data=8, sequence_parallel=True), 8, "sequence_parallel = true shards"),
        (PlannedLayout(tensor=4, data=2), 8, None),
    ],
)
def test_layout_that_cannot_work_says_why(
    layout: PlannedLayout, num_gpus: int, message: str | None
) -> None:
    problem = layout_problem(QWEN_7B, layout, num_gpus, 8)
    if message is None:
        assert problem is None
    else:
        assert problem is not None and re.search(message, problem)


@pytest.mark.parametrize(
    ("overrides", "gpus", "message"),
    [
        (["actor.strategy=torch"], 8, "trains on one GPU, not on 8"),
        (["parallel.expert_model_parallel_size=2"], 8, "expert_model_parallel_size = 2"),
        (["parallel.tensor_model_parallel_size=4"], 6, "6 GPUs are no multiple"),
    ],
)
def test_configuration_that_cannot_work_says_why(
    overrides: list[str], gpus: int, message: str
) -> None:
    plan = plan_of(*overrides, gpus=gpus)
    assert plan.configured is None and plan.problem is not None and message in plan.problem


def test_experts_alone_choose_megatron_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU but two expert-parallel ranks: the memory would be that of one process."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    overrides = ["model.path=Qwen/Qwen3-30B-A3B", "parallel.expert_model_parallel_size=2"]
    assert is_megatron(load_config(None, ["data.task=sums", *overrides]))
    assert plan_of(*overrides, gpus=1).setting.is_megatron
    assert not plan_of(overrides[0], gpus=1).setting.is_megatron


def test_configuration_that_does_not_fit_says_what_helps() -> None:
    plan = plan_of(gpus=1, gpu="h100")
    assert plan.configured is not None and plan.best is None and plan.problem is not None
    assert "GiB of 72.9 GiB" in plan.problem
    assert "enable_gradient_checkpointing=true" in plan.problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_gpus": 0}, "--gpus 0: give at least 1"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0"),
        ({"gpu": "v100"}, "--gpu v100: choose one of a100-80, h100"),
        ({"num_rollout_gpus": 8}, "--rollout-gpus 8 of --gpus 8: leave"),
        ({"num_rollout_gpus": -1}, "--rollout-gpus -1 of"),
        ({"mfu": 0.0}, "--mfu 0: give a share"),
        ({"response_tokens": 9000.0}, "--response-length 9000: .*max_response_length = 8192"),
    ],
)
def test_bad_numbers_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(config_of(), **{"num_gpus": 8, "gpu": "h200", **arguments})


def test_config_json_is_read(tmp_path: Path) -> None:
    values = {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    assert read_sizes(str(tmp_path)) == read_sizes(str(file)) == QWEN_7B


def test_names_have_owners_and_suffixes() -> None:
    assert read_sizes("Qwen/Qwen2.5-7B-Instruct") == QWEN_7B
    assert read_sizes("meta-llama/Meta-Llama-3-8B") == KNOWN_MODELS["llama-3-8b"]
    small = read_sizes("builtin:smollm2-135m-instruct")
    assert small == KNOWN_MODELS["smollm2-135m"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "mixtral"}', "model_type = 'mixtral', but the plan knows"),
        ('{"model_type": "llama"}', "num_attention_heads = None, but a positive integer"),
        ('{"model_type": "llama", "attention_bias": true}', "attention_bias = true"),
        ("[]", "it holds a list"),
        ("{", "is no model configuration"),
    ],
)
def test_bad_config_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sizes(str(tmp_path))


def test_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model.path = gpt-5 is no folder .*\(smollm2-135m, "):
        read_sizes("gpt-5")


def test_command_prints_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: {task: sums}\nmodel: {path: qwen2.5-7b}\n")
    arguments = ["plan", str(file), "parallel.tensor_model_parallel_size=2", "--gpus", "8"]
    result = CliRunner().invoke(app, [*arguments, "--gpu", "h200"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    memory = plan_of(
        "parallel.tensor_model_parallel_size=2",
        "data.train_batch_size=64",
        "actor.ppo_mini_batch_size=64",
        "data.max_response_length=1024",
        "rollout.max_num_seqs=256",
    )
    assert memory.configured is not None
    for part in (
        "7.62 billion parameters",
        f"{memory.configured.peak / GIB:.2f}",
        "Recommended: parallel.tensor_model_parallel_size=",
        "estimate",
        "trainer at 40% of 989 TFLOP/s",
    ):
        assert part in result.output
    assert render(memory) is not None


def test_plan_does_not_import_torch() -> None:
    code = "import sys, flowrl.plan.report, flowrl.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
