"""PPO: the clipped policy loss on GAE advantages, and the critic's loss.

Two functions, not one: policy and critic may be different models with their own optimisers, clip
ranges and micro-batches. Where they share a trunk, both loss_sums have the same normalizer for the
same loss_agg_mode, so their weighted sum is the combined loss.
"""

import math
from collections.abc import Callable

import torch

from flowrl.kernels._packed import check_packed, check_same
from flowrl.kernels.segment_mean import segment_sum
from flowrl.objectives.aggregation import aggregate, check_loss_agg_mode
from flowrl.objectives.grpo import grpo_loss
from flowrl.objectives.output import ObjectiveOutput


def ppo_policy_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    entropy: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = 3.0,
    entropy_coeff: float = 0.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    implementation: str | None = None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ObjectiveOutput:
    """Return PPO's clipped policy loss (arXiv 1707.06347, Eq. 7) on GAE advantages.

    The formula, shapes, dtypes, diagnostics and errors of grpo_loss, with verl's dual clip at 3 and
    without a KL in the loss: PPO has it in the reward, see token_rewards. advantages: [N], from
    `gae`, whitened over the whole batch by `masked_whiten`.
    """
    return grpo_loss(
        policy_logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        cu_seqlens,
        entropy=entropy,
        token_weights=token_weights,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_ratio_c=clip_ratio_c,
        entropy_coeff=entropy_coeff,
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=loss_scale_factor,
        implementation=implementation,
        reduce_sums=reduce_sums,
    )


def ppo_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    cliprange_value: float = 0.5,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    implementation: str | None = None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ObjectiveOutput:
    """Return the sum of the critic's clipped squared errors, aggregated by loss_agg_mode:

        loss_t = 0.5 max( (V_t - R_t)^2, (clamp(V_t, V_old_t -+ cliprange_value) - R_t)^2 )

    The squared error is that of arXiv 1707.06347, Eq. 9; the clip is not in the paper but in its
    code, and in verl's, whose default is 0.5. math.inf turns it off.
    values: [N] packed tokens, requires grad; entry i is the value of the state in which token i is
    chosen. old_values: [N], those of the rollout. returns: [N], from `gae`. loss_mask, cu_seqlens,
    loss_agg_mode, loss_scale_factor, implementation (of the sums) and reduce_sums: as in grpo_loss.
    Floats are all float32 or all float64; the loss is computed in float64.
    Gradients flow to values only. Diagnostics: `loss`, `num_tokens`, `num_clipped_tokens` (the
    clipped error is the larger one) and `value`, sums over the sequence's tokens.
    Raises ValueError for wrong shapes, dtypes, devices and options.
    """
    check_loss_agg_mode(loss_agg_mode, loss_scale_factor)
    if not cliprange_value > 0:
        raise ValueError(
            f"cliprange_value must be > 0, got {cliprange_value}: use math.inf for no clip"
        )
    if values.ndim != 1:
        raise ValueError(f"values must be packed to [N], got {list(values.shape)}")
    for name, tensor in (("old_values", old_values), ("returns", returns)):
        if tensor.shape != values.shape:
            raise ValueError(
                f"{name} must have values' shape {list(values.shape)}, got {list(tensor.shape)}"
            )
        check_same(name, tensor, "values", values)
    mask, cu_seqlens = check_packed(loss_mask, cu_seqlens, values.shape[0], values.device)

    # Selected before any arithmetic: a NaN under the mask would poison the gradient of a product.
    new, old, target = (
        torch.where(mask, x.double(), 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    error = (new - target).square()
    clipped_error = error
    if math.isfinite(cliprange_value):
        clipped = torch.minimum(torch.maximum(new, old - cliprange_value), old + cliprange_value)
        clipped_error = (clipped - target).square()
    is_clipped = clipped_error > error
    token_losses = 0.5 * torch.where(is_clipped, clipped_error, error)
    columns = torch.column_stack([token_losses, mask.double(), is_clipped.double(), new.detach()])
    sums, _ = segment_sum(columns, cu_seqlens, mask, implementation)
    if reduce_sums is not None:
        sums = reduce_sums(sums)
    token_loss_sums, num_tokens, num_clipped, value = sums.unbind(dim=1)
    losses, normalizer = aggregate(
        token_loss_sums, num_tokens.detach(), loss_agg_mode, loss_scale_factor
    )
    diagnostics = {
        "loss": losses,
        "num_tokens": num_tokens,
        "num_clipped_tokens": num_clipped,
        "value": value,
    }
    return ObjectiveOutput(
        loss_sum=losses.sum().to(values.dtype),
        normalizer=normalizer,
        diagnostics={name: x.detach().to(values.dtype) for name, x in diagnostics.items()},
    )
