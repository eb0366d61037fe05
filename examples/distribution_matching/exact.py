"""Exact distributions over the answers of the task `sums`, and exact distances between them.

The answers to "N=" are cut into cells: each right answer, each wrong "a+b" with a and b in
1 .. N-1, and one last cell for everything else. The mass of the last cell is exact as well, being
what is left of 1; a divergence between two distributions over the cells is exact but for what the
answers inside the last cell differ by, so it is a lower bound and tight while that mass is small.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.policy.enumerate import response_distribution
from flowrl.tasks.sums import sums_answers

BISECTIONS = 60  # an interval shrinks by 1e-18, beyond float64
LEAST_MASS = 1e-15  # the last cell is a difference of float64 sums near 1
SAMPLE_COUNTS = (4, 16, 64)  # k of pass@k
NUM_DRAWN = 16  # of the expected number of different right answers


@dataclass(frozen=True)
class Cells:
    """The cells of one prompt. R responses, of which the first `num_right` are right, and a rest.

    lengths: [R + 1] float64, tokens with the end token; the rest is taken to be as long as the
    longest of the others.
    is_right: [R + 1] float64, 1 or 0.
    """

    target: int
    prompt_ids: list[int]
    answers: list[str]
    responses: list[list[int]]
    lengths: Tensor
    is_right: Tensor

    @property
    def num_right(self) -> int:
        return self.target - 1


def cells_of(tokenizer: PreTrainedTokenizerBase, target: int) -> Cells:
    """The cells of the prompt "target="."""
    right = sums_answers(target)
    numbers = range(1, target)
    wrong = [f"{a}+{b}" for a in numbers for b in numbers if a + b != target]
    answers = [*right, *wrong]
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    encoded = tokenizer(answers, add_special_tokens=False)["input_ids"]
    responses = [[*ids, end] for ids in encoded]
    lengths = [len(response) for response in responses]
    return Cells(
        target=target,
        prompt_ids=tokenizer.encode(f"{target}=", add_special_tokens=False),
        answers=answers,
        responses=responses,
        lengths=torch.tensor([*lengths, max(lengths)], dtype=torch.float64),
        is_right=torch.tensor([1.0] * len(right) + [0.0] * (len(wrong) + 1), dtype=torch.float64),
    )


def cell_logprobs(model: PreTrainedModel, cells: Cells) -> Tensor:
    """log pi of every cell, [R + 1] float64; the last is the rest."""
    logprobs = response_distribution(model, cells.prompt_ids, cells.responses)
    rest = (1 - logprobs.exp().sum()).clamp(min=LEAST_MASS).log()
    return torch.cat([logprobs, rest[None]])


def right_logprobs(model: PreTrainedModel, cells: Cells) -> Tensor:
    """log pi of the right answers alone, [N - 1] float64: some thirty times cheaper."""
    return response_distribution(model, cells.prompt_ids, cells.responses[: cells.num_right])


def divergence(logprobs: Tensor, other: Tensor) -> float:
    """KL(p || q) = sum p (log p - log q), in nats."""
    return float((logprobs.exp() * (logprobs - other)).sum())


def conditional(logprobs: Tensor) -> Tensor:
    """Renormalise to a distribution."""
    return logprobs - logprobs.logsumexp(0)


def answer_measures(logprobs: Tensor, ref_logprobs: Tensor) -> dict[str, float]:
    """What the probabilities [N - 1] of the right answers say, beside the reference's.

    success            p = sum of them
    effective_answers  exp of the entropy of the distribution over right answers
    kl_right           KL of that distribution to the reference's own
    pass@k             1 - (1 - p)^k
    distinct@16        different right answers expected among 16 samples, sum 1 - (1 - p_y)^16
    """
    share, ref_share = conditional(logprobs), conditional(ref_logprobs)
    success = min(float(logprobs.exp().sum()), 1.0)
    measures = {
        "success": success,
        "effective_answers": math.exp(-float((share.exp() * share).sum())),
        "kl_right": divergence(share, ref_share),
    }
    for count in SAMPLE_COUNTS:
        measures[f"pass@{count}"] = 1 - (1 - success) ** count
    missed = (1 - logprobs.exp()).clamp(min=0) ** NUM_DRAWN
    measures[f"distinct@{NUM_DRAWN}"] = float((1 - missed).sum())
    return measures


def trajectory_balance_target(ref_logprobs: Tensor, is_right: Tensor, beta: float) -> Tensor:
    """pi_ref exp(beta r) / Z, as log-probs [R + 1]: where trajectory balance has residual 0."""
    return conditional(ref_logprobs + beta * is_right)


def expected_rewards(success: float, group_size: int) -> tuple[float, float]:
    """The group-normalised reward that a right and a wrong answer expect.

    r^ = (r - mean) / (std + 1e-6), unbiased, over a group whose other group_size - 1 answers are
    right with probability `success` each. Exact: a sum over the binomial number of right ones.
    """
    others = group_size - 1
    expected = [0.0, 0.0]
    for num_right in range(others + 1):
        chance = (
            math.comb(others, num_right)
            * success**num_right
            * (1 - success) ** (others - num_right)
        )
        for reward in (0, 1):
            mean = (num_right + reward) / group_size
            std = math.sqrt(group_size * mean * (1 - mean) / others)
            expected[reward] += chance * (reward - mean) / (std + 1e-6) if std > 0 else 0.0
    return expected[1], expected[0]


def flow_target(
    ref_logprobs: Tensor, is_right: Tensor, lengths: Tensor, beta: float, group_size: int
) -> Tensor:
    """FlowRL's stationary distribution, as log-probs [R + 1].

    The expected gradient of the loss on its own samples vanishes for every answer and for Z where

        pi(y) = pi_ref(y) exp( |y| (beta E[r^ | y] - log Z) ),

    the expectation being over the rest of the group, so that it depends on pi's own success. Two
    bisections, one inside the other, find the log Z that makes pi sum to 1 and that success.
    """
    # The tilt depends on length and reward alone, so the search needs the few masses of these.
    kinds, kind = torch.stack([lengths, is_right], 1).unique(dim=0, return_inverse=True)
    masses = torch.zeros(len(kinds), dtype=torch.float64)
    masses.index_add_(0, kind, ref_logprobs.exp())
    rows = [
        (mass, length, right > 0)
        for mass, (length, right) in zip(masses.tolist(), kinds.tolist(), strict=True)
    ]
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        success = (low + high) / 2
        rewards = expected_rewards(success, group_size)
        log_z = _log_z(rows, beta, rewards)
        reached = sum(
            mass * math.exp(length * (beta * rewards[0] - log_z))
            for mass, length, right in rows
            if right
        )
        low, high = (success, high) if reached > success else (low, success)
    rewards = right, wrong = expected_rewards((low + high) / 2, group_size)
    tilt = beta * (wrong + (right - wrong) * is_right) - _log_z(rows, beta, rewards)
    return conditional(ref_logprobs + lengths * tilt)


def _log_z(
    rows: list[tuple[float, float, bool]], beta: float, rewards: tuple[float, float]
) -> float:
    """The log Z with which pi_ref exp(|y| (beta r^ - log Z)) sums to 1.

    rows: mass under pi_ref, length, is right. rewards: what a right and a wrong answer expect.
    """
    # The sum is at least 1 at the lower bound, since every exponent is >= 0, and at most 1 at the
    # upper one.
    low, high = beta * rewards[1], beta * rewards[0]
    for _ in range(BISECTIONS):
        log_z = (low + high) / 2
        total = math.fsum(
            mass * math.exp(min(length * (beta * rewards[not right] - log_z), 700.0))
            for mass, length, right in rows
        )
        low, high = (log_z, high) if total > 1 else (low, log_z)
    return (low + high) / 2
