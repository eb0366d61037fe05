"""GRPO, PPO and REINFORCE++ in the loop of train.py: settings to losses, scores to advantages."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowrl.batch import PackedBatch, Sample, pack, response_values
from flowrl.interface import MicroBatchResult, Objective, TokenOutputs, ValueObjective
from flowrl.objectives.advantages import (
    gae,
    group_center,
    masked_whiten,
    reinforce_pp_advantages,
    reinforce_pp_baseline_advantages,
    spread_to_tokens,
    token_rewards,
)
from flowrl.objectives.grpo import grpo_loss
from flowrl.objectives.output import ObjectiveOutput
from flowrl.objectives.ppo import ppo_value_loss
from flowrl.settings import Config


def set_advantages(config: Config, samples: Sequence[Sample]) -> None:
    """Give every sample the advantages of its tokens, and with a critic their returns.

    Over the whole batch, because groups and whitening reach beyond a mini-batch.
    """
    algorithm, batch = config.algorithm, pack(samples)
    # Of all response tokens: what the loss leaves out is part of the trajectory all the same.
    mask, cu_seqlens = batch.response_mask, batch.cu_seqlens
    scores = torch.tensor([s.shaped_score for s in samples], dtype=torch.float32)
    returns = None
    if algorithm.objective == "grpo":
        normalized = batch.rewards
        if not algorithm.norm_adv_by_std_in_grpo:
            normalized = group_center(scores, batch.group_ids)
        advantages = spread_to_tokens(normalized, mask, cu_seqlens)
    elif algorithm.objective == "reinforce_pp_baseline":
        advantages = reinforce_pp_baseline_advantages(scores, batch.group_ids, mask, cu_seqlens)
    else:
        old_logprobs, ref_logprobs = batch.old_logprobs, batch.ref_logprobs
        if old_logprobs is not None and ref_logprobs is not None:
            # A token whose log-prob the engine does not know, see mask_unknown, costs no KL.
            old_logprobs = torch.where(old_logprobs.isfinite(), old_logprobs, ref_logprobs)
        rewards = token_rewards(
            scores,
            mask,
            cu_seqlens,
            old_logprobs,
            ref_logprobs,
            algorithm.kl_coef if algorithm.use_kl_in_reward else 0.0,
        )
        if algorithm.objective == "ppo":
            assert batch.values is not None
            advantages, returns = gae(
                batch.values, rewards, mask, cu_seqlens, algorithm.gamma, algorithm.lam
            )
            advantages = masked_whiten(advantages, mask)
        else:
            advantages = reinforce_pp_advantages(rewards, mask, cu_seqlens, algorithm.gamma)
    for sample, values in zip(samples, response_values(batch, advantages), strict=True):
        sample.advantages = values
    if returns is not None:
        for sample, values in zip(samples, response_values(batch, returns), strict=True):
            sample.returns = values


def baseline_objective(config: Config) -> Objective:
    """The policy's loss of one micro-batch, with the settings of this run."""
    actor = config.actor

    def objective(batch: PackedBatch, outputs: TokenOutputs, _: Tensor | None) -> ObjectiveOutput:
        old_logprobs = batch.old_logprobs
        if old_logprobs is None:  # a single update: the policy has not moved since the rollout
            old_logprobs = outputs.logprobs.detach()
        assert batch.advantages is not None
        # The policy losses of PPO and REINFORCE++ are this one on other advantages.
        return grpo_loss(
            outputs.logprobs,
            old_logprobs,
            batch.advantages,
            batch.loss_mask,
            batch.cu_seqlens,
            ref_logprobs=batch.ref_logprobs if actor.use_kl_loss else None,
            entropy=outputs.entropy,
            token_weights=batch.token_weights,
            clip_low=actor.clip_ratio_low,
            clip_high=actor.clip_ratio_high,
            clip_ratio_c=actor.clip_ratio_c,
            kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
            entropy_coeff=actor.entropy_coeff,
            ratio="sequence" if actor.loss_mode == "gspo" else "token",
            loss_agg_mode=actor.loss_agg_mode,
            loss_scale_factor=loss_scale_factor(config),
            reduce_sums=batch.reduce_sums,
        )

    return objective


def value_objective(config: Config) -> ValueObjective:
    """The critic's loss of one micro-batch."""

    def objective(batch: PackedBatch, values: Tensor) -> ObjectiveOutput:
        assert batch.values is not None and batch.returns is not None
        return ppo_value_loss(
            values,
            batch.values,
            batch.returns,
            batch.loss_mask,
            batch.cu_seqlens,
            config.critic.cliprange_value,
            config.actor.loss_agg_mode,
            loss_scale_factor(config),
            reduce_sums=batch.reduce_sums,
        )

    return objective


def loss_scale_factor(config: Config) -> float:
    """The constant of seq-mean-token-sum-norm."""
    return config.actor.loss_scale_factor or float(config.data.max_response_length)


def baseline_metrics(results: Iterable[MicroBatchResult]) -> dict[str, float]:
    """The clipped loss over the response tokens of one training step, under verl's names.

    actor/pg_clipfrac, pg_clipfrac_lower  share of tokens whose gradient the clip, the dual clip cut
    actor/ratio                           mean of pi / pi_old
    actor/kl_to_ref                       mean k3 estimate of KL(pi || pi_ref), where it is computed
    """
    results = list(results)

    def total(name: str) -> float:
        return math.fsum(float(r.output.diagnostics[name].double().sum()) for r in results)

    num_tokens = max(total("num_tokens"), 1.0)
    per_token = results[0].output.normalizer == "tokens"
    count = num_tokens if per_token else sum(r.batch.num_sequences for r in results)
    metrics = {
        "actor/loss": total("loss") / count,
        "actor/pg_clipfrac": total("num_clipped_tokens") / num_tokens,
        "actor/pg_clipfrac_lower": total("num_lower_clipped_tokens") / num_tokens,
        "actor/ratio": total("ratio") / num_tokens,
    }
    if ref_kl := total("ref_kl"):
        metrics["actor/kl_to_ref"] = ref_kl / num_tokens
    return metrics
