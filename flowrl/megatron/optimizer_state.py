"""The optimiser's state by HF name, whatever the layout: what a checkpoint holds of it.

Names and values are those of flowrl.policy.optimizer.MasterAdamW.state_tensors, so a checkpoint of
any layout, one process included, continues under any other. Every call here is collective.
"""

# Megatron's getters of groups and optimisers are annotated with unions that it does not mean.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportOptionalMemberAccess=false, reportReturnType=false, reportCallIssue=false

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from safetensors import safe_open
from torch import Tensor

from flowrl.megatron.model import FlowModel
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.weights import (
    export_hf_weights,
    hf_names,
    load_hf_weights,
    own_parameters,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("master", *MOMENTS)


class Trained(Protocol):
    """A policy or a critic."""

    @property
    def chunks(self) -> list[DistributedDataParallel]: ...

    @property
    def optimizer(self) -> MegatronAdamW: ...


def policy_name(name: str) -> str:
    """The name in a checkpoint of one of the policy's parameters: its own."""
    return name


def _owner(optimizer: MegatronAdamW, parameter: torch.nn.Parameter) -> MegatronOptimizer:
    """The part of the chained optimiser that updates a parameter, on all data-parallel ranks."""
    for part in optimizer.optimizer.chained_optimizers:
        if isinstance(part, DistributedOptimizer):
            is_here = any(parameter in buffer.param_index_map for buffer in part.buffers)
        else:
            main = _main(parameter)
            is_here = any(main is x for group in part.param_groups for x in group["params"])
        if is_here:
            return part
    raise AssertionError("a parameter without an optimiser")


def _main(parameter: torch.nn.Parameter) -> Tensor:
    """The float32 master of a parameter that is not spread over data-parallel ranks."""
    return parameter.main_param if hasattr(parameter, "main_param") else parameter


def _own_part(
    owner: MegatronOptimizer, parameter: torch.nn.Parameter
) -> tuple[slice, Tensor] | None:
    """Which elements of the parameter this rank updates, with their float32 master; flat."""
    if not isinstance(owner, DistributedOptimizer):
        return slice(0, parameter.numel()), _main(parameter)
    if parameter not in owner.model_param_group_index_map:
        return None
    group, order = owner.model_param_group_index_map[parameter]
    span = owner._get_model_param_range_map(parameter)["param"]
    return slice(span.start, span.end), owner.optimizer.param_groups[group]["params"][order]


def _read(optimizer: MegatronAdamW, parameter: torch.nn.Parameter, kind: str) -> Tensor:
    """Master or moment of a parameter in its shape, from all ranks that hold some of it."""
    owner = _owner(optimizer, parameter)
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    part = _own_part(owner, parameter)
    if part is not None:
        span, main = part
        value = main if kind == "master" else owner.optimizer.state[main].get(kind)
        if value is not None:  # moments appear with the first update
            whole[span] = value.detach().float().flatten()
    if isinstance(owner, DistributedOptimizer):  # all but one rank add zero
        dist.all_reduce(whole, group=owner.data_parallel_group)
    return whole.view_as(parameter)


def _write(
    optimizer: MegatronAdamW, parameter: torch.nn.Parameter, kind: str, value: Tensor
) -> None:
    owner = _owner(optimizer, parameter)
    part = _own_part(owner, parameter)
    if part is None:
        return
    span, main = part
    mine = value.flatten()[span].view_as(main).to(main.device, torch.float32)
    if kind == "master":
        main.copy_(mine)
    else:
        owner.optimizer.state[main][kind] = mine.clone()


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether Adam keeps its update count in each parameter's state, as torch's does.

    The FusedAdam of Transformer Engine and of Apex, which Megatron prefers to torch's where it can
    import them, keep it in each group and never look at a parameter's.
    """
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _num_updates(optimizer: MegatronAdamW) -> int:
    """How often Adam was stepped, the same for every parameter."""
    own = 0
    for part in optimizer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if _counts_by_parameter(part.optimizer):
                counts = [part.optimizer.state[main].get("step", 0) for main in group["params"]]
            else:
                counts = [group.get("step", 0)]
            own = max([own, *map(int, counts)])
    count = torch.tensor([own], device=torch.cuda.current_device())
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return int(count)


def _set_num_updates(optimizer: MegatronAdamW, count: int) -> None:
    for part in optimizer.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if not _counts_by_parameter(part.optimizer):
                group["step"] = count
                continue
            for main in group["params"]:
                # A tensor for each: torch's Adam counts it up in place.
                part.optimizer.state[main]["step"] = torch.tensor(float(count))


def _from_last_stage(value: Tensor | None) -> Tensor:
    """Bring a tensor that the last pipeline stage holds to all stages."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        assert value is not None
        return value
    last, device = group.size() - 1, torch.cuda.current_device()
    shape: list[object] = [None if value is None else tuple(value.shape)]
    dist.broadcast_object_list(shape, group=group, group_src=last)
    if value is None:
        value = torch.empty(shape[0], device=device)  # pyright: ignore
    dist.broadcast(value, group=group, group_src=last)
    return value


def _models(trained: Trained) -> list[FlowModel]:
    modules = [chunk.module for chunk in trained.chunks]
    assert all(isinstance(module, FlowModel) for module in modules)
    return modules  # pyright: ignore[reportReturnType]


def training_shapes(trained: dict[str, torch.Size]) -> dict[str, torch.Size]:
    """Names and shapes of what `training_tensors` yields, from those of the parameters."""
    shapes = {f"{kind}.{name}": shape for kind in KINDS for name, shape in trained.items()}
    return shapes | {f"step.{name}": torch.Size() for name in trained}


def training_tensors(
    trained: Trained, rename: Callable[[str], str] = policy_name
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, float32 tensor) of masters, moments and update counts, one at a time.

    `rename` turns HF's names, `partition.*` and `value_head.*` into those of the checkpoint. Every
    rank must exhaust the iterator; every rank is given all tensors.
    """
    optimizer = trained.optimizer
    modules = _models(trained)
    names = []
    for kind in KINDS:

        def read(parameter: torch.nn.Parameter, kind: str = kind) -> Tensor:
            return _read(optimizer, parameter, kind)

        for name, tensor in export_hf_weights(modules, read=read, dtype=torch.float32):
            names += [rename(name)] if kind == "master" else []
            yield f"{kind}.{rename(name)}", tensor
    own = own_parameters(modules[-1])
    own_names: list[object] = [list(own)]
    group = parallel_state.get_pipeline_model_parallel_group()
    dist.broadcast_object_list(own_names, group=group, group_src=group.size() - 1)
    for name in own_names[0]:  # pyright: ignore
        names.append(rename(name))
        for kind in KINDS:
            value = _read(optimizer, own[name], kind) if name in own else None
            yield f"{kind}.{rename(name)}", _from_last_stage(value)
    count = float(_num_updates(optimizer))
    for name in names:
        yield f"step.{name}", torch.tensor(count)


@torch.no_grad()
def load_training_tensors(
    trained: Trained, path: Path, rename: Callable[[str], str] = policy_name
) -> None:
    """Take weights, masters, moments and counts from a file of `training_tensors`.

    Each rank reads what it holds; `checkpoint.check_tensors` sees to the file being whole.
    """
    optimizer = trained.optimizer
    modules = _models(trained)
    own = own_parameters(modules[-1])
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())
        needed = {rename(name) for name in hf_names(modules) | set(own)}

        def stored(kind: str) -> Iterator[tuple[str, Tensor]]:
            for name in sorted(hf_names(modules)):
                yield name, file.get_tensor(f"{kind}.{rename(name)}")

        has_moments = all(f"{kind}.{name}" in present for kind in MOMENTS for name in needed)
        for kind in KINDS if has_moments else KINDS[:1]:
            load_hf_weights(modules, stored(kind), write=_writer(optimizer, kind))
            for name, parameter in own.items():
                value = file.get_tensor(f"{kind}.{rename(name)}")
                _writer(optimizer, kind)(parameter, value)
        if has_moments:
            _set_num_updates(optimizer, int(file.get_tensor(f"step.{min(needed)}")))


def _writer(optimizer: MegatronAdamW, kind: str) -> Callable[[torch.nn.Parameter, Tensor], None]:
    def write(parameter: torch.nn.Parameter, value: Tensor) -> None:
        _write(optimizer, parameter, kind, value)
        if kind == "master":
            parameter.copy_(value)

    return write
