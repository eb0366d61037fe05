"""Every response graded by every grader of its task, and the classes of equivalent answers.

The graders are reward functions and run in reward workers, killed when late. Several graders side
by side are the point: on the same responses DAPO's rule and math-verify differ by format.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flowrl.evaluation.generations import Generation, Key
from flowrl.evaluation.tasks import EvalPrompt
from flowrl.files import write_whole
from flowrl.rewards import RewardPool, RewardRequest, RewardResult
from flowrl.rewards.answer import answer_text, first_part
from flowrl.rewards.auto import BY_NAME
from flowrl.rewards.numeric import last_number
from flowrl.tasks.benchmarks import ALL_TESTS_SECONDS

logger = logging.getLogger(__name__)

GRADES_FILE = "grades.jsonl"
DISAGREEMENTS_FILE = "disagreements.jsonl"
SHOWN_CHARACTERS = 300  # what DAPO's rule reads

# Reward functions by grader, in the order in which they count.
FUNCTIONS = {
    "math_verify": "flowrl.evaluation.math_answers:grade",
    "choice": "flowrl.evaluation.choice:compute_score",
    **{name: name for name in BY_NAME if name != "math_verify"},
}
# These say in extra["pred"] what they took for the answer. Of the others, "exact" judges
# rewards.answer.first_part, and the rest rewards.answer.answer_text.
NAMES_ANSWER = ("math_verify", "dapo_math", "choice")
CLASSIFIER = "flowrl.evaluation.math_answers:classify"
# Above what the program's tests may take in all, which the benchmarks say themselves.
CODE_TIMEOUT_S = ALL_TESTS_SECONDS + 10.0
# The pool copies what it is given, and the tests of one program may be 100 MB.
REQUESTS_AT_ONCE = 64
CORRECT_FROM = 1.0  # dapo_math gives -1 or 1, the others 0 to 1
# One request compares all answers to a prompt.
CLASSIFIER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class GradingSettings:
    """How the graders run; `timeout_s` limits one response, except for programs."""

    num_workers: int = 2
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.num_workers < 1:
            raise ValueError(f"--num-workers is {self.num_workers}: give 1 or more")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"--timeout is {self.timeout_s}: give a number of seconds above 0")


@dataclass(frozen=True)
class Grade:
    """One grader's verdict on one response.

    answer: what the grader took for the answer, None if it found none (or its task has none).
    answer_class: names the class of equivalent answers within the prompt, None without an answer.
    failure: why there is no verdict ("timeout", "crash", ...); such a response is not correct.
    """

    is_correct: bool
    answer: str | None
    answer_class: str | None
    failure: str | None = None


# By grader, then by response.
Grades = dict[str, dict[Key, Grade]]


def try_graders(prompts: Sequence[EvalPrompt], settings: GradingSettings) -> None:
    """Start and end a worker of every grader, so that none is refused after the generation.

    Raises ValueError for one that cannot start, such as `code` where no sandbox works.
    """
    needed = {grader for prompt in prompts for grader in prompt.graders}
    for grader, function in FUNCTIONS.items():
        if grader in needed:
            RewardPool(function, 1, settings.timeout_s).close()


def grade_all(
    prompts: Sequence[EvalPrompt], generations: Sequence[Generation], settings: GradingSettings
) -> Grades:
    """The grades of all generations, whose prompts must be among `prompts`."""
    by_id = {(p.task, p.prompt_id): p for p in prompts}
    grades: Grades = {}
    for grader, function in FUNCTIONS.items():
        mine = [g for g in generations if grader in by_id[g.task, g.prompt_id].graders]
        if not mine:
            continue
        requests = [_request(by_id[g.task, g.prompt_id], g) for g in mine]
        timeout_s = CODE_TIMEOUT_S if grader == "code" else settings.timeout_s
        with RewardPool(function, settings.num_workers, timeout_s) as pool:
            results = [
                result
                for first in range(0, len(requests), REQUESTS_AT_ONCE)
                for result in pool.score(requests[first : first + REQUESTS_AT_ONCE])
            ]
        grades[grader] = {
            generation.key: _to_grade(grader, request, result)
            for generation, request, result in zip(mine, requests, results, strict=True)
        }
    if "math_verify" in grades:
        grades["math_verify"] = _with_classes(grades["math_verify"], settings)
    return grades


def _request(prompt: EvalPrompt, generation: Generation) -> RewardRequest:
    return RewardRequest(
        data_source=prompt.prompt.data_source,
        solution=generation.response,
        ground_truth=prompt.prompt.ground_truth,
        extra_info=prompt.prompt.extra_info,
    )


def _to_grade(grader: str, request: RewardRequest, result: RewardResult) -> Grade:
    is_correct = result.failure is None and result.score >= CORRECT_FROM
    answer = answer_of(grader, request, result)
    return Grade(is_correct, answer, answer, result.failure)


def names_answers(grader: str) -> bool:
    """Whether the grader's responses have an answer at all; programs have none."""
    return grader != "code"


