"""Sums over ranks inside the autograd graph, and which backward each of them needs."""

import torch
import torch.distributed as dist
from torch import Tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup, has_summed_backward: bool) -> Tensor:
        ctx.group, ctx.has_summed_backward = group, has_summed_backward
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.has_summed_backward:
            grad = grad.clone()
            dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


def sum_over_tensor_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add the shards' parts; every rank passes the whole gradient on to its own part.

    Tensor-parallel ranks compute one and the same loss, so the gradient that arrives is already
    the whole one; summing it would make it tp times too big.
    """
    return _Sum.apply(values, group, False)  # pyright: ignore[reportReturnType]


def sum_over_context_ranks(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Add the shards' parts; the backward adds the gradients of all ranks.

    Context-parallel ranks compute the same loss from the sums, and Megatron divides the sum of
    their gradients by a count that all of them report. A replicated parameter (Z's) thus receives
    cp / cp of its gradient; so must a token, which lives on one rank only.
    """
    return _Sum.apply(values, group, True)  # pyright: ignore[reportReturnType]
