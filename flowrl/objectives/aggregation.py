"""From per-sequence sums of token losses to a loss_sum and its normalizer, under verl's names."""

import math

import torch

from flowrl.objectives.output import Normalizer

LOSS_AGG_MODES = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)


def check_loss_agg_mode(loss_agg_mode: str, loss_scale_factor: float | None) -> None:
    """Raise ValueError for an unknown mode or a scale factor that is missing or none."""
    if loss_agg_mode not in LOSS_AGG_MODES:
        raise ValueError(
            f"unknown loss_agg_mode {loss_agg_mode!r}: use one of {', '.join(LOSS_AGG_MODES)}"
        )
    if loss_agg_mode != "seq-mean-token-sum-norm":
        return
    if loss_scale_factor is None:
        raise ValueError(
            "seq-mean-token-sum-norm divides by a constant: give loss_scale_factor, for example "
            "the maximal response length"
        )
    if not (math.isfinite(loss_scale_factor) and loss_scale_factor > 0):
        raise ValueError(f"loss_scale_factor must be finite and > 0, got {loss_scale_factor}")


def aggregate(
    token_loss_sums: torch.Tensor,
    num_tokens: torch.Tensor,
    loss_agg_mode: str,
    loss_scale_factor: float | None,
) -> tuple[torch.Tensor, Normalizer]:
    """Return (losses [B], normalizer): the sum of losses over the normalizer's count is the loss.

        token-mean               sum of all token losses / tokens (DAPO, arXiv 2503.14476, Eq. 8)
        seq-mean-token-mean      mean over sequences of the token mean (GRPO, 2402.03300, Eq. 3)
        seq-mean-token-sum       mean over sequences of the token sum
        seq-mean-token-sum-norm  the same / loss_scale_factor (Dr. GRPO, 2503.20783)

    Both counts are those of the whole optimiser step, so micro-batches add up exactly. A sequence
    with an empty mask has loss 0 and counts as a sequence; verl leaves it out of the count.
    token_loss_sums, num_tokens: [B] of whole sequences.
    """
    if loss_agg_mode == "token-mean":
        return token_loss_sums, "tokens"
    if loss_agg_mode == "seq-mean-token-mean":
        return token_loss_sums / num_tokens.clamp(min=1), "sequences"
    if loss_agg_mode == "seq-mean-token-sum":
        return token_loss_sums, "sequences"
    assert loss_scale_factor is not None
    return token_loss_sums / loss_scale_factor, "sequences"
