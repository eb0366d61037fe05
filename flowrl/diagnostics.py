"""What a training step says about itself: pure functions from samples and results to metrics."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from flowrl.batch import Sample
from flowrl.interface import MicroBatchResult
from flowrl.metrics import mean_min_max
from flowrl.objectives.correction import effective_sample_size


def stationary_log_z(
    weight: Tensor, residual: Tensor, log_z: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The shared log Z per group at which the gradient of Z vanishes, and the group's own mean.

    d/dlogZ sum w (log Z + c)^2 = 0 with c = residual - log Z gives -sum(w c) / sum(w): the value
    a trained Z should sit at. weight, residual, log_z [B]; group_ids [B] -> two tensors [G].
    Groups whose weights are all zero are left out.
    """
    _, group = group_ids.unique(return_inverse=True)
    num_groups = int(group.max()) + 1 if len(group) else 0

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add(0, group, values)

    mass = total(weight)
    stationary = -total(weight * (residual - log_z)) / mass
    own = total(log_z) / total(torch.ones_like(log_z))
    return stationary[mass > 0], own[mass > 0]


def flow_metrics(results: Iterable[MicroBatchResult], beta: float) -> dict[str, float]:
    """The balance of FlowRL over the sequences of one training step.

    flow/residual, residual_std  mean and spread of d
    flow/log_z, log_z_stationary, log_z_gap  Z, the value with zero gradient, mean |difference|
    flow/weight, clipfrac, ess   mean w, share that the weighting changed, (sum w)^2 / (B sum w^2)
    flow/tilt                    beta * mean |y|: nats by which one unit of normalised reward
                                 tilts the target away from the reference
    """
    results = list(results)

    def joined(name: str) -> Tensor:
        return torch.cat([r.output.diagnostics[name].detach().cpu().double() for r in results])

    residual, weight = joined("residual"), joined("weight")
    num_tokens = joined("num_tokens")
    log_z = torch.cat(  # without a network, what the loss took: a group's estimate, or zeros
        [(r.batch.vargrad_log_z if r.log_z is None else r.log_z).cpu() for r in results]
    ).double()
    group_ids = torch.cat([r.batch.group_ids.cpu() for r in results])
    stationary, own = stationary_log_z(weight, residual, log_z, group_ids)
    square = float((weight**2).sum())
    metrics = {
        "actor/loss": float(joined("loss").mean()),
        "flow/residual": float(residual.mean()),
        "flow/residual_std": float(residual.std(unbiased=False)),
        "flow/log_z": float(log_z.mean()),
        "flow/weight": float(weight.mean()),
        "flow/weight_max": float(weight.max()),
        "flow/clipfrac": float(joined("clipped").mean()),
        "flow/skipped": float(joined("skipped").mean()),
        "flow/dropped_tokens": float(joined("num_dropped_tokens").sum()),
        "flow/ess": float(weight.sum()) ** 2 / (len(weight) * square) if square > 0 else 0.0,
        "flow/tilt": beta * float(num_tokens.mean()),
    }
    if len(stationary):
        metrics["flow/log_z_stationary"] = float(stationary.mean())
        metrics["flow/log_z_gap"] = float((own - stationary).abs().mean())
    return metrics


def token_metrics(results: Iterable[MicroBatchResult]) -> dict[str, float]:
    """Entropy and drift over the response tokens of one training step.

    actor/ppo_kl       mean of log pi_old - log pi, how far the mini-batches moved the policy
    head/dropped_mass  largest softmax mass the head's backward left out of any row
    """
    entropy, drift, dropped = [], [], []
    for result in results:
        mask, old = result.batch.response_mask, result.batch.old_logprobs
        entropy.append(result.entropy[mask].double())
        if old is None:
            drift.append(torch.zeros_like(entropy[-1]))
        else:  # a rollout engine's may be missing, see mismatch/nonfinite_tokens
            known = mask & old.isfinite()
            drift.append(old[known].double() - result.logprobs[known].double())
        if result.dropped_mass is not None:
            dropped.append(result.dropped_mass)
    metrics = {
        "actor/entropy": float(torch.cat(entropy).mean()),
        "actor/ppo_kl": float(torch.cat(drift).mean()),
    }
    if dropped:
        metrics["head/dropped_mass"] = float(torch.cat(dropped).max())
    return metrics


