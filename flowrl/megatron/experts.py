"""Mixtures of experts: Megatron's own layer, and what its parameters must be marked with.

A rank of the expert-parallel group holds some experts of a layer, whole ones. Its tokens travel
to the ranks of the experts that the router chose, and the results back. The group's ranks are
those that hold different tokens, so tensor-parallel ranks under sequence parallelism, context-
and data-parallel ranks: all must pass through a layer equally often.
"""

import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

# Experts one after another, and Transformer Engine's grouped ones: `..local_experts.3.linear_fc1
# .weight` and `..linear_fc1.weight3` are both the fourth of the rank.
EXPERT = re.compile(r"(.*\.experts\.)(?:local_experts\.\d+\.)?(linear_fc[12]\.weight)\d*")


class Router(TopKRouter):
    """Megatron's choice of experts, without two functions of it."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits in the dtype of the states, as transformers rounds them, but in float32 or wider.

        Megatron rounds the softmax back to the dtype of the logits and, where it softmaxes first,
        chooses afterwards: in bfloat16 two logits would become one probability. Its own function
        fails without Transformer Engine.
        """
        logits = F.linear(input, self.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Nothing: only a router with a bias counts tokens, and Megatron compiles that."""


def local_moe_spec() -> ModuleSpec:
    """The layer without Transformer Engine: this rank's experts run one after another."""
    experts = ModuleSpec(
        module=SequentialMLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=Router))


def stacked_name(name: str) -> str | None:
    """The name under which a rank's experts are one tensor [experts, ...]; None for others.

    `mlp.experts.local_experts.3.linear_fc1.weight` -> `mlp.experts.linear_fc1.weight`
    """
    match = EXPERT.fullmatch(name)
    return None if match is None else match[1] + match[2]


def file_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What HF's files hold of a model's tensor: the experts of a layer one by one, others as is."""
    prefix, _, kind = name.rpartition(".experts.")
    if kind == "gate_up_proj":
        for index, fused in enumerate(tensor):
            gate, up = fused.chunk(2)
            yield f"{prefix}.experts.{index}.gate_proj.weight", gate
            yield f"{prefix}.experts.{index}.up_proj.weight", up
    elif kind == "down_proj":
        for index, down in enumerate(tensor):
            yield f"{prefix}.experts.{index}.down_proj.weight", down
    else:
        yield name, tensor


def mark_experts(model: torch.nn.Module) -> None:
    """Say that experts are reduced over the ranks that hold the same ones, and counted once each.

    Megatron reduces them with everything else when each rank has all experts, over data- and
    context-parallel ranks, and so would leave out the tokens of the other tensor-parallel ones.
    """
    for name, parameter in model.named_parameters():
        if stacked_name(name) is not None:
            parameter.allreduce = False  # pyright: ignore[reportAttributeAccessIssue]
            parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]
