"""The training loop of FlowRL, to be read from `train` downwards.

Every random draw depends on (seed, step) alone, so a resumed run repeats an uninterrupted one.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from flowrl.baselines import (
    baseline_metrics,
    baseline_objective,
    set_advantages,
    value_objective,
)
from flowrl.batch import PackedBatch, Sample, pack
from flowrl.diagnostics import (
    flow_metrics,
    mismatch_metrics,
    rollout_metrics,
    throughput_metrics,
    token_metrics,
)
from flowrl.evaluate import evaluate, save_evaluation, score_responses
from flowrl.interface import MicroBatchResult, Objective, TokenOutputs
from flowrl.lookahead import staleness_metrics
from flowrl.metrics import Timer
from flowrl.objectives.flow_balance import flow_balance_loss, vargrad_log_z
from flowrl.parts import resolve_flow, step_seed
from flowrl.rewards import RewardResult
from flowrl.rollout import Response
from flowrl.run import Interrupt, Run, check_save, finish_save, save, start
from flowrl.sampling import Group, collect_groups, make_groups
from flowrl.settings import Config
from flowrl.shaping import (
    correct_rollout,
    mask_truncated,
    mask_unknown,
    normalize_rewards,
    punish_overlong,
)
from flowrl.tasks import TokenizedPrompt


def train(config: Config) -> Run:
    """Train until `trainer.total_training_steps`, continuing from the last checkpoint if any."""
    total = config.trainer.total_training_steps
    with start(config) as run, Interrupt() as interrupt, run.console:
        if run.step == 0 and config.trainer.val_before_train:
            run.log(judge(run))
        is_stopping = False
        while run.step < total and not is_stopping:
            check_save(run)
            metrics = training_step(run)
            if run.is_due(config.trainer.test_freq):
                metrics |= judge(run)
            run.log(metrics)
            is_stopping = run.parts.any_rank(interrupt.is_set)  # read once: it may come any time
            if run.is_due(config.trainer.save_freq) or is_stopping:
                save(run)  # after the metrics: a resumed run cuts the lines that follow it
        finish_save(run)
    return run


def training_step(run: Run) -> dict[str, float]:
    """Sample, score, normalise, take log-probs, update, publish; return the step's metrics."""
    config = run.config
    started = time.perf_counter()
    torch.manual_seed(step_seed(config.trainer.seed, run.step))  # Z's dropout
    timings: dict[str, float] = {}

    groups, shaping_metrics = collect_groups(config, partial(roll_out, run, timings))
    if config.rollout.max_staleness > 0 and run.step + 1 < config.trainer.total_training_steps:
        with Timer("gen", timings):
            run.lookahead.begin()  # goes on during the update when servers sample
    samples = make_samples(
        [group.prompt for group in groups],
        [group.responses for group in groups],
        [score for group in groups for score in group.scores],
        config.algorithm.unbiased_std,
    )
    shaping_metrics |= staleness_metrics(chain(*(g.responses for g in groups)), run.step)
    if config.reward.overlong_buffer.enable:
        shaping_metrics |= punish_overlong(config, samples)
    if config.algorithm.mask_truncated:
        mask_truncated(samples)

    if config.needs_reference:
        run.console.phase("reference")
        with Timer("ref", timings):
            set_logprobs(samples, "ref_logprobs", run.parts.reference_logprobs(samples))

    num_updates = (
        config.actor.ppo_epochs * config.data.train_batch_size // config.actor.ppo_mini_batch_size
    )
    if config.flow.old_logprobs == "rollout":
        set_logprobs(samples, "old_logprobs", [torch.tensor(s.rollout_logprobs) for s in samples])
        mask_unknown(samples)
    elif num_updates > 1 or needs_old_logprobs(config):  # else the update's forward gives them
        run.console.phase("old policy")
        with Timer("old_log_prob", timings):
            set_logprobs(samples, "old_logprobs", run.policy.logprobs(samples))
    if config.algorithm.rollout_correction.is_on:
        shaping_metrics |= correct_rollout(config.algorithm.rollout_correction, samples)

    critic_metrics: dict[str, float] = {}
    if config.algorithm.objective == "flow_balance":
        objective = flow_objective(config)
        if config.flow.log_z == "vargrad":
            set_vargrad_log_z(samples, config.flow.beta)
    else:
        objective = baseline_objective(config)
        if run.parts.critic is not None:
            run.console.phase("critic")
            with Timer("values", timings):
                run.parts.critic.set_values(samples)
        set_advantages(config, samples)
        if run.parts.critic is not None:
            with Timer("update_critic", timings):
                critic_metrics = update_critic(run, samples)

    run.console.phase("updating")
    updates, grad_norms, num_skipped = [], [], 0
    with Timer("update_actor", timings):
        for mini_batch in mini_batches(run, samples):
            updates.append(run.policy.accumulate_gradients(mini_batch, objective))
            grad_norm, is_applied = run.policy.optimizer.step(run.step)
            grad_norms.append(grad_norm)
            num_skipped += not is_applied

    with Timer("gen", timings):
        run.lookahead.finish()
    with Timer("update_weights", timings):
        run.publish(version=run.step + 1)
    run.step += 1
    return {
        **rollout_metrics(
            samples,
            [text for group in groups for text in group.texts],
            config.reward.correct_threshold,
        ),
        **objective_metrics(config, list(chain(*updates))),
        **token_metrics(chain(*updates)),
        **mismatch_metrics(updates[0]),  # the first: the policy has not moved yet
        **critic_metrics,
        **run.rewards.metrics(),
        **shaping_metrics,
        "actor/grad_norm": sum(grad_norms) / len(grad_norms),
        "actor/skipped_updates": num_skipped,
        "actor/lr": run.policy.optimizer.lr,
        **timings,
        **throughput_metrics(samples, time.perf_counter() - started),
    }


