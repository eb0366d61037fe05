"""Prints a plan with rich."""

from dataclasses import replace

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from flowrl.plan import Plan
from flowrl.plan.hardware import GIB
from flowrl.plan.memory import (
    USABLE_SHARE,
    activation_bytes,
    element_bytes,
    logits_bytes,
)
from flowrl.plan.search import Candidate, too_large
from flowrl.plan.sizes import active_parameters, model_parameters
from flowrl.plan.step_time import ENGINE_MEMORY_SHARE, PassTime, assumptions

NUM_LAYOUTS = 8  # that are shown
NUM_SPLITS = 4
ROWS = {
    "weights": "weights",
    "main_grads": "main gradients (float32)",
    "optimizer": "optimiser (master, moments)",
    "partition": "Z (weights, gradients, optimiser)",
    "reference": "reference weights",
    "critic": "critic (weights to optimiser)",
    "engine_weights": "engine's weights",
    "activations": "activations, estimate",
    "head": "head without logits, estimate",
    "kv_cache": "KV cache (only while generating)",
}


def render(plan: Plan) -> Group:
    """The report for a rich console."""
    parts: list[RenderableType] = [_title(plan)]
    if plan.problem is not None:
        verb = "cannot work" if plan.configured is None else "does not fit"
        parts.append(Text(f"the configured layout {verb}: {plan.problem}", style="red"))
    if plan.configured is not None:
        parts += [_memory_table(plan, plan.configured), _time_table(plan, plan.configured)]
    parts += [_layout_table(plan)] if plan.best is not None else []
    parts += _list("Layouts that do not work", _refusals(plan))
    parts += [_split_table(plan)] if plan.splits else []
    parts.append(_recommendation(plan))
    lines = assumptions(plan.setting.config, plan.setting.workload, plan.setting.is_separate)
    if plan.setting.is_separate:
        lines.append(
            f"engines are {plan.generation.num_engines} x `flowrl serve` with "
            f"rollout.tensor_model_parallel_size={plan.generation.gpus_per_engine} "
            f"rollout.gpu_memory_utilization={ENGINE_MEMORY_SHARE}; training has "
            "rollout.engine=vllm and their URLs in rollout.servers"
        )
    return Group(*parts, *_list("Assumptions", lines))


def _list(title: str, lines: list[str]) -> list[RenderableType]:
    items = [Padding(Text(line), (0, 0, 0, 2)) for line in lines]
    return [Text(title), *items] if items else []


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.2f}"


def _title(plan: Plan) -> Text:
    setting = plan.setting
    trainer = "Megatron" if setting.is_megatron else "one process"
    size = f"{model_parameters(setting.sizes) / 1e9:.2f} billion parameters"
    if setting.sizes.expert_layers:
        size += f" ({active_parameters(setting.sizes) / 1e9:.2f} billion active)"
    return Text(
        f"{setting.config.model.path}: {size}, {setting.config.model.dtype}; {trainer} trains on "
        f"{setting.num_gpus} x {setting.workload.gpu.name}: {plan.layout}"
    )


def _memory_table(plan: Plan, candidate: Candidate) -> Table:
    names = ["first stage" if len(candidate.memory) > 1 else "each GPU", "last stage"]
    if candidate.memory[0].engine_weights:
        names[0] = "main rank"
    columns = [Column(name, justify="right") for name in names[: len(candidate.memory)]]
    table = Table("GiB", *columns, title="Memory", title_justify="left", box=SIMPLE_HEAD)
    for field, name in ROWS.items():
        values = [getattr(memory, field) for memory in candidate.memory]
        if any(values):
            table.add_row(name, *map(_gib, values))
    table.add_section()
    table.add_row("peak", *(_gib(memory.peak) for memory in candidate.memory), style="bold")
    usable = USABLE_SHARE * plan.setting.workload.gpu.memory_bytes
    table.add_row("usable", *[_gib(usable)] * len(columns))
    table.add_section()
    config, sizes, layout = plan.setting.config, plan.setting.sizes, candidate.layout
    num_tokens = config.actor.ppo_max_token_len_per_gpu
    logits = [0.0] * len(columns)
    logits[-1] = logits_bytes(sizes, layout, num_tokens)
    table.add_row("not needed: logits (float32, and gradient)", *map(_gib, logits), style="dim")
    for stage_name, is_on in (("without", False), ("with", True)):
        values = [
            activation_bytes(
                sizes,
                replace(layout, recompute=is_on),
                stage,
                num_tokens,
                candidate.time.update.num_micro_batches,
                element_bytes(config),
            )
            for stage in sorted({0, layout.pipeline - 1})
        ]
        table.add_row(f"activations {stage_name} recompute", *map(_gib, values), style="dim")
    return table


