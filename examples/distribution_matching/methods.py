"""The methods under comparison: the settings of each, and what it is supposed to converge to.

All but one are settings of flowrl. Trajectory balance without length normalisation is no objective
of the library; its loss and its training step stand here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from exact import flow_target, trajectory_balance_target
from torch import Tensor

from flowrl.batch import PackedBatch
from flowrl.evaluate import score_responses
from flowrl.interface import Objective, TokenOutputs
from flowrl.objectives.output import ObjectiveOutput
from flowrl.parts import step_seed
from flowrl.run import Run
from flowrl.train import make_samples, mini_batches, set_logprobs, training_step

GROUP_SIZE = 8
PUBLISHED_BETA = 15.0
# About 3 nats a unit of normalised reward on answers of 6 tokens, the rule of docs/objective.md.
FLOW_BETA = 0.5
# Tilts right against wrong as FlowRL's own target at FLOW_BETA does, by 5.7 to 6.3 nats.
BALANCE_BETA = 6.0
# As strong as FlowRL's pull to the reference, which is 1 / (beta |y|) a token against an advantage.
KL_COEF = 0.36

# (reference log-probs, is_right, lengths) -> stationary log-probs, all [R + 1]
Target = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """How to train, and towards what; `target` is None where no stationary point is known."""

    label: str
    overrides: tuple[str, ...]
    step: Callable[[Run], object] = training_step
    target: Target | None = None


def balance_objective(beta: float) -> Objective:
    """Trajectory balance on whole sequences (arXiv 2509.15207, Eq. 5).

    loss_sum = sum over sequences of (log Z + sum m (log pi - log pi_ref) - beta r)^2, r as scored.
    """

    def objective(
        batch: PackedBatch, outputs: TokenOutputs, log_z: Tensor | None
    ) -> ObjectiveOutput:
        assert batch.ref_logprobs is not None and log_z is not None
        sequence = torch.arange(batch.num_sequences).repeat_interleave(batch.cu_seqlens.diff())
        log_ratios = torch.where(batch.loss_mask, outputs.logprobs - batch.ref_logprobs, 0.0)
        log_ratio = torch.zeros_like(log_z).index_add(0, sequence, log_ratios)
        residual = log_z + log_ratio - beta * batch.rewards
        return ObjectiveOutput(
            residual.square().sum(), "sequences", {"residual": residual.detach()}
        )

    return objective


def balance_step(run: Run) -> None:
    """A step of trajectory balance: flowrl's training step with this loss and the plain reward."""
    torch.manual_seed(step_seed(run.config.trainer.seed, run.step))
    prompts, responses = run.lookahead.take(run.step, 0)
    _, scores = score_responses(run.tokenizer, run.rewards, prompts, responses)
    samples = make_samples(prompts, responses, scores, run.config.algorithm.unbiased_std)
    for sample in samples:
        sample.reward = sample.score
    set_logprobs(samples, "ref_logprobs", run.parts.reference_logprobs(samples))
    for mini_batch in mini_batches(run, samples):
        run.policy.accumulate_gradients(mini_batch, balance_objective(BALANCE_BETA))
        run.policy.optimizer.step(run.step)
    run.engine.publish(run.policy.named_weights(), version=run.step + 1)
    run.step += 1


def _flow(preset: str, beta: float) -> Method:
    def target(ref_logprobs: Tensor, is_right: Tensor, lengths: Tensor) -> Tensor:
        return flow_target(ref_logprobs, is_right, lengths, beta, GROUP_SIZE)

    overrides = (f"flow.preset={preset}", f"flow.beta={beta}")
    return Method(f"FlowRL {preset}, beta {beta:g}", overrides, target=target)


def _balance_target(ref_logprobs: Tensor, is_right: Tensor, lengths: Tensor) -> Tensor:
    return trajectory_balance_target(ref_logprobs, is_right, BALANCE_BETA)


METHODS: dict[str, Method] = {
    "flow_paper": _flow("paper", FLOW_BETA),
    "flow_original": _flow("original", FLOW_BETA),
    "flow_recipe": _flow("recipe", FLOW_BETA),
    "flow_cispo": _flow("cispo", FLOW_BETA),
    "flow_paper_15": _flow("paper", PUBLISHED_BETA),
    "balance": Method(
        f"trajectory balance, beta {BALANCE_BETA:g}", (), balance_step, _balance_target
    ),
    "grpo": Method("GRPO", ("algorithm.objective=grpo",)),
    "grpo_kl": Method(
        f"GRPO, KL {KL_COEF:g}",
        ("algorithm.objective=grpo", "actor.use_kl_loss=true", f"actor.kl_loss_coef={KL_COEF}"),
    ),
    "ppo": Method("PPO", ("algorithm.objective=ppo",)),
    "reinforce_pp": Method("REINFORCE++", ("algorithm.objective=reinforce_pp",)),
}
