"""Results and tables of what the tiny model does not do: programs, ratings, a judge, failures."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from flowrl.evaluation.estimators import pass_at_k
from flowrl.evaluation.generations import Generation
from flowrl.evaluation.grade import Grade, Grades
from flowrl.evaluation.rating import estimate_rating
from flowrl.evaluation.results import Answers, GroupResult, summarise
from flowrl.evaluation.show import plot_pass_at_k, render
from flowrl.evaluation.tasks import EvalPrompt
from flowrl.tasks import Prompt

# Right ones of four programs, by problem and rating.
RIGHT = {"easy": (4, 800), "middle": (1, 1500), "hard": (0, 2500)}


def program(name: str, sample: int, tokens: int) -> Generation:
    end = "length" if sample == 3 else "stop"
    place = ("codeforces", name, "sample", sample)
    return Generation(*place, "", "", f"print({sample % 2})", end, tokens, -1.0, 0, "")


def programs() -> tuple[list[Answers], Grades]:
    answers, grades = [], {}
    for name, (num_right, rating) in RIGHT.items():
        prompt = Prompt("codeforces", [], "", extra_info={"rating": rating})
        samples = [program(name, i, 10) for i in range(4)]
        answers.append(Answers(EvalPrompt("codeforces", name, ("code",), prompt), samples))
        for i, g in enumerate(samples):
            failure = "timeout" if name == "hard" and i == 0 else None
            grades[g.key] = Grade(i < num_right, None, None, failure)
    return answers, {"code": grades}


def shown(groups: list[GroupResult]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=110).print(render(groups, "model [x]"))
    return stream.getvalue()


def test_programs_have_a_rating_and_no_answers() -> None:
    answers, grades = programs()
    (group,) = summarise("codeforces", "", answers, grades, {})
    found = group.graders["code"]
    assert found.avg.mean == pytest.approx(5 / 12)
    for k in (1, 2, 4):
        expected = sum(pass_at_k(4, c, k) for c, _ in RIGHT.values()) / 3
        assert found.pass_at[k].mean == pytest.approx(expected)
    assert (found.majority_at, found.greedy, found.failures) == ({}, None, {"timeout": 1})
    assert (group.truncated, group.mean_tokens) == (0.25, 10)
    assert group.rating == estimate_rating([800, 1500, 2500], [1, 0.25, 0])
    assert "answer_entropy" not in group.diversity
    # Of the right programs, print(0) and print(1) in turn: two forms, one and none.
    assert group.diversity["distinct_correct_forms"].mean == pytest.approx((2 + 1 + 0) / 3)
    text = shown([group])
    assert "Codeforces rating" in text and "no verdict on 1 (timeout)" in text
    assert "model [x]" in text and "judge" not in text


def test_judge_scores_of_some_prompts() -> None:
    answers, grades = programs()
    (group,) = summarise("codeforces", "a note", answers, grades, {"easy": 4.0, "hard": 1.0})
    assert group.judge is not None and group.judge.mean == 2.5
    text = shown([group, group])
    assert "judge" in text and "2.50" in text and "codeforces: a note" in text
    average = 100 * group.graders["code"].pass_at[4].mean
    assert f"mean of the 2 tasks, first grader: avg@4 41.7, pass@4 {average:.1f}" in text


def test_one_response_a_prompt_has_no_self_bleu() -> None:
    answers, grades = programs()
    for one in answers:
        del one.samples[1:]
    (group,) = summarise("codeforces", "", answers, grades, {})
    assert "self_bleu" not in group.diversity
    assert group.graders["code"].pass_at.keys() == {1}
    assert math.isclose(group.graders["code"].avg.mean, 2 / 3)
    assert shown([group])


def test_picture_of_several_tasks(tmp_path: Path) -> None:
    answers, grades = programs()
    groups = summarise("a/codeforces_$x$", "", answers, grades, {})
    plot_pass_at_k(groups * 4, tmp_path / "plot.png", "a $ sign")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
