"""Responses that are sampled while earlier steps train: overlap and partial rollouts in one rule.

`rollout.max_staleness` = K says how many training steps may lie between the weights that sampled a
token and the step that trains on it. Every training step runs one round, from the weights that it
starts with: one batch of prompts is added, and each unfinished response grows by up to 1/K of
data.max_response_length tokens. K = 1 samples the next batch while this one trains; K > 1 carries
responses over, their tokens from several weights, so that no round waits for a whole long response.

Engines with machines of their own run the round aside; others run it before the update, with the
same result: what is sampled depends on the schedule alone, and a resumed run repeats it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from flowrl.parts import step_seed
from flowrl.rollout import Response, RolloutEngine, SamplingParams
from flowrl.tasks import PromptSampler, TokenizedPrompt


@dataclass
class Batch:
    """The prompts of one training step, with what has been sampled for them so far."""

    places: list[int]  # of the prompts among all
    responses: list[list[Response]]  # n for each prompt; a new one has no tokens


@dataclass(frozen=True)
class Round:
    """A call of the engine and where its responses belong."""

    wait: Callable[[], list[list[Response]]]
    spots: list[tuple[Batch, int, int]]  # batch, prompt, response


@dataclass(frozen=True)
class SavedState:
    """What a checkpoint keeps, in types that JSON keeps."""

    num_rounds: int
    batches: list[Batch]


STATE = TypeAdapter(SavedState)


@dataclass
class Lookahead:
    """Gives every training step its prompts and responses. On many ranks each makes the same calls.

    Not more than max_staleness batches lie ahead, and a batch is whole after as many rounds, so no
    token is staler than that.
    """

    engine: RolloutEngine
    sampler: PromptSampler
    prompts: Sequence[TokenizedPrompt]
    sampling: SamplingParams  # of whole responses
    seed: int
    max_staleness: int
    num_rounds: int = 0
    batches: deque[Batch] = field(default_factory=deque)  # in the order in which steps take them
    round: Round | None = None  # the one that runs

    def take(self, step: int, draw: int) -> tuple[list[TokenizedPrompt], list[list[Response]]]:
        """Prompts and their responses; `draw` counts what the step has taken before.

        Further draws, of dynamic sampling, are sampled now, and so is everything when
        max_staleness is 0, once what an earlier run left is used up.
        """
        if draw > 0 or (self.max_staleness == 0 and not self.batches):
            batch = Batch(self.sampler.next_batch(), [])
            seed = step_seed(self.seed, step, draw)
            batch.responses = self.engine.generate(self._texts(batch), self.sampling, seed)
        else:
            self.num_rounds = max(self.num_rounds, step)
            while not self.batches or self._unfinished([self.batches[0]]):
                self.begin()
                self.finish()
            batch = self.batches.popleft()
        return [self.prompts[place] for place in batch.places], batch.responses

    def begin(self) -> None:
        """Start a round."""
        assert self.round is None, "a round is running"
        if len(self.batches) < max(1, self.max_staleness):
            new = Response([], [], "length", self.engine.weight_version)
            places = self.sampler.next_batch()
            self.batches.append(Batch(places, [[new] * self.sampling.n for _ in places]))
        spots = self._unfinished(self.batches)
        if not spots:
            return
        longest = max(len(batch.responses[i][j].token_ids) for batch, i, j in spots)
        limit = self.sampling.max_tokens // max(1, self.max_staleness)
        limit = min(limit, self.sampling.max_tokens - longest)
        if longest == 0:  # a new batch alone: the engine computes a shared prompt once
            texts, n = self._texts(self.batches[-1]), self.sampling.n
        else:
            texts = [
                [*self.prompts[batch.places[i]].token_ids, *batch.responses[i][j].token_ids]
                for batch, i, j in spots
            ]
            n = 1
        params = replace(self.sampling, n=n, max_tokens=limit)
        wait = self.engine.begin(texts, params, step_seed(self.seed, self.num_rounds))
        self.round = Round(wait, spots)
        self.num_rounds += 1

    def finish(self) -> None:
        """Wait for the round, if one runs; raises what the engine raises."""
        if self.round is None:
            return
        grown = [response for group in self.round.wait() for response in group]
        for (batch, i, j), more in zip(self.round.spots, grown, strict=True):
            batch.responses[i][j] = joined(batch.responses[i][j], more)
        self.round = None

    def state_dict(self) -> dict[str, Any]:
        """What lies ahead, in types that JSON keeps. No round may be running."""
        assert self.round is None, "a round is running"
        return STATE.dump_python(SavedState(self.num_rounds, list(self.batches)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises ValueError if it is damaged or has another number of responses per prompt.
        """
        try:
            saved = STATE.validate_python(state)
        except ValidationError as error:
            raise ValueError(
                "the checkpoint's responses that were sampled ahead are damaged, take an earlier "
                f"one: {error.errors()[0]['loc']}: {error.errors()[0]['msg']}"
            ) from error
        for batch in saved.batches:
            if len(batch.places) != len(batch.responses) or not all(
                0 <= place < len(self.prompts) for place in batch.places
            ):
                raise ValueError(
                    f"the checkpoint has {len(batch.responses)} prompts sampled ahead, at places "
                    f"{batch.places!r:.80} of {len(self.prompts)}: take an earlier one"
                )
            for group in batch.responses:
                longest = max((len(r.token_ids) for r in group), default=0)
                if longest > self.sampling.max_tokens:
                    raise ValueError(
                        f"the checkpoint has a response of {longest} tokens sampled ahead, beyond "
                        f"data.max_response_length = {self.sampling.max_tokens}: raise it"
                    )
                if len(group) != self.sampling.n:
                    raise ValueError(
                        f"the checkpoint has responses sampled ahead, {len(group)} per prompt, and "
                        f"rollout.n is {self.sampling.n}: resume with rollout.n={len(group)}"
                    )
        self.num_rounds, self.batches = saved.num_rounds, deque(saved.batches)

    def _texts(self, batch: Batch) -> list[list[int]]:
        return [self.prompts[place].token_ids for place in batch.places]

    def _unfinished(self, batches: Iterable[Batch]) -> list[tuple[Batch, int, int]]:
        return [
            (batch, i, j)
            for batch in batches
            for i, group in enumerate(batch.responses)
            for j, response in enumerate(group)
            if response.finish_reason == "length"
            and len(response.token_ids) < self.sampling.max_tokens
        ]


def joined(start: Response, more: Response) -> Response:
    """A response that goes on with tokens of other, or the same, weights."""
    return Response(
        token_ids=start.token_ids + more.token_ids,
        logprobs=start.logprobs + more.logprobs,
        finish_reason=more.finish_reason,
        weight_version=more.weight_version,
        token_versions=start.versions + more.versions,
    )


def staleness_metrics(responses: Iterable[Response], step: int) -> dict[str, float]:
    """How many training steps older than the policy the weights behind the tokens were.

    rollout/staleness, rollout/staleness_max  mean and maximum over the response tokens
    """
    staleness = [step - version for response in responses for version in response.versions]
    return {
        "rollout/staleness": sum(staleness) / len(staleness),
        "rollout/staleness_max": float(max(staleness)),
    }
