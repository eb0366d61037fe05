"""The rows of the table of docs/parallel_equality.md: what is trained, and over which ranks."""

from dataclasses import dataclass

import torch
from harness import run_ranks
from parallel_cases import Case, Spread, errors, on_ranks, one_process

from flowrl.megatron.layout import Layout

# Largest error of a quantity, in the Euclidean norm and relative to its own. Float32 against one
# process in float64, whose own float32 loses up to 6e-6; Adam divides by the gradient's square
# root, so the weights inherit its error. In float64 the gradients still gather in float32.
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-7}

LAYOUTS = {
    "one rank": Spread(1),
    "TP2": Spread(2, Layout(tensor=2)),
    "TP2 SP": Spread(2, Layout(tensor=2, sequence_parallel=True)),
    "PP2": Spread(2, Layout(pipeline=2)),
    "PP2 VPP2": Spread(2, Layout(pipeline=2, virtual_pipeline=2)),
    "CP2": Spread(2, Layout(context=2)),
    "DP2": Spread(2),
    "TP2 PP2": Spread(4, Layout(tensor=2, pipeline=2)),
    "TP2 SP PP2": Spread(4, Layout(tensor=2, pipeline=2, sequence_parallel=True)),
    "TP2 CP2": Spread(4, Layout(tensor=2, context=2)),
    "TP2 SP CP2": Spread(4, Layout(tensor=2, context=2, sequence_parallel=True)),
    "TP2 DP2": Spread(4, Layout(tensor=2)),
    "CP2 DP2": Spread(4, Layout(context=2)),
    "PP2 CP2": Spread(4, Layout(pipeline=2, context=2)),
}
# EP ranks are taken from those of TP, CP and DP.
EXPERT_LAYOUTS = {
    "one rank": Spread(1),
    "DP2": Spread(2),
    "DP2 EP2": Spread(2, Layout(expert=2)),
    "TP2 SP": Spread(2, Layout(tensor=2, sequence_parallel=True)),
    "TP2 SP EP2": Spread(2, Layout(tensor=2, expert=2, sequence_parallel=True)),
    "CP2 EP2": Spread(2, Layout(context=2, expert=2)),
    "DP4 EP2": Spread(4, Layout(expert=2)),
    "TP2 SP DP2 EP4": Spread(4, Layout(tensor=2, expert=4, sequence_parallel=True)),
    "PP2 DP2 EP2": Spread(4, Layout(pipeline=2, expert=2)),
    "PP2 VPP2 DP2 EP2": Spread(4, Layout(pipeline=2, virtual_pipeline=2, expert=2)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    training: str
    layout: str
    case: Case
    spread: Spread

    @property
    def name(self) -> str:
        return f"{self.model}, {self.training}, {self.layout}"


def _rows() -> list[Row]:
    rows = [Row("Llama", "FlowRL", layout, Case(), spread) for layout, spread in LAYOUTS.items()]

    def add(model: str, training: str, case: Case, *layouts: str, suffix: str = "", **spread):
        for layout in layouts:
            known = EXPERT_LAYOUTS if case.kind.startswith("qwen3_moe") else LAYOUTS
            place = Spread(**{**vars(known[layout]), **spread})
            rows.append(Row(model, training, layout + suffix, case, place))

    add("Llama tied", "FlowRL", Case(tied=True), "TP2 SP", "PP2", "TP2 SP PP2", "CP2 DP2")
    add("Qwen2 tied", "FlowRL", Case("qwen2", tied=True), "TP2", "PP2 VPP2", "TP2 SP CP2")
    add("Qwen3", "FlowRL", Case("qwen3"), "TP2 SP", "CP2", "TP2 PP2")
    calm = Case(detach_z=True, pooling="all", entropy_coeff=0.0)
    add("Llama", "FlowRL, Z detached", calm, "TP2 SP", "CP2", "PP2 VPP2")
    add("Llama", "FlowRL, VarGrad", Case(has_partition=False), "TP2 CP2")
    token = Case(objective="grpo", has_partition=False)
    add("Llama", "GRPO, token mean", token, "TP2 SP", "CP2 DP2", "PP2 VPP2")
    add("Llama", "GSPO", Case(objective="gspo", has_partition=False), "TP2 SP CP2")
    fixed = Case(objective="constant", has_partition=False)
    add("Llama", "GRPO, constant divisor", fixed, "CP2 DP2", "PP2 VPP2")
    # With one sample a data-parallel rank trains on nothing, and most micro-batches are empty.
    single = Case(num_samples=1)
    add("Llama", "FlowRL, one sample", single, "DP2", "PP2 VPP2", "TP2 SP CP2")
    add("Llama", "FlowRL", Case(), "TP2 SP", suffix=", recompute", recompute="full")
    overlap = {"overlap_grad_reduce": True, "suffix": ", overlapped"}
    add("Llama tied", "FlowRL", Case(tied=True), "DP2", "PP2 VPP2", **overlap)
    spread_state = {"distributed_optimizer": True, "suffix": ", distributed optimiser"}
    add("Llama tied", "FlowRL", Case(tied=True), "DP2", "TP2 CP2", **spread_state)
    gather = {"overlap_grad_reduce": True, "overlap_param_gather": True, **spread_state}
    gather["suffix"] = ", distributed optimiser, all overlapped"
    add("Llama tied", "FlowRL", Case(tied=True), "DP2", **gather)
    experts = Case("qwen3_moe")
    add("Qwen3-MoE", "FlowRL", experts, *EXPERT_LAYOUTS)
    add("Qwen3-MoE", "FlowRL, one sample", Case("qwen3_moe", num_samples=1), "DP2 EP2")
    late = Case("qwen3_moe_late", objective="grpo", has_partition=False)
    add("Qwen3-MoE, first half dense", "GRPO, token mean", late, "PP2 DP2 EP2", **spread_state)
    add("Qwen3-MoE", "FlowRL", experts, "DP4 EP2", **gather)
    add("Qwen3-MoE", "FlowRL", experts, "TP2 SP EP2", suffix=", recompute", recompute="full")
    exact = Case(dtype=torch.float64, num_steps=0)
    add("Llama float64", "FlowRL", exact, "TP2 SP", "PP2 VPP2", "TP2 SP CP2", "CP2 DP2")
    return rows


ROWS = _rows()


def measure(row: Row, sabotage=None) -> dict[str, float]:
    """The errors of one row; `sabotage` runs on every rank before the first step."""
    truth = one_process(Case(**{**vars(row.case), "dtype": torch.float64}))
    outcomes = run_ranks(row.spread.num_ranks, on_ranks, row.case, row.spread, sabotage)
    table = errors(outcomes, truth)
    if row.spread.distributed_optimizer:
        # A rank's main_grad is then whole only in the part that it updates.
        table = {name: value for name, value in table.items() if "gradients" not in name}
    return table
