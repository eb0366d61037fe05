"""What the training loop asks of a policy, in one process or spread over many."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowrl.batch import PackedBatch, Sample
from flowrl.objectives.output import Normalizer, ObjectiveOutput


@dataclass
class TokenOutputs:
    """What a forward pass gives the objective. N packed tokens."""

    logprobs: Tensor  # [N] float32; entry i is the log-prob of token i, 0 outside responses
    entropy: Tensor  # [N] float32, of the distribution that token i was drawn from
    hidden: Tensor  # [U, H] post-norm states of the trunk's rows
    dropped_mass: Tensor | None  # [R] float32, filled by the backward when drop_mass > 0


# (batch, outputs, log_z [B]) -> loss_sum and diagnostics; log_z is None without a network
Objective = Callable[[PackedBatch, TokenOutputs, Tensor | None], ObjectiveOutput]


# (batch, values [N]) -> loss_sum and diagnostics
ValueObjective = Callable[[PackedBatch, Tensor], ObjectiveOutput]


@dataclass
class MicroBatchResult:
    """What one micro-batch leaves for the metrics."""

    batch: PackedBatch
    output: ObjectiveOutput
    log_z: Tensor | None  # [B]
    logprobs: Tensor  # [N] float32
    entropy: Tensor  # [N] float32, 0 outside responses
    dropped_mass: Tensor | None  # [R] over response tokens


class Optimizer(Protocol):
    """The update of a policy's, or a critic's, parameters."""

    @property
    def lr(self) -> float:
        """The policy's learning rate at the last update."""
        ...

    def step(self, training_step: int) -> tuple[float, bool]:
        """Update; return the gradient norm and whether it was finite, so the update was made."""
        ...


class Policy(Protocol):
    """A trainable policy. Where it spans ranks, every rank makes every call with equal samples."""

    @property
    def optimizer(self) -> Optimizer: ...

    def logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Response log-probs [|y|] per sample, without gradient."""
        ...

    def accumulate_gradients(
        self, samples: Sequence[Sample], objective: Objective
    ) -> list[MicroBatchResult]:
        """Add the gradient of the objective over one mini-batch; the results cover all of it."""
        ...

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights a rollout engine samples from, by HF name."""
        ...


class Critic(Protocol):
    """PPO's V(s). Where it spans ranks, every rank makes every call with equal samples."""

    @property
    def optimizer(self) -> Optimizer: ...

    def set_values(self, samples: Sequence[Sample]) -> None:
        """Give every sample the values of its tokens, [|y|], without gradient."""
        ...

    def accumulate_gradients(self, samples: Sequence[Sample], objective: ValueObjective) -> float:
        """Add the gradient of the objective over one mini-batch and return its loss."""
        ...


def normalizer_count(normalizer: Normalizer, samples: Sequence[Sample]) -> float:
    """What the loss sum of a mini-batch is divided by."""
    if normalizer == "sequences":
        return len(samples)
    if normalizer == "tokens":
        return max(sum(s.num_loss_tokens for s in samples), 1)
    return normalizer