def _time_table(plan: Plan, candidate: Candidate) -> Table:
    time, generation = candidate.time, plan.generation
    table = Table(
        "Phase",
        Column("seconds", justify="right"),
        "of which",
        title="Time of a step, estimate",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_row(
        "generation",
        f"{generation.seconds:.1f}",
        f"{generation.num_engines} engine(s) of {generation.gpus_per_engine} GPU(s), "
        f"{generation.concurrency} sequences at once",
    )
    if time.reference is not None:
        table.add_row(
            "reference log-probs", f"{time.reference.seconds:.1f}", _detail(time.reference)
        )
    if time.old_logprobs is not None:
        table.add_row(
            "old log-probs", f"{time.old_logprobs.seconds:.1f}", _detail(time.old_logprobs)
        )
    table.add_row(
        f"update ({time.num_updates} optimiser steps)",
        f"{time.num_updates * time.update.seconds:.1f}",
        _detail(time.update),
    )
    if time.critic_s:
        table.add_row("critic", f"{time.critic_s:.1f}", "values and update")
    if time.publish_s:
        table.add_row("weights to the engine", f"{time.publish_s:.1f}", "")
    table.add_section()
    table.add_row("step", f"{generation.seconds + time.trainer_s:.1f}", "", style="bold")
    return table


def _detail(one: PassTime) -> str:
    text = f"{one.num_micro_batches} micro-batches a rank"
    if one.bubble:
        text += f", {one.bubble:.0%} pipeline bubble"
    if one.communication_s:
        text += f", {one.communication_s / one.seconds:.0%} communication"
    return text


def _layout_table(plan: Plan) -> Table:
    right = [Column(name, justify="right") for name in ("peak GiB", "trainer s", "bubble")]
    table = Table(
        "Layout", *right, title="Layouts that fit, by time", title_justify="left", box=SIMPLE_HEAD
    )
    for candidate in [c for c in plan.candidates if c.fits][:NUM_LAYOUTS]:
        table.add_row(
            str(candidate.layout),
            _gib(candidate.peak),
            f"{candidate.time.trainer_s:.1f}",
            f"{candidate.time.update.bubble:.0%}",
        )
    return table


def _refusals(plan: Plan) -> list[str]:
    lines = []
    for reason, layouts in plan.reasons.items():
        others = f" and {len(layouts) - 1} more" if len(layouts) > 1 else ""
        lines.append(f"{layouts[0]}{others}: {reason}")
    misfits = [c for c in plan.candidates if not c.fits]
    if misfits:
        nearest = too_large(plan.setting, misfits[0])
        lines.append(f"{len(misfits)} are too large, the least of them: {nearest}")
    return lines


def _split_table(plan: Plan) -> Table:
    right = [Column(name, justify="right") for name in ("generation s", "trainer s", "step s")]
    table = Table(
        Column("generate", justify="right"),
        "the others train",
        *right,
        title="Splits of the GPUs, by time",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for split in plan.splits[:NUM_SPLITS]:
        table.add_row(
            str(split.num_rollout_gpus),
            str(split.best.layout),
            f"{split.generation.seconds:.1f}",
            f"{split.best.time.trainer_s:.1f}",
            f"{split.step_s:.1f}",
        )
    return table


def _recommendation(plan: Plan) -> Text:
    best = plan.best
    if best is None:
        return Text("No layout fits: see the remedies above.", style="red")
    layout = best.layout
    settings = {
        "parallel.tensor_model_parallel_size": layout.tensor,
        "parallel.pipeline_model_parallel_size": layout.pipeline,
        "parallel.context_parallel_size": layout.context,
        "parallel.virtual_pipeline_model_parallel_size": layout.virtual_pipeline,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "model.enable_gradient_checkpointing": str(layout.recompute).lower(),
    }
    if layout.expert > 1:
        settings["parallel.expert_model_parallel_size"] = layout.expert
    text = "Recommended: " + " ".join(f"{key}={value}" for key, value in settings.items())
    return Text(text, style="green")
