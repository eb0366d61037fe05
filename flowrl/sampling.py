"""Dynamic sampling: groups whose scores all agree teach nothing and make room for others.

DAPO (arXiv 2503.14476, section 3.2). Prompts are drawn in batches of `data.train_batch_size` until
as many groups are of use; the batches' seeds depend on (seed, step, batch), so that a resumed run
repeats an uninterrupted one. Groups of the last batch that are not needed are given up, not kept
for the next step, whose policy is another; their prompts come again in the next epoch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowrl.rewards import RewardResult
from flowrl.rewards.pool import FAILURES
from flowrl.rollout import Response
from flowrl.settings import Config
from flowrl.tasks import TokenizedPrompt


@dataclass(frozen=True)
class Group:
    """One prompt with its responses and what the verifier says of them."""

    prompt: TokenizedPrompt
    responses: list[Response]
    texts: list[str]
    scores: list[RewardResult]

    @property
    def is_of_use(self) -> bool:
        """Whether the verifier's scores differ; what shapes them afterwards does not count."""
        return len({result.score for result in self.scores}) > 1


def make_groups(
    prompts: Sequence[TokenizedPrompt],
    responses: Sequence[list[Response]],
    texts: Sequence[str],
    scores: Sequence[RewardResult],
) -> list[Group]:
    """Cut texts and scores, one per response, into the groups of the prompts."""
    groups, first = [], 0
    for prompt, answers in zip(prompts, responses, strict=True):
        last = first + len(answers)
        groups.append(Group(prompt, answers, list(texts[first:last]), list(scores[first:last])))
        first = last
    assert first == len(texts) == len(scores)
    return groups


def collect_groups(
    config: Config, draw: Callable[[int], list[Group]]
) -> tuple[list[Group], dict[str, float]]:
    """The groups of a training step; `draw(i)` gives those of the step's i-th batch of prompts.

    Without algorithm.filter_groups that is the first batch, and there are no metrics. With it:

    train/num_gen_batches  batches drawn
    train/dropped_groups   share of the drawn groups whose scores agree
    train/leftover_groups  share that was of use but not needed
    train/gen_score        mean score of all drawn responses; critic/score is of the chosen ones
    reward/*               failures among all drawn responses

    Raises ValueError when max_num_gen_batches hold too few groups of use.
    """
    needed, limit = config.data.train_batch_size, config.algorithm.filter_groups.max_num_gen_batches
    if not config.algorithm.filter_groups.enable:
        return draw(0), {}
    drawn: list[Group] = []
    of_use: list[Group] = []
    num_batches = 0
    while len(of_use) < needed:
        if num_batches == limit:
            scores = [result.score for group in drawn for result in group.scores]
            raise ValueError(
                f"algorithm.filter_groups: the scores of only {len(of_use)} of {len(drawn)} groups "
                f"differ, in {limit} batches of prompts, but data.train_batch_size = {needed} such "
                f"groups are needed (mean score {sum(scores) / len(scores):.3g}); raise "
                "algorithm.filter_groups.max_num_gen_batches or rollout.n, or choose prompts that "
                "are neither too hard nor too easy. The last checkpoint is not affected"
            )
        drawn += draw(num_batches)
        of_use = [group for group in drawn if group.is_of_use]
        num_batches += 1
    results = [result for group in drawn for result in group.scores]
    metrics = {
        "train/num_gen_batches": float(num_batches),
        "train/dropped_groups": 1 - len(of_use) / len(drawn),
        "train/leftover_groups": (len(of_use) - needed) / len(drawn),
        "train/gen_score": sum(result.score for result in results) / len(results),
    }
    for failure in FAILURES:
        num_failed = sum(result.failure == failure for result in results)
        metrics[f"reward/{failure}"] = num_failed / len(results)
    return of_use[:needed], metrics
