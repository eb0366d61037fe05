"""What counts of a sampled response: its score's penalty, its tokens' mask, their weights.

All of it is fixed once a step, per sample and before packing, so no packing and no parallel layout
changes it.
"""

from collections.abc import Sequence

import torch

from flowrl.batch import Sample, pack, response_values
from flowrl.metrics import mean_min_max
from flowrl.objectives.advantages import overlong_penalty
from flowrl.objectives.correction import kept_tokens, truncated_importance_weights
from flowrl.rewards import group_normalize
from flowrl.settings import Config
from flowrl.settings_selection import RolloutCorrectionConfig


def normalize_rewards(samples: Sequence[Sample], unbiased_std: bool) -> None:
    """Give every sample the normalised reward of its score and penalty within its group."""
    rewards = group_normalize(
        torch.tensor([s.shaped_score for s in samples], dtype=torch.float64),
        torch.tensor([s.group_id for s in samples]),
        unbiased=unbiased_std,
    )
    for sample, reward in zip(samples, rewards.tolist(), strict=True):
        sample.reward = reward


def punish_overlong(config: Config, samples: Sequence[Sample]) -> dict[str, float]:
    """Lower the scores of responses that end near the length limit, and normalise anew."""
    buffer = config.reward.overlong_buffer
    penalties = overlong_penalty(
        torch.tensor([len(s.response_ids) for s in samples]),
        config.data.max_response_length,
        buffer.len,
        buffer.penalty_factor,
    ).tolist()
    for sample, penalty in zip(samples, penalties, strict=True):
        sample.overlong_penalty = penalty
    normalize_rewards(samples, config.algorithm.unbiased_std)
    return mean_min_max("critic/overlong_penalty", penalties)


def mask_truncated(samples: Sequence[Sample]) -> None:
    """Take responses that the length limit ended out of the loss, but not out of their groups.

    Overlong filtering (arXiv 2503.14476, section 3.4). A sequence without tokens has loss 0 and
    is counted by the losses that divide by sequences.
    """
    for sample in samples:
        if sample.is_truncated:
            sample.loss_mask = torch.zeros(len(sample.response_ids), dtype=torch.bool)


def mask_unknown(samples: Sequence[Sample]) -> None:
    """Take tokens out of the loss whose old log-prob, the rollout engine's, is not finite."""
    for sample in samples:
        assert sample.old_logprobs is not None
        is_known = sample.old_logprobs.isfinite()
        if not is_known.all():
            sample.loss_mask = sample.kept_tokens & is_known


def correct_rollout(
    correction: RolloutCorrectionConfig, samples: Sequence[Sample]
) -> dict[str, float]:
    """Weigh and reject tokens by pi_old / pi_rollout; see flowrl.objectives.correction.

    mismatch/rollout_is_mean, rollout_is_truncated  mean weight, share of tokens at its bound
    mismatch/rollout_rs_masked_fraction             share of tokens that are rejected
    mismatch/rollout_rs_seq_masked_fraction         share of responses with a rejected token
    """
    batch = pack(samples)
    assert batch.old_logprobs is not None
    mask = batch.response_mask
    tokens = (batch.old_logprobs, batch.rollout_logprobs, mask, batch.cu_seqlens)
    num_tokens = max(int(mask.sum()), 1)
    metrics: dict[str, float] = {}
    if correction.rollout_is is not None:
        bound = correction.rollout_is_threshold
        weights = truncated_importance_weights(*tokens, correction.rollout_is, bound)
        for sample, values in zip(samples, response_values(batch, weights), strict=True):
            sample.token_weights = values
            if correction.rollout_is != "token" and len(values):
                sample.sequence_weight = float(values[0])  # all are the same
        metrics["mismatch/rollout_is_mean"] = float(weights.double().sum()) / num_tokens
        is_bounded = weights >= torch.tensor(bound, dtype=weights.dtype)
        metrics["mismatch/rollout_is_truncated"] = int(is_bounded.sum()) / num_tokens
    if correction.rollout_rs is not None:
        kept = kept_tokens(*tokens, correction.rollout_rs, *correction.kept_range)
        num_rejected = 0
        for sample, values in zip(samples, response_values(batch, kept), strict=True):
            sample.loss_mask = sample.kept_tokens & values
            num_rejected += not bool(values.all())
        metrics["mismatch/rollout_rs_masked_fraction"] = 1 - int(kept.sum()) / num_tokens
        metrics["mismatch/rollout_rs_seq_masked_fraction"] = num_rejected / len(samples)
    return metrics