def roll_out(run: Run, timings: dict[str, float], batch: int) -> list[Group]:
    """Draw prompts, sample their responses and score them; `batch` counts within the step."""
    run.console.phase("generating")
    with Timer("gen", timings):
        prompts, responses = run.lookahead.take(run.step, batch)
    run.console.phase("scoring")
    with Timer("reward", timings):
        texts, scores = score_responses(run.tokenizer, run.rewards, prompts, responses)
    return make_groups(prompts, responses, texts, scores)


def make_samples(
    prompts: Sequence[TokenizedPrompt],
    responses: Sequence[Sequence[Response]],
    scores: Sequence[RewardResult],
    unbiased_std: bool,
) -> list[Sample]:
    """Pair every response with its prompt and its reward, normalised within the prompt's group."""
    pairs = [(g, r) for g, group in enumerate(responses) for r in group]
    samples = [
        Sample(
            prompt_ids=prompts[group].token_ids,
            response_ids=response.token_ids,
            rollout_logprobs=response.logprobs,
            is_truncated=response.finish_reason == "length",
            group_id=group,
            score=score.score,
        )
        for (group, response), score in zip(pairs, scores, strict=True)
    ]
    normalize_rewards(samples, unbiased_std)
    return samples


def set_logprobs(
    samples: Sequence[Sample],
    name: Literal["old_logprobs", "ref_logprobs"],
    values: Sequence[Tensor],
) -> None:
    """Give every sample the log-probs of its response."""
    for sample, logprobs in zip(samples, values, strict=True):
        setattr(sample, name, logprobs)


