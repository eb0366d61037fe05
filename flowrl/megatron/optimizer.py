"""flowrl.policy.optimizer.MasterAdamW's update, carried out by Megatron's optimisers."""

import logging
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer_config import ParamKey

logger = logging.getLogger(__name__)


class MegatronAdamW:
    """AdamW (arXiv 1711.05101) with linear warm-up to a constant rate and a gradient-norm limit.

    Norm scales and biases are not decayed; Z (`partition.*`) has its own peak rate `z_lr`. With
    DDP's distributed optimiser, masters and moments are spread over the data-parallel ranks.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        *,
        lr: float,
        z_lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        warmup_steps: int,
        max_grad_norm: float,
    ):
        self.chunks = list(chunks)
        self.peak_lr, self.lr = lr, lr
        self.warmup_steps, self.max_grad_norm = warmup_steps, max_grad_norm
        dtype = chunks[0].config.params_dtype
        config = OptimizerConfig(
            optimizer="adam",
            lr=lr,
            weight_decay=weight_decay,
            adam_beta1=betas[0],
            adam_beta2=betas[1],
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            clip_grad=0.0,  # done in `step`, which may skip the update
            use_distributed_optimizer=chunks[0].ddp_config.use_distributed_optimizer,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        )
        overrides = get_standard_config_overrides(config)
        overrides[ParamKey(name="*partition.*")] = {"max_lr": z_lr}  # pyright: ignore
        optimizer = get_megatron_optimizer(
            config, [*self.chunks], overrides, use_gloo_process_groups=False
        )
        assert isinstance(optimizer, ChainedOptimizer)
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            # Megatron leaves this product to its scheduler, and decays norms where there is none.
            group["weight_decay"] = weight_decay * group["wd_mult"]

    def zero_grad(self) -> None:
        """Clear the gradient buffers and what DDP knows of them."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, training_step: int) -> tuple[float, bool]:
        """Clip, update and hand the weights to the policy; see MasterAdamW.step.

        Collective. Returns the norm of the whole model's gradient before clipping, and whether
        the update was made: a norm that is not finite skips it.
        """
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            factor = min(1.0, self.max_grad_norm / (grad_norm + 1e-6))
            for part in self.optimizer.chained_optimizers:
                _scale_gradients(part, factor)
            warmup = min(1.0, (training_step + 1) / max(self.warmup_steps, 1))
            self.lr = self.peak_lr * warmup
            for group in self.optimizer.param_groups:
                group["lr"] = group["max_lr"] * warmup
            self.optimizer.step_with_ready_grads()
            for chunk in self.chunks:
                for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                    # Weights that were gathered before the update do not count as gathered.
                    bucket_group.param_gather_dispatched = False
        else:
            self._tell_where(training_step, grad_norm)
        self.zero_grad()
        return grad_norm, is_finite

    def _tell_where(self, training_step: int, grad_norm: float) -> None:
        """Log which gradients and weights of this rank are not finite, which only now is worth it.

        The backward carries NaN from the layer where it appeared to all that come before.
        """
        named = [item for chunk in self.chunks for item in chunk.module.named_parameters()]
        grads = [
            name
            for name, parameter in named
            if parameter.requires_grad and not parameter.main_grad.isfinite().all()  # pyright: ignore[reportAttributeAccessIssue]
        ]
        weights = [n for n, p in named if not p.isfinite().all()]
        if grads or weights:
            logger.error(
                "rank %d, step %d: the gradient norm is %s and the update is skipped; here %d of "
                "%d gradients are not finite, the last in forward order %s; weights: %s",
                dist.get_rank(),
                training_step + 1,
                grad_norm,
                len(grads),
                len(named),
                grads[-1] if grads else "-",
                ", ".join(weights[:4]) or "all finite",
            )


def _scale_gradients(optimizer: MegatronOptimizer, factor: float) -> None:
    for parameter in optimizer.get_parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
