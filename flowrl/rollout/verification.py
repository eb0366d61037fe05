"""Whether the rollout engine has the policy's weights, seen from the log-probs of both.

The engine samples a few short responses with its own kernels and cache; the policy then scores
them. Numerics leave a small difference, weights of another step or a stale cache a larger one. An
update too small to move log-probs beyond the numerics cannot be seen from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flowrl.batch import Sample
from flowrl.interface import Policy
from flowrl.rollout import RolloutEngine, SamplingParams

NUM_PROBES, NUM_TOKENS = 8, 16
SEED = 0


@dataclass(frozen=True)
class Agreement:
    """|log pi_policy - log pi_engine| over the tokens of the probes, in nats."""

    mean: float
    max: float


# Several times what a sound engine shows: docs/rollout.md has the measurements.
BOUNDS = {"float32": Agreement(1e-3, 1e-2), "bfloat16": Agreement(0.1, 1.0)}


def agreement(
    engine: RolloutEngine,
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    max_tokens: int,
) -> Agreement:
    """Let the engine sample from the first prompts, and measure the policy against its log-probs.

    Where the policy spans ranks, every rank makes the call and gets the same result.
    """
    probes = prompts[:NUM_PROBES]
    params = SamplingParams(temperature=temperature, max_tokens=min(max_tokens, NUM_TOKENS))
    groups = engine.generate(probes, params, SEED)
    samples = [
        Sample(list(prompt), response.token_ids, response.logprobs, group_id=place)
        for place, (prompt, (response,)) in enumerate(zip(probes, groups, strict=True))
    ]
    policy_logprobs = torch.cat(policy.logprobs(samples)).double()
    rollout_logprobs = torch.tensor(
        [value for sample in samples for value in sample.rollout_logprobs], dtype=torch.float64
    )
    difference = (policy_logprobs - rollout_logprobs).abs()
    return Agreement(float(difference.mean()), float(difference.max()))


def check_agreement(found: Agreement, dtype: str, version: int) -> None:
    """Raise RuntimeError when the engine's log-probs are further from the policy's than numerics.

    A difference that is not a number is one as well.
    """
    bound = BOUNDS[dtype]
    if found.mean <= bound.mean and found.max <= bound.max:
        return
    raise RuntimeError(
        f"step {version}: the rollout engine does not sample from the policy: their log-probs "
        f"differ by {found.mean:.2g} nats a token in the mean and {found.max:.2g} at most, beyond "
        f"{bound.mean:g} and {bound.max:g} in {dtype}; check that engine and policy have one "
        "model.path and that the weights arrived, or set rollout.verify_weights=false"
    )