def mini_batches(run: Run, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    """One optimiser step's samples at a time: whole groups, `ppo_epochs` times over the batch."""
    size = run.config.actor.ppo_mini_batch_size * run.sampling.n
    for _ in range(run.config.actor.ppo_epochs):
        for first in range(0, len(samples), size):
            yield samples[first : first + size]


def needs_old_logprobs(config: Config) -> bool:
    """Whether something before the update reads the policy's log-probs."""
    if config.algorithm.rollout_correction.is_on:
        return True
    if config.algorithm.objective == "flow_balance":
        return config.flow.log_z == "vargrad"
    return config.algorithm.use_kl_in_reward


def flow_objective(config: Config) -> Objective:
    """FlowRL's loss of one micro-batch, with the settings of this run."""
    preset, beta = resolve_flow(config.flow), config.flow.beta

    def objective(batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None):
        old_logprobs = batch.old_logprobs
        if old_logprobs is None:  # a single update: the policy has not moved since the rollout
            old_logprobs = outputs.logprobs.detach()
        assert batch.ref_logprobs is not None
        return flow_balance_loss(
            outputs.logprobs,
            old_logprobs,
            batch.ref_logprobs,
            batch.loss_mask,
            batch.cu_seqlens,
            batch.rewards,
            batch.vargrad_log_z if log_z is None else log_z,  # zeros when log_z is `none`
            beta=beta,
            weighting=preset.weighting,
            clip_low=preset.clip_low,
            clip_high=preset.clip_high,
            weight_cap=preset.weight_cap,
            reduce_sums=batch.reduce_sums,
            sequence_weights=batch.sequence_weights,
        )

    return objective


def set_vargrad_log_z(samples: Sequence[Sample], beta: float) -> None:
    """Give every sample its group's estimate of log Z, before packing separates the group."""
    batch = pack(samples)
    assert batch.old_logprobs is not None and batch.ref_logprobs is not None
    estimates = vargrad_log_z(
        batch.old_logprobs,
        batch.ref_logprobs,
        batch.loss_mask,
        batch.cu_seqlens,
        batch.rewards,
        batch.group_ids,
        beta,
    )
    for sample, estimate in zip(samples, estimates.tolist(), strict=True):
        sample.vargrad_log_z = estimate


def update_critic(run: Run, samples: Sequence[Sample]) -> dict[str, float]:
    """Train PPO's critic on the batch's returns, in the mini-batches of the policy."""
    critic = run.parts.critic
    assert critic is not None
    losses, grad_norms, num_skipped = [], [], 0
    for mini_batch in mini_batches(run, samples):
        losses.append(critic.accumulate_gradients(mini_batch, value_objective(run.config)))
        grad_norm, is_applied = critic.optimizer.step(run.step)
        grad_norms.append(grad_norm)
        num_skipped += not is_applied
    return {
        "critic/vf_loss": sum(losses) / len(losses),
        "critic/grad_norm": sum(grad_norms) / len(grad_norms),
        "critic/skipped_updates": num_skipped,
    }


def objective_metrics(config: Config, results: list[MicroBatchResult]) -> dict[str, float]:
    """What the objective says about the step."""
    if config.algorithm.objective == "flow_balance":
        return flow_metrics(results, config.flow.beta)
    return baseline_metrics(results)


def judge(run: Run) -> dict[str, float]:
    """Evaluate on the held-out prompts, keep the responses, and return the accuracies."""
    if not run.val_prompts:
        return {}
    run.console.phase("evaluating")
    timings: dict[str, float] = {}
    with Timer("testing", timings):
        evaluation = evaluate(
            run.engine,
            run.tokenizer,
            run.rewards,
            run.val_prompts,
            run.val_sampling,
            with_greedy=run.config.validation.greedy,
            correct_threshold=run.config.reward.correct_threshold,
            seed=run.config.trainer.seed,
        )
    if run.parts.is_main:
        save_evaluation(run.config.run_dir, run.step, evaluation)
    sampled = evaluation.accuracy[f"avg@{run.val_sampling.n}"]
    metrics = {
        "val/accuracy": sampled.mean,
        "val/accuracy_low": sampled.low,
        "val/accuracy_high": sampled.high,
    }
    if "greedy" in evaluation.accuracy:
        metrics["val/accuracy_greedy"] = evaluation.accuracy["greedy"].mean
    return {**metrics, **timings}