def answer_of(grader: str, request: RewardRequest, result: RewardResult) -> str | None:
    """What the grader took for the answer."""
    if not names_answers(grader):
        return None
    if grader in NAMES_ANSWER:
        return str(result.extra.get("pred", "")) or None  # a failure has no extras
    read = first_part if grader == "exact" else answer_text
    text = read(request.solution, request.extra_info)
    if grader == "numeric":
        number = last_number(text)
        return None if number is None else str(number)
    return " ".join(text.split()) or None


def _with_classes(by_key: Mapping[Key, Grade], settings: GradingSettings) -> dict[Key, Grade]:
    """math-verify's grades with its own classes: all correct answers are one, the others grouped.

    Where grouping fails (a time-out), answers are classes by their text, as they came.
    """
    wrong: dict[tuple[str, str], list[str]] = {}
    for (task, prompt_id, _, _), grade in by_key.items():
        answers = wrong.setdefault((task, prompt_id), [])
        if not grade.is_correct and grade.answer is not None and grade.answer not in answers:
            answers.append(grade.answer)
    asked = [place for place, answers in wrong.items() if len(answers) > 1]
    requests = [RewardRequest("", "", None, {"answers": wrong[place]}) for place in asked]
    with RewardPool(CLASSIFIER, settings.num_workers, CLASSIFIER_TIMEOUT_S) as pool:
        results = pool.score(requests)
    num_failed = sum(result.failure is not None for result in results)
    if num_failed:
        logger.warning(
            "the answers to %d of %d prompts could not be compared by math-verify; there, answers "
            "of different text vote apart",
            *(num_failed, len(asked)),
        )
    names: dict[tuple[str, str], dict[str, str]] = {}
    for place, result in zip(asked, results, strict=True):
        if result.failure is None:
            firsts: dict[int, str] = {}
            names[place] = {
                answer: firsts.setdefault(number, answer)
                for answer, number in zip(wrong[place], result.extra["classes"], strict=True)
            }
    classed = {}
    for key, grade in by_key.items():
        if grade.is_correct:
            name = "correct"
        elif grade.answer is None:
            name = None
        else:
            name = "wrong: " + names.get(key[:2], {}).get(grade.answer, grade.answer)
        classed[key] = Grade(grade.is_correct, grade.answer, name, grade.failure)
    return classed


def write_grades(folder: Path, generations: Sequence[Generation], grades: Grades) -> None:
    """Keep every verdict, and apart the responses on which two graders disagree."""
    lines = []
    for generation in generations:
        verdicts = {g: asdict(grades[g][generation.key]) for g in graders_of(generation, grades)}
        lines.append(json.dumps({**_place(generation), "grades": verdicts}) + "\n")
    write_whole(folder / GRADES_FILE, "".join(lines))


def write_disagreements(
    folder: Path, prompts: Sequence[EvalPrompt], generations: Sequence[Generation], grades: Grades
) -> int:
    """Keep the responses on which the graders disagree, with both extractions; return how many."""
    by_id = {(p.task, p.prompt_id): p for p in prompts}
    lines = []
    for generation in generations:
        own = {g: grades[g][generation.key] for g in graders_of(generation, grades)}
        if len({grade.is_correct for grade in own.values()}) < 2:
            continue
        row = {
            **_place(generation),
            "ground_truth": by_id[generation.task, generation.prompt_id].prompt.ground_truth,
            "grades": {
                name: {"is_correct": grade.is_correct, "answer": grade.answer}
                for name, grade in own.items()
            },
            "finish_reason": generation.finish_reason,
            "response_end": generation.response[-SHOWN_CHARACTERS:],
        }
        lines.append(json.dumps(row) + "\n")
    write_whole(folder / DISAGREEMENTS_FILE, "".join(lines))
    return len(lines)


def graders_of(generation: Generation, grades: Grades) -> list[str]:
    """Who graded a response, the grader that counts first."""
    return [name for name, by_key in grades.items() if generation.key in by_key]


def _place(generation: Generation) -> dict[str, object]:
    names = ("task", "prompt_id", "decoding", "sample")
    return dict(zip(names, generation.key, strict=True))
