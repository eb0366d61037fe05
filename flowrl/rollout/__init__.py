"""Rollout engines: prompts in, sampled responses with their log-probs out.

Every engine offers `generate`, `begin`, `publish` and `weight_version`; the training loop knows no
more.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """What to sample: `n` responses per prompt from softmax(logits / temperature)."""

    n: int = 1
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = -1
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()  # a response ends with, and keeps, the first of these strings


@dataclass(frozen=True)
class Response:
    """One sampled response."""

    token_ids: list[int]  # [|y|], the end token or stop string included
    logprobs: list[float]  # [|y|], of the distribution that was really sampled from
    finish_reason: Literal["stop", "length"]
    weight_version: int  # of the weights that produced it, or its last token
    token_versions: list[int] | None = None  # [|y|], of a response from several weights

    @property
    def versions(self) -> list[int]:
        """[|y|], of the weights that produced each token."""
        if self.token_versions is None:
            return [self.weight_version] * len(self.token_ids)
        return self.token_versions


class RolloutEngine(Protocol):
    """What the training loop asks of an engine."""

    weight_version: int

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> list[list[Response]]:
        """Sample `params.n` responses for every prompt; the same seed gives the same responses."""
        ...

    def begin(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seed: int
    ) -> Callable[[], list[list[Response]]]:
        """Start what `generate` does, and return what waits for its result.

        An engine with processes of its own samples meanwhile; until the result was waited for,
        nothing else may be asked of it. The others are done when this returns.
        """
        ...

    def publish(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take new weights, all or none; later responses carry `version`."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...
