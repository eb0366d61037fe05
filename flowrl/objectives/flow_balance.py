"""FlowRL: match the distribution of rewards by a trajectory balance with a learned Z(x).

Paper: arXiv 2509.15207. Two deviations are inherited from every released version of its code:
the reward normalisation adds 1e-6 to the standard deviation, and the log-probs are those of
softmax(logits / rollout temperature). Not copied is the per-micro-batch scale of the first
release, which weighs a sequence by one over the size of its micro-batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from flowrl.kernels._packed import check_same
from flowrl.kernels.flow_balance import (
    DROPPED,
    TOKENS,
    check_beta,
    check_tokens,
    reference,
    residual_from_sums,
    sequence_sums,
)
from flowrl.objectives.output import ObjectiveOutput


@dataclass(frozen=True)
class FlowBalancePreset:
    """One published variant of FlowRL; fields that its weighting ignores hold the defaults."""

    weighting: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    weight_cap: float = 10.0
    pooling: Literal["all", "without_last"] = "without_last"  # prompt tokens that feed Z
    z_dropout: float = 0.1
    detach_z: bool = False  # True: Z's gradient stops at its input and leaves the trunk alone


PRESETS = {
    # The paper does not give the clip range; 0.2 is the default of the trainer it was built on.
    "paper": FlowBalancePreset("clip", pooling="all", z_dropout=0.0, detach_z=True),
    # The first release, the one behind the published numbers.
    "original": FlowBalancePreset("raw"),
    # verl-recipe, current.
    "recipe": FlowBalancePreset("cap"),
    # verl v0.6.1.
    "cispo": FlowBalancePreset("cispo", clip_high=0.28),
}


@dataclass(frozen=True)
class FlowBalanceOutput(ObjectiveOutput):
    """An ObjectiveOutput whose main diagnostics also have names of their own."""

    residual: torch.Tensor  # [B] d
    log_weight: torch.Tensor  # [B] log S, before clip or cap
    weight: torch.Tensor  # [B] w, times the sequence's weight if it has one
    mean_logprob: torch.Tensor  # [B] mean of log pi over the kept tokens


def flow_balance_loss(
    policy_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rewards: torch.Tensor,
    log_z: torch.Tensor,
    beta: float = 15.0,
    weighting: str = "clip",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    weight_cap: float = 10.0,
    implementation: str | None = None,
    reduce_sums: Callable[[torch.Tensor], torch.Tensor] | None = None,
    sequence_weights: torch.Tensor | None = None,
) -> FlowBalanceOutput:
    """Return the sum over sequences of w d^2 (arXiv 2509.15207, Eq. 6 and 7), with

        d = log Z + (1/|y|) sum m log pi - beta r - (1/|y|) sum m log pi_ref
        w = weighting( exp( sum m (log pi - log pi_old) ) ), detached.

    policy_logprobs, old_logprobs, ref_logprobs: [N] packed tokens, entry i is the log-prob of
    token i. loss_mask: [N] bool, int or float, 1 = response token that counts.
    cu_seqlens: [B + 1] int32 or int64. rewards: [B], already normalised in their groups.
    log_z: [B]. The log-probs, rewards and log_z are all float32 or all float64; sums are float64.
    weighting: `clip`, `raw`, `cap`, `one` or `cispo`, see flowrl.kernels.flow_balance.
    implementation: None (the device's best), "reference", "triton" or "cpu".
    reduce_sums: where the tokens of a sequence are spread over ranks, the all-reduce of the [B, 5]
    sums over them, whose backward must sum as well; every rank then has the whole loss.
    sequence_weights: [B] factors u of the loss, None for 1, for responses that pi_old did not
    sample: the summand is u w d^2, and the diagnostic `weight` is u w. With u = pi_old(y) /
    pi_rollout(y), truncated (flowrl.objectives.correction), a mean over the engine's responses
    stands for one over pi_old's. Not in the paper; detached like w.

    Gradients flow to policy_logprobs and log_z only. The caller divides by the number of sequences
    of the optimiser step, in which a sequence with an empty mask, with all tokens dropped or
    skipped (`raw` with a non-finite weight) still counts: its loss and gradients are 0.
    Raises ValueError for wrong shapes, dtypes, devices and options.
    """
    sums = sequence_sums(
        policy_logprobs,
        old_logprobs,
        ref_logprobs,
        loss_mask,
        cu_seqlens,
        rewards,
        weighting,
        clip_low,
        clip_high,
        implementation,
    )
    if reduce_sums is not None:
        sums = reduce_sums(sums)
    out = residual_from_sums(
        sums, log_z, rewards, beta, weighting, clip_low, clip_high, weight_cap, implementation
    )
    loss, weight = out.loss, out.weight
    if sequence_weights is not None:
        if sequence_weights.shape != rewards.shape:
            raise ValueError(
                f"sequence_weights must have rewards' shape {list(rewards.shape)}, "
                f"got {list(sequence_weights.shape)}"
            )
        check_same("sequence_weights", sequence_weights, "rewards", rewards)
        loss, weight = loss * sequence_weights.detach(), weight * sequence_weights.detach()
    diagnostics = {
        "loss": loss.detach(),
        "residual": out.residual,
        "log_weight": out.log_weight,
        "weight": weight,
        "mean_logprob": out.mean_logprob,
        "num_tokens": sums[:, TOKENS].detach(),
        "num_dropped_tokens": sums[:, DROPPED].detach(),
        "clipped": out.clipped,
        "skipped": out.skipped,
    }
    return FlowBalanceOutput(
        loss_sum=loss.sum(dtype=torch.float64).to(log_z.dtype),
        normalizer="sequences",
        diagnostics=diagnostics,
        residual=out.residual,
        log_weight=out.log_weight,
        weight=weight,
        mean_logprob=out.mean_logprob,
    )


def vargrad_log_z(
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    beta: float = 15.0,
) -> torch.Tensor:
    """Return log Z without a network: [B], per group the mean of beta r - mean log(pi_old/pi_ref).

    The VarGrad estimate as in TBA (arXiv 2503.18929), here with FlowRL's length-normalised
    log-ratio. Compute it over whole groups, so before packing into micro-batches.
    group_ids: [B] integer, the prompt of each sequence, in any order. A sequence with an empty
    mask takes no part in its group's mean. The result has the rewards' dtype and no gradient.
    Raises ValueError as flow_balance_loss does.
    """
    check_beta(beta)
    mask, cu_seqlens = check_tokens(
        old_logprobs, old_logprobs, ref_logprobs, loss_mask, cu_seqlens, rewards
    )
    is_integer = not (group_ids.dtype.is_floating_point or group_ids.dtype.is_complex)
    if group_ids.shape != rewards.shape or not is_integer or group_ids.dtype == torch.bool:
        raise ValueError(
            f"group_ids must be integers of shape {list(rewards.shape)}, "
            f"got {group_ids.dtype} {list(group_ids.shape)}"
        )
    if group_ids.device != rewards.device:
        raise ValueError(f"group_ids are on {group_ids.device} but rewards on {rewards.device}")
    log_z = reference.vargrad_log_z(
        old_logprobs.detach(), ref_logprobs.detach(), mask, cu_seqlens, rewards, group_ids, beta
    )
    return log_z.to(rewards.dtype)
