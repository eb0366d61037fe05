"""GRPO and its kin: a clipped policy gradient on packed tokens, from which PPO's is cut as well.

One token-level launch (flowrl.kernels.token_clip) gives loss and gradient. The switches make it
GRPO (arXiv 2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783) or GSPO (2507.18071); the table in
docs/objectives.md says which.
"""

from collections.abc import Callable

import torch

from flowrl.kernels.flow_balance import LOG_RATIO, sequence_sums
from flowrl.kernels.flow_balance import TOKENS as RATIO_TOKENS
from flowrl.kernels.segment_mean import segment_sum
from flowrl.kernels.token_clip import (
    CLIPPED,
    CLIPPED_LOWER,
    LOSS,
    OLD_KL,
    RATIO,
    REF_KL,
    TOKENS,
    token_clip,
)
from flowrl.objectives.aggregation import aggregate, check_loss_agg_mode
from flowrl.objectives.output import ObjectiveOutput

RATIOS = ("token", "sequence")


def grpo_loss(
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
    clip_ratio_c: float | None = None,
    kl_coef: float = 0.0,
    entropy_coeff: float = 0.0,
    ratio: str = "token",
    loss_agg_mode: str = "token-mean",
    loss_scale_factor: float | None = None,
    implementation: str | None = None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> ObjectiveOutput:
    """Return the sum of the clipped token losses, aggregated by loss_agg_mode (see `aggregate`):

        pg_t   = max( -A_t rho_t, -A_t clamp(rho_t, 1 - clip_low, 1 + clip_high) )
                 and at most -A_t clip_ratio_c where A_t < 0       (dual clip, arXiv 1912.09729)
        kl_t   = exp(log pi_ref - log pi) - (log pi_ref - log pi) - 1
        loss_t = weight_t pg_t + kl_coef kl_t - entropy_coeff entropy_t

    arXiv 2402.03300, Eq. 3 and 4; clip_low and clip_high apart as in arXiv 2503.14476, Eq. 8.
    ratio "token": rho_t = pi_t / pi_old_t. "sequence": rho_t = s (pi_t / its own constant) with
    s = exp(mean of log pi - log pi_old), the GSPO-token form of arXiv 2507.18071, Eq. 13 and 14.
    With one advantage for the whole sequence and seq-mean-token-mean that has the value and the
    gradient of GSPO, Eq. 5 and 7.

    policy_logprobs, old_logprobs, advantages: [N] packed tokens, entry i belongs to token i.
    loss_mask: [N] bool, int or float, 1 = response token that counts. cu_seqlens: [B + 1] int32 or
    int64. ref_logprobs: [N], needed when kl_coef > 0. entropy: [N] of the policy, needed when
    entropy_coeff != 0. token_weights: [N] importance weights of the policy gradient alone, see
    flowrl.objectives.correction. Floats are all float32 or all float64; sums are float64.
    clip_high may be math.inf. loss_scale_factor: the constant of seq-mean-token-sum-norm, without
    effect elsewhere. implementation: None (the device's best), "reference", "triton" or "cpu".
    reduce_sums: where the tokens of a sequence are spread over ranks, the all-reduce of [B, k] sums
    over them, whose backward must sum as well; every rank then has the whole loss.

    Gradients flow to policy_logprobs and entropy only. Diagnostics are sums over the sequence's
    tokens, to be divided by `num_tokens`; `loss` is what the sequence adds to loss_sum.
    Raises ValueError for wrong shapes, dtypes, devices and options.
    """
    check_loss_agg_mode(loss_agg_mode, loss_scale_factor)
    if ratio not in RATIOS:
        raise ValueError(f"unknown ratio {ratio!r}: use one of {', '.join(RATIOS)}")
    if entropy_coeff != 0 and entropy is None:
        raise ValueError(f"entropy_coeff is {entropy_coeff}: give entropy, or set it to 0")
    if entropy is not None and entropy.shape != policy_logprobs.shape:
        raise ValueError(
            f"entropy must have policy_logprobs' shape {list(policy_logprobs.shape)}, "
            f"got {list(entropy.shape)}"
        )

    dtype = policy_logprobs.dtype
    if ratio == "sequence":
        policy_logprobs, old_logprobs, ref_logprobs = _around_sequence_ratio(
            policy_logprobs,
            old_logprobs,
            ref_logprobs,
            loss_mask,
            cu_seqlens,
            implementation,
            reduce_sums,
        )
    # Importance weights are for the policy gradient, so with them the KL needs a launch of its own.
    is_kl_apart = kl_coef != 0 and token_weights is not None
    clip_sums = token_clip(
        policy_logprobs,
        old_logprobs,
        advantages,
        loss_mask,
        cu_seqlens,
        token_weights=token_weights,
        ref_logprobs=ref_logprobs,
        clip_low=clip_low,
        clip_high=clip_high,
        clip_ratio_c=clip_ratio_c,
        kl_coef=0.0 if is_kl_apart else kl_coef,
        implementation=implementation,
    )
    token_losses = clip_sums[:, LOSS]
    if is_kl_apart:
        kl_sums = token_clip(
            policy_logprobs,
            policy_logprobs,
            torch.zeros_like(advantages),
            loss_mask,
            cu_seqlens,
            ref_logprobs=ref_logprobs,
            kl_coef=kl_coef,
            implementation=implementation,
        )
        token_losses = token_losses + kl_sums[:, LOSS]
    if entropy is not None and entropy_coeff != 0:
        entropy_sums, _ = segment_sum(
            entropy.double()[:, None], cu_seqlens, loss_mask, implementation
        )
        token_losses = token_losses - entropy_coeff * entropy_sums[:, 0]

    sums = torch.column_stack([token_losses, clip_sums.detach()])
    if reduce_sums is not None:
        sums = reduce_sums(sums)
    token_losses, clip_sums = sums[:, 0], sums[:, 1:].detach()
    losses, normalizer = aggregate(
        token_losses, clip_sums[:, TOKENS], loss_agg_mode, loss_scale_factor
    )
    diagnostics = {
        "loss": losses.detach(),
        "num_tokens": clip_sums[:, TOKENS],
        "num_clipped_tokens": clip_sums[:, CLIPPED],
        "num_lower_clipped_tokens": clip_sums[:, CLIPPED_LOWER],
        "old_kl": clip_sums[:, OLD_KL],
        "ref_kl": clip_sums[:, REF_KL],
        "ratio": clip_sums[:, RATIO],
    }
    return ObjectiveOutput(
        loss_sum=losses.sum().to(dtype),
        normalizer=normalizer,
        diagnostics={name: x.to(dtype) for name, x in diagnostics.items()},
    )


def _around_sequence_ratio(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    implementation: str | None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return (policy, old, ref) whose token ratio is the sequence's, with the token's gradient.

    Shifted by the policy's own value, policy becomes an exact 0 that still carries the gradient, so
    that every token of a sequence has the same ratio to the last bit and the clip takes all or
    none. The difference to ref, which the KL is made of, stays what it was.
    """
    here = policy_logprobs.detach()
    no_rewards = here.new_zeros(cu_seqlens.shape[0] - 1)
    sums = sequence_sums(
        here,
        old_logprobs,
        old_logprobs,
        loss_mask,
        cu_seqlens,
        no_rewards,
        "one",
        implementation=implementation,
    )
    if reduce_sums is not None:
        sums = reduce_sums(sums)
    mean_log_ratio = sums[:, LOG_RATIO] / sums[:, RATIO_TOKENS].clamp(min=1)
    spread = torch.repeat_interleave(
        mean_log_ratio, cu_seqlens.diff(), output_size=policy_logprobs.shape[0]
    )
    ref = None if ref_logprobs is None else ref_logprobs.detach() - here
    return policy_logprobs - here, -spread.to(here.dtype), ref
