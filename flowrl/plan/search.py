"""Which layouts work, which fit, and which is the fastest by the estimates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flowrl.plan.hardware import GIB
from flowrl.plan.layout import PlannedLayout
from flowrl.plan.memory import USABLE_SHARE, Memory, stage_memory
from flowrl.plan.sizes import ModelSizes
from flowrl.plan.step_time import StepTime, Workload, step_time
from flowrl.settings import Config


def layout_problem(
    sizes: ModelSizes, layout: PlannedLayout, num_gpus: int, gpus_per_node: int
) -> str | None:
    """Why a layout cannot work, with the value and the remedy; None when it can."""
    tensor, pipeline = layout.tensor, layout.pipeline
    if layout.num_gpus != num_gpus:
        model_size = tensor * pipeline * layout.context
        return (
            f"{num_gpus} GPUs are no multiple of tensor * pipeline * context = {tensor} * "
            f"{pipeline} * {layout.context} = {model_size}: choose sizes whose product divides them"
        )
    if tensor > gpus_per_node:
        return (
            f"parallel.tensor_model_parallel_size = {tensor} spans nodes of {gpus_per_node} GPUs, "
            "whose network is too slow for it: use pipeline parallelism between nodes"
        )
    if layout.virtual_pipeline > 1 and pipeline == 1:
        return (
            f"parallel.virtual_pipeline_model_parallel_size = {layout.virtual_pipeline} "
            "interleaves stages, but there is one: raise "
            "parallel.pipeline_model_parallel_size, or set it to 1"
        )
    if layout.sequence_parallel and tensor == 1:
        return (
            "parallel.sequence_parallel = true shards over tensor-parallel ranks, but there is "
            "one: raise parallel.tensor_model_parallel_size, or set it to false"
        )
    problem = _expert_problem(sizes, layout)
    if problem is not None:
        return problem
    divisions = (
        ("num_attention_heads", sizes.num_attention_heads, tensor, "tensor"),
        ("intermediate_size", sizes.intermediate_size, tensor, "tensor"),
        (
            "num_hidden_layers",
            sizes.num_hidden_layers,
            pipeline * layout.virtual_pipeline,
            "pipeline * virtual_pipeline",
        ),
    )
    for name, value, parts, axis in divisions:
        if value % parts:
            return f"{name} = {value} does not divide over {axis} = {parts}: choose a divisor"
    groups = sizes.num_key_value_heads
    if groups % tensor and tensor % groups:
        return (
            f"num_key_value_heads = {groups} does not divide over tensor = {tensor}: "
            "choose a divisor or a multiple"
        )
    if -(-sizes.vocab_size // tensor) * (tensor - 1) >= sizes.vocab_size:
        return (
            f"vocab_size = {sizes.vocab_size} leaves the last of tensor = {tensor} ranks without "
            "a row: choose a smaller tensor"
        )
    return None


def _expert_problem(sizes: ModelSizes, layout: PlannedLayout) -> str | None:
    """Why the experts, or the lack of them, do not go with a layout."""
    key = f"parallel.expert_model_parallel_size = {layout.expert}"
    if not sizes.expert_layers:
        return None if layout.expert == 1 else f"{key}, but the model has no experts: set it to 1"
    if sizes.num_experts % layout.expert:
        return f"num_experts = {sizes.num_experts} does not divide over {key}: choose a divisor"
    if layout.stage_gpus % layout.expert:
        return (
            f"{key} does not divide the {layout.stage_gpus} GPUs of a pipeline stage: choose a "
            "divisor of tensor * context * data"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        return (
            f"parallel.tensor_model_parallel_size = {layout.tensor} would send every token to its "
            "experts once per rank: set parallel.sequence_parallel = true"
        )
    return None


@dataclass(frozen=True)
class Candidate:
    """A layout that works, with what it takes."""

    layout: PlannedLayout
    memory: list[Memory]  # of the first and, with several stages, of the last one
    time: StepTime
    fits: bool

    @property
    def peak(self) -> float:
        return max(memory.peak for memory in self.memory)


@dataclass(frozen=True)
class Setting:
    """What all candidates have in common."""

    config: Config
    sizes: ModelSizes
    workload: Workload
    num_gpus: int  # that train
    is_separate: bool  # other GPUs generate
    is_megatron: bool


def evaluate(setting: Setting, layout: PlannedLayout) -> Candidate:
    """Memory and time of a layout that has no problem."""
    config, sizes = setting.config, setting.sizes
    time = step_time(config, sizes, layout, setting.workload, setting.is_separate)
    # Stages in between have no embedding and fewer micro-batches in flight than the first.
    memory = [
        stage_memory(
            config,
            sizes,
            layout,
            stage,
            time.update.num_micro_batches,
            has_own_engine=stage == 0 and not setting.is_separate,
            is_megatron=setting.is_megatron,
        )
        for stage in sorted({0, layout.pipeline - 1})
    ]
    usable = USABLE_SHARE * setting.workload.gpu.memory_bytes
    return Candidate(layout, memory, time, all(m.peak <= usable for m in memory))


def problem_of(setting: Setting, layout: PlannedLayout) -> str | None:
    """Why a layout cannot run here, or None."""
    config, num_gpus = setting.config, setting.num_gpus
    if num_gpus > 1 and not setting.is_megatron:
        return (
            f"actor.strategy = torch trains on one GPU, not on {num_gpus}: use "
            "actor.strategy=megatron, or leave the other GPUs to --rollout-gpus"
        )
    sequences = config.actor.ppo_mini_batch_size * config.rollout.n
    if layout.data > sequences:
        return (
            f"dp {layout.data} ranks for {sequences} sequences of a mini-batch: raise "
            "actor.ppo_mini_batch_size, or use fewer GPUs"
        )
    return layout_problem(setting.sizes, layout, num_gpus, setting.workload.gpus_per_node)


def _powers_of_two(limit: int) -> Iterator[int]:
    value = 1
    while value <= limit:
        yield value
        value *= 2


def _expert_sizes(sizes: ModelSizes, layout: PlannedLayout) -> list[int]:
    """Powers of two that divide the experts and the GPUs of a stage; 1 without experts."""
    common = math.gcd(sizes.num_experts, layout.stage_gpus) if sizes.expert_layers else 1
    return [size for size in _powers_of_two(common) if common % size == 0]


def search(setting: Setting) -> tuple[list[Candidate], dict[str, list[PlannedLayout]]]:
    """All layouts over powers of two: those that work, fastest first, and why others do not.

    Tensor parallelism brings sequence parallelism along. Recomputation is tried where a layout
    does not fit without it.
    """
    num_gpus, candidates = setting.num_gpus, []
    reasons: dict[str, list[PlannedLayout]] = {}
    for tensor in _powers_of_two(num_gpus):
        for pipeline in _powers_of_two(num_gpus // tensor):
            for context in _powers_of_two(num_gpus // (tensor * pipeline)):
                layout = PlannedLayout(
                    tensor,
                    pipeline,
                    context,
                    max(1, num_gpus // (tensor * pipeline * context)),
                    sequence_parallel=tensor > 1,
                )
                problem = problem_of(setting, layout)
                if problem is not None:
                    reasons.setdefault(problem, []).append(layout)
                    continue
                for expert in _expert_sizes(setting.sizes, layout):
                    candidate = evaluate(setting, replace(layout, expert=expert))
                    if not candidate.fits:
                        candidate = evaluate(setting, replace(candidate.layout, recompute=True))
                    candidates.append(candidate)
    # Of equally fast ones, the one with less memory.
    candidates.sort(key=lambda c: (not c.fits, c.time.trainer_s if c.fits else 0.0, c.peak))
    return candidates, reasons


def too_large(setting: Setting, candidate: Candidate) -> str:
    """Why a candidate does not fit, and what helps."""
    usable = USABLE_SHARE * setting.workload.gpu.memory_bytes
    worst = max(candidate.memory, key=lambda memory: memory.peak)
    remedies = []
    if worst.kv_cache > worst.activations + worst.head:
        remedies.append("lower rollout.max_num_seqs")
    else:
        remedies.append("lower actor.ppo_max_token_len_per_gpu")
        if not candidate.layout.recompute:
            remedies.append("set model.enable_gradient_checkpointing=true")
    if worst.engine_weights > 0:
        remedies.append("leave GPUs to generation (--rollout-gpus)")
    if worst.resident > usable / 2:
        axes = "tensor, pipeline or expert" if setting.sizes.expert_layers else "tensor or pipeline"
        remedies.append(f"use more GPUs, or a larger {axes} size")
    return (
        f"{candidate.layout} needs {worst.peak / GIB:.1f} GiB of {usable / GIB:.1f} GiB: "
        + ", or ".join(remedies)
    )