def mismatch_metrics(results: Iterable[MicroBatchResult]) -> dict[str, float]:
    """The policy, before any update, against the rollout engine on the tokens it sampled.

    With d = log pi_policy - log pi_rollout of a token:

    mismatch/kl                estimate of KL(rollout || policy) per token, the mean of
                               exp(d) - 1 - d (k3 of http://joschu.net/blog/kl-approx.html)
    mismatch/ess, ess_sequence effective sample size of exp(d) over tokens, of its products over
                               sequences, as shares of their numbers
    mismatch/nonfinite_tokens  number of tokens whose d is not finite; the others leave them out
    """
    tokens, sequences, num_nonfinite = [], [], 0
    for result in results:
        batch = result.batch
        difference = result.logprobs.double() - batch.rollout_logprobs.double()
        is_bad = batch.response_mask & ~difference.isfinite()
        num_nonfinite += int(is_bad.sum())
        tokens.append(difference[batch.response_mask & ~is_bad])
        of_sequence = torch.segment_reduce(
            torch.where(batch.response_mask, difference, 0.0),
            "sum",
            offsets=batch.cu_seqlens.long(),
            unsafe=True,
        )
        sequences.append(of_sequence[of_sequence.isfinite()])
    metrics = {"mismatch/nonfinite_tokens": float(num_nonfinite)}
    difference = torch.cat(tokens)
    if len(difference):
        metrics |= {
            "mismatch/logprob_abs_diff_mean": float(difference.abs().mean()),
            "mismatch/logprob_abs_diff_max": float(difference.abs().max()),
            "mismatch/kl": float((difference.exp() - 1 - difference).mean()),
            "mismatch/ess": effective_sample_size(difference),
            "mismatch/ess_sequence": effective_sample_size(torch.cat(sequences)),
        }
    return metrics


def rollout_metrics(
    samples: Sequence[Sample], texts: Sequence[str], correct_threshold: float
) -> dict[str, float]:
    """Scores, lengths, and how alive the groups are.

    flow/zero_variance_groups  share of groups whose responses all scored the same
    flow/distinct_correct      mean number of different correct responses per group
    """
    groups: dict[int, list[int]] = {}
    for i, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(i)
    is_correct = [s.score >= correct_threshold for s in samples]
    is_flat = [len({samples[i].score for i in members}) == 1 for members in groups.values()]
    distinct = [len({texts[i].strip() for i in m if is_correct[i]}) for m in groups.values()]
    return {
        **mean_min_max("critic/score", [s.score for s in samples]),
        **mean_min_max("critic/rewards", [s.reward for s in samples]),
        **mean_min_max("response_length", [float(len(s.response_ids)) for s in samples]),
        **mean_min_max("prompt_length", [float(len(s.prompt_ids)) for s in samples]),
        "response_length/clip_ratio": sum(s.is_truncated for s in samples) / len(samples),
        "critic/accuracy": sum(is_correct) / len(samples),
        "flow/zero_variance_groups": sum(is_flat) / len(groups),
        "flow/distinct_correct": sum(distinct) / len(groups),
    }


def throughput_metrics(samples: Sequence[Sample], elapsed_s: float) -> dict[str, float]:
    """Tokens of the step, seconds it took, and tokens per second."""
    num_tokens = sum(s.num_tokens for s in samples)
    return {
        "timing_s/step": elapsed_s,
        "perf/total_num_tokens": num_tokens,
        "perf/time_per_step": elapsed_s,
        "perf/throughput": num_tokens / elapsed_s,
    }
