"""The numbers of an evaluation: estimates with bootstrap intervals, by task and by source."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flowrl.diversity import answer_entropy, distinct_n, num_distinct, self_bleu, solution_form
from flowrl.evaluation.estimators import majority_at_k, pass_at_k
from flowrl.evaluation.generations import Generation
from flowrl.evaluation.grade import Grade, Grades, names_answers
from flowrl.evaluation.rating import estimate_rating
from flowrl.evaluation.tasks import EvalPrompt
from flowrl.intervals import Accuracy, bootstrap_interval

BY_PROMPT = "by prompt"


@dataclass(frozen=True)
class GraderResult:
    """What one grader says: avg@n, pass@k and maj@k by k, greedy.

    maj@k and no_answer are those of the prompts whose answers can be compared: programs have none.
    maj@k is empty without any answer.
    """

    avg: Accuracy
    pass_at: dict[int, Accuracy]
    majority_at: dict[int, Accuracy]
    greedy: Accuracy | None
    no_answer: float  # share of the sampled responses
    failures: dict[str, int]  # of all responses, by kind


@dataclass(frozen=True)
class GroupResult:
    """A task, or its prompts of one data source; `graders` has the one that counts first."""

    task: str
    source: str  # "all" for the whole task
    note: str
    num_prompts: int
    num_samples: int  # per prompt
    truncated: float  # share of the sampled responses that reached the token limit
    mean_tokens: float
    graders: dict[str, GraderResult]
    diversity: dict[str, Accuracy]
    rating: Accuracy | None = None
    judge: Accuracy | None = None


@dataclass
class Answers:
    """The responses to one prompt."""

    prompt: EvalPrompt
    samples: list[Generation] = field(default_factory=list)
    greedy: list[Generation] = field(default_factory=list)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({*(2**i for i in range(n.bit_length())), n})


def collect(prompts: Sequence[EvalPrompt], generations: Sequence[Generation]) -> list[Answers]:
    """The responses by prompt, in the order of the prompts."""
    by_id = {(p.task, p.prompt_id): Answers(p) for p in prompts}
    for generation in generations:
        answers = by_id[generation.task, generation.prompt_id]
        (answers.samples if generation.decoding == "sample" else answers.greedy).append(generation)
    return list(by_id.values())


def summarise(
    task: str,
    note: str,
    answers: Sequence[Answers],
    grades: Grades,
    judge_scores: dict[str, float],
) -> list[GroupResult]:
    """The results of one task, and of each of its data sources if it has several.

    judge_scores: by prompt id, of the prompts that a judge has scored.
    """
    groups = {"all": list(answers)}
    sources = sorted({a.prompt.prompt.data_source for a in answers})
    if len(sources) > 1:
        for source in sources:
            groups[source] = [a for a in answers if a.prompt.prompt.data_source == source]
    return [
        _summarise_group(task, source, note, members, grades, judge_scores)
        for source, members in groups.items()
    ]


def _summarise_group(
    task: str,
    source: str,
    note: str,
    members: Sequence[Answers],
    grades: Grades,
    judge_scores: dict[str, float],
) -> GroupResult:
    samples = [g for a in members for g in a.samples]
    names = members[0].prompt.graders
    if any(a.prompt.graders != names for a in members):
        names = (BY_PROMPT,)  # a file of mixed origin
    graders = {name: _summarise_grader(members, name, grades) for name in names}
    judged = [judge_scores[i] for a in members if (i := a.prompt.prompt_id) in judge_scores]
    return GroupResult(
        task=task,
        source=source,
        note=note,
        num_prompts=len(members),
        num_samples=len(members[0].samples),
        truncated=sum(g.finish_reason == "length" for g in samples) / len(samples),
        mean_tokens=sum(g.num_tokens for g in samples) / len(samples),
        graders=graders,
        diversity=_diversity(members, grades),
        rating=_rating(members, grades),
        judge=bootstrap_interval(judged) if judged else None,
    )


def _lookup(name: str, grades: Grades) -> Callable[[Answers, Generation], Grade]:
    """The verdicts of a grader, or of the one that counts for each prompt."""
    if name == BY_PROMPT:
        return lambda a, g: grades[a.prompt.graders[0]][g.key]
    return lambda a, g: grades[name][g.key]


def _has_answers(answers: Answers, name: str) -> bool:
    """Whether the grader, or the one that counts for the prompt, names answers."""
    return names_answers(answers.prompt.graders[0] if name == BY_PROMPT else name)


def _summarise_grader(members: Sequence[Answers], name: str, grades: Grades) -> GraderResult:
    n = len(members[0].samples)
    verdict_of = _lookup(name, grades)
    verdicts = [[verdict_of(a, g) for g in a.samples] for a in members]
    correct = [sum(v.is_correct for v in own) for own in verdicts]
    everything = [verdict_of(a, g) for a in members for g in (*a.samples, *a.greedy)]
    failures: dict[str, int] = {}
    for verdict in everything:
        if verdict.failure is not None:
            failures[verdict.failure] = failures.get(verdict.failure, 0) + 1
    voting = [own for a, own in zip(members, verdicts, strict=True) if _has_answers(a, name)]
    majority_at = {}
    if any(v.answer_class is not None for v in everything):
        majority_at = {
            k: bootstrap_interval([_majority(own, k) for own in voting]) for k in powers_of_two(n)
        }
    greedy = [float(verdict_of(a, g).is_correct) for a in members for g in a.greedy]
    silent = sum(v.answer_class is None for own in voting for v in own)
    return GraderResult(
        avg=bootstrap_interval([c / n for c in correct]),
        pass_at={
            k: bootstrap_interval([pass_at_k(n, c, k) for c in correct]) for k in powers_of_two(n)
        },
        majority_at=majority_at,
        greedy=bootstrap_interval(greedy) if greedy else None,
        no_answer=silent / (n * len(voting)) if voting else 0.0,
        failures=failures,
    )


def _majority(verdicts: Sequence[Grade], k: int) -> float:
    correct_by_class: dict[str, list[bool]] = {}
    for verdict in verdicts:
        if verdict.answer_class is not None:
            correct_by_class.setdefault(verdict.answer_class, []).append(verdict.is_correct)
    sizes = [len(own) for own in correct_by_class.values()]
    scores = [sum(own) / len(own) for own in correct_by_class.values()]
    return majority_at_k(sizes, scores, len(verdicts), k)


def _diversity(members: Sequence[Answers], grades: Grades) -> dict[str, Accuracy]:
    """Means over prompts of what flowrl/diversity.py measures, by the grader that counts.

    What is said of answers is a mean over the prompts that have any: programs have none.
    """
    of_answers: dict[str, Callable[[list[Grade]], float]] = {
        "distinct_correct_answers": lambda v: num_distinct(
            [x.answer_class for x in v if x.is_correct]
        ),
        "answer_entropy": lambda v: answer_entropy([x.answer_class for x in v]),
        "effective_answers": lambda v: math.exp(answer_entropy([x.answer_class for x in v])),
    }
    measures: dict[str, Callable[[list[Generation], list[Grade]], float]] = {
        "distinct_correct_forms": lambda g, v: num_distinct(
            [solution_form(x.response) for x, y in zip(g, v, strict=True) if y.is_correct]
        ),
        "distinct_forms": lambda g, v: num_distinct([solution_form(x.response) for x in g]),
        "distinct_2": lambda g, v: distinct_n([x.response for x in g], 2),
    }
    if len(members[0].samples) > 1:
        measures["self_bleu"] = lambda g, v: self_bleu([x.response for x in g])
    verdict_of = _lookup(BY_PROMPT, grades)
    graded = [(a.samples, [verdict_of(a, g) for g in a.samples]) for a in members]
    diversity = {
        name: bootstrap_interval([measure(*own) for own in graded])
        for name, measure in measures.items()
    }
    answered = [
        verdicts
        for a, (_, verdicts) in zip(members, graded, strict=True)
        if _has_answers(a, BY_PROMPT)
    ]
    if any(v.answer_class is not None for verdicts in answered for v in verdicts):
        diversity |= {
            name: bootstrap_interval([measure(v) for v in answered])
            for name, measure in of_answers.items()
        }
    return diversity


def _rating(members: Sequence[Answers], grades: Grades) -> Accuracy | None:
    """A rating, if the prompts are Codeforces problems of known difficulty."""
    rated = [a for a in members if "rating" in a.prompt.prompt.extra_info]
    if not rated or any(a.prompt.prompt.data_source != "codeforces" for a in members):
        return None
    verdict_of = _lookup(BY_PROMPT, grades)
    return estimate_rating(
        [float(a.prompt.prompt.extra_info["rating"]) for a in rated],
        [sum(verdict_of(a, g).is_correct for g in a.samples) / len(a.samples) for a in rated],
    )
