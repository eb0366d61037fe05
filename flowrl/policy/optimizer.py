"""AdamW over float32 master weights, whatever dtype the policy computes in.

A bfloat16 parameter gets a float32 master and a float32 gradient buffer: each micro-batch's
gradient is added there as soon as autograd has it, because summing many micro-batches in
bfloat16 (8 bits) loses them. A float32 parameter is its own master.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParamGroup:
    """Named parameters that share a peak learning rate."""

    parameters: list[tuple[str, nn.Parameter]]
    lr: float


class MasterAdamW:
    """AdamW (arXiv 1711.05101) with linear warm-up to a constant rate and a gradient-norm limit.

    Norm scales and biases (one-dimensional parameters) are not decayed.
    """

    def __init__(
        self,
        groups: Iterable[ParamGroup],
        *,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int,
        max_grad_norm: float,
    ):
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, Tensor] = {}
        self.main_grads: dict[nn.Parameter, Tensor] = {}  # float32; ops may add to them directly
        torch_groups = []
        for group in groups:
            for name, parameter in group.parameters:
                self._add(name, parameter)
            matrices = [n for n, p in group.parameters if p.ndim > 1]
            vectors = [n for n, p in group.parameters if p.ndim <= 1]
            for names, decay in ((matrices, weight_decay), (vectors, 0.0)):
                torch_groups.append(
                    {
                        "params": [self.masters[name] for name in names],
                        "peak_lr": group.lr,
                        "lr": group.lr,
                        "weight_decay": decay,
                    }
                )
        torch_groups = [g for g in torch_groups if g["params"]]
        self.adamw = torch.optim.AdamW(torch_groups, betas=betas, fused=True)

    def _add(self, name: str, parameter: nn.Parameter) -> None:
        is_float32 = parameter.dtype == torch.float32
        master = parameter if is_float32 else parameter.detach().float().clone()
        main_grad = torch.zeros_like(master, requires_grad=False)

        def accumulate(parameter: Tensor) -> None:
            if parameter.grad is None:  # an op that adds to main_grad itself returned none
                return
            main_grad.add_(parameter.grad)
            parameter.grad = None

        parameter.register_post_accumulate_grad_hook(accumulate)
        self.parameters[name] = parameter
        self.masters[name] = master
        self.main_grads[parameter] = main_grad

    def zero_grad(self) -> None:
        """Clear the float32 gradient buffers."""
        for main_grad in self.main_grads.values():
            main_grad.zero_()

    def step(self, training_step: int) -> tuple[float, bool]:
        """Clip, update the masters and copy them into the policy.

        `training_step` counts from 0 and sets the warm-up: the first step trains at
        lr / warmup_steps, not at 0 as the released code does. Returns the gradient norm before
        clipping and whether the update was made: a non-finite norm skips it.
        """
        grad_norm = torch.nn.utils.get_total_norm(list(self.main_grads.values()))
        is_finite = bool(torch.isfinite(grad_norm))
        warmup = min(1.0, (training_step + 1) / max(self.warmup_steps, 1))
        for group in self.adamw.param_groups:
            group["lr"] = group["peak_lr"] * warmup
        if is_finite:
            factor = min(1.0, self.max_grad_norm / (float(grad_norm) + 1e-6))
            for name, parameter in self.parameters.items():
                self.masters[name].grad = self.main_grads[parameter].mul_(factor)
            self.adamw.step()
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    self.masters[name].grad = None
                    if self.masters[name] is not parameter:
                        parameter.copy_(self.masters[name])
        self.zero_grad()
        return float(grad_norm), is_finite

    @property
    def lr(self) -> float:
        """The policy's learning rate at the last update."""
        return self.adamw.param_groups[0]["lr"]

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by parameter name, for a checkpoint."""
        tensors = {}
        for name, master in self.masters.items():
            tensors[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state[master].items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` gave; `checkpoint.check_tensors` sees to it being whole."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
                state = {
                    key: tensors[f"{key}.{name}"].to(master.device, copy=True)
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in tensors
                }
                if state:
                    self.adamw.state[master] = state
                if self.parameters[name] is not master:
                    self.parameters[name].copy_(master)
