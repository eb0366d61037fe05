"""REINFORCE++: the clipped policy loss on advantages that are normalised over the whole batch."""

from collections.abc import Callable

import torch

from flowrl.objectives.grpo import grpo_loss
from flowrl.objectives.output import ObjectiveOutput


def reinforce_pp_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    clip_ratio_c: float | None = 3.0,
    kl_coef: float = 0.0,
    entropy_coeff: float = 0.0,
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    implementation: str | None = None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ObjectiveOutput:
    """Return the clipped policy loss on the advantages of REINFORCE++ (arXiv 2501.03262).

    The formula, shapes, dtypes, diagnostics and errors of grpo_loss with its token ratio and verl's
    dual clip at 3. advantages: [N], from reinforce_pp_advantages, whose reward holds the KL and
    then kl_coef stays 0, or from reinforce_pp_baseline_advantages, to which a KL in the loss
    belongs. Deviation: that KL is k3; the paper's baseline variant and verl's example take k2,
    which has the same gradient to first order in log pi_ref - log pi.
    """
    return grpo_loss(
        policy_logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        cu_seqlens,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        token_weights=token_weights,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_ratio_c=clip_ratio_c,
        kl_coef=kl_coef,
        entropy_coeff=entropy_coeff,
        loss_agg_mode=loss_agg_mode,
        loss_scale_factor=loss_scale_factor,
        implementation=implementation,
        reduce_sums=reduce_sums,
    )
