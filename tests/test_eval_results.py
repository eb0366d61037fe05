"""The numbers of an evaluation from grades worked out by hand."""

import math
from dataclasses import replace

import pytest

from flowrl.evaluation.generations import Generation, Key
from flowrl.evaluation.grade import Grade
from flowrl.evaluation.results import Answers, summarise
from flowrl.evaluation.tasks import EvalPrompt
from flowrl.tasks import Prompt


def verdicts_of(prompt: EvalPrompt, *answers: str | None) -> dict[Key, Grade]:
    """Grades of samples: "7" is right, and None is no answer."""
    return {
        (prompt.task, prompt.prompt_id, "sample", i): Grade(answer == "7", answer, answer)
        for i, answer in enumerate(answers)
    }


def test_programs_have_no_answers_among_prompts_that_have() -> None:
    prompts = [
        EvalPrompt("t", name, (grader,), Prompt(source, [{"role": "user", "content": name}], "7"))
        for name, grader, source in (
            ("program", "code", "taco"),
            ("number", "numeric", "openai/gsm8k"),
        )
    ]
    answers = [
        Answers(p, [Generation("t", p.prompt_id, "sample", 0, "", "", "x", "stop", 1, 0, 0, "")])
        for p in prompts
    ]
    for own in answers:
        own.samples += [replace(own.samples[0], sample=i) for i in (1, 2, 3)]
    grades = {
        "code": {
            key: replace(g, is_correct=True)
            for key, g in verdicts_of(prompts[0], None, None, None, None).items()
        },
        "numeric": verdicts_of(prompts[1], "7", "7", "8", None),
    }
    whole, numbers, programs = summarise("t", "", answers, grades, {})
    mixed = whole.graders["by prompt"]
    assert mixed.avg.mean == 0.75
    assert (mixed.majority_at[4].mean, mixed.no_answer) == (1.0, 0.25)
    entropy = math.log(3) - 2 / 3 * math.log(2)
    for group in (whole, numbers):
        assert group.diversity["answer_entropy"].mean == pytest.approx(entropy)
        assert group.diversity["distinct_correct_answers"].mean == 1.0
    assert (programs.source, programs.graders["code"].majority_at) == ("taco", {})
    assert "answer_entropy" not in programs.diversity
    assert programs.diversity["distinct_forms"].mean == 1.0
