"""Benchmarks: their files, their prompts, and programs graded end to end."""

import json
from pathlib import Path

import pytest
from eval_samples import ROWS, write_rows

from flowrl.rewards import RewardPool, RewardRequest
from flowrl.tasks.benchmarks import BENCHMARKS, load_benchmark, plain_answer

SUFFIXES = {"gpqa": (".csv", ".jsonl", ".parquet", ".json")}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_format_gives_the_same_prompts(name: str, tmp_path: Path) -> None:
    loaded = []
    for suffix in SUFFIXES.get(name, (".jsonl", ".parquet", ".json")):
        folder = tmp_path / suffix[1:]
        write_rows(folder, name, suffix)
        loaded.append(load_benchmark(name, folder))
    assert len(loaded[0]) == len(ROWS[name])
    assert all(prompts == loaded[0] for prompts in loaded[1:])
    for prompt in loaded[0]:
        assert prompt.data_source == BENCHMARKS[name].source
        assert [m["role"] for m in prompt.messages] == ["user"]


def test_every_benchmark_has_a_sample() -> None:
    assert ROWS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize(
    ("name", "truths"),
    [
        ("aime24", ["4", "27"]),
        ("aime25", ["35"]),
        ("amc23", ["27"]),
        ("math500", [r"\frac{1}{2}"]),
        ("minerva", [r"\pi"]),
        ("olympiadbench", ["2,-2"]),
    ],
)
def test_ground_truths_of_mathematics(name: str, truths: list[str], tmp_path: Path) -> None:
    write_rows(tmp_path, name, ".jsonl")
    assert [p.ground_truth for p in load_benchmark(name, tmp_path)] == truths


def test_a_prompt_in_full(tmp_path: Path) -> None:
    write_rows(tmp_path, "aime24", ".jsonl")
    first = load_benchmark("aime24", tmp_path)[0]
    assert first.messages[0]["content"] == (
        "How much is $2+2$?\n\nReason step by step. Write the final answer on a last line of its "
        "own, in the form\nAnswer: \\boxed{...}"
    )
    assert first.extra_info == {"id": "2024-I-1"}
    template = "Q: {question}\n\\boxed{} please. A:"
    (other, _) = load_benchmark("aime24", tmp_path, template=template)
    assert other.messages[0]["content"] == "Q: How much is $2+2$?\n\\boxed{} please. A:"
    assert len(load_benchmark("aime24", tmp_path, count=1)) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(27.0, "27"), ("027", "27"), ("000", "0"), (0, "0"), (2.5, "2.5"), ("$\\pi$", "\\pi")]
    + [(["1", "2"], "1"), ("-3", "-3"), (" x ", "x"), ("$", "$"), ("1/2", "1/2")],
)
def test_plain_answer(value: object, text: str) -> None:
    assert plain_answer(value) == text


def test_choices_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    write_rows(tmp_path, "gpqa", ".csv")
    by_seed = [load_benchmark("gpqa", tmp_path, seed=seed)[0] for seed in range(12)]
    assert by_seed[0] == load_benchmark("gpqa", tmp_path, seed=0)[0]
    assert {p.ground_truth for p in by_seed} == set("ABCD")
    for prompt in by_seed:
        text = prompt.messages[0]["content"]
        assert f"({prompt.ground_truth}) neon" in text
        assert all(f"({letter}) " in text for letter in "ABCD")
        assert 'sulfur, "brimstone"' in text


def test_files_in_a_folder_are_read_in_order(tmp_path: Path) -> None:
    write_rows(tmp_path / "math500", "math500", ".jsonl").rename(tmp_path / "math500" / "a.jsonl")
    second = ROWS["math500"][0] | {"answer": "2"}
    (tmp_path / "math500" / "b.json").write_text(json.dumps([second]))
    assert [p.ground_truth for p in load_benchmark("math500", tmp_path)] == [r"\frac{1}{2}", "2"]


def test_bad_data_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data of 'aime24'.*aime24.jsonl"):
        load_benchmark("aime24", tmp_path)
    with pytest.raises(ValueError, match="unknown benchmark 'aime'.*did you mean 'aime2[45]'"):
        load_benchmark("aime", tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"Problem": "x"}\n')
    with pytest.raises(ValueError, match=r"aime24.jsonl, line 1: column 'answer' is missing"):
        load_benchmark("aime24", tmp_path)
    (tmp_path / "aime24.jsonl").write_text('{"Problem": "", "Answer": "1"}\n')
    with pytest.raises(ValueError, match="column 'problem' is ''"):
        load_benchmark("aime24", tmp_path)
    (tmp_path / "aime24.json").write_text("[]")
    with pytest.raises(ValueError, match="are both there"):
        load_benchmark("aime24", tmp_path)
    (tmp_path / "aime24.jsonl").unlink()
    with pytest.raises(ValueError, match="has no rows"):
        load_benchmark("aime24", tmp_path)
    (tmp_path / "aime24.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="give a list of objects"):
        load_benchmark("aime24", tmp_path)
    write_rows(tmp_path, "minerva", ".jsonl")
    with pytest.raises(ValueError, match="write {question} once"):
        load_benchmark("minerva", tmp_path, template="no place")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("humanevalplus", {"prompt": ["def f"]}, r"column 'prompt' is \['def f'\]: give a text"),
        ("codeforces", {"official_tests": [{"input": "5"}]}, "'official_tests', item 0 is"),
        ("codeforces", {"official_tests": "5"}, "'official_tests' is '5': give a list"),
        ("codeforces", {"official_tests": []}, "official_tests is empty"),
        ("codeforces", {"official_tests": None}, "'official_tests' is missing or null"),
        ("codeforces", {"examples": "5"}, "'examples' is '5': give a list"),
        ("codeforces", {"examples": ["5"]}, "'examples', item 0 is '5': give an object"),
        ("codeforces", {"input_format": 5}, "column 'input_format' is 5: give a text"),
        ("livecodebench", {"starter_code": 5}, "column 'starter_code' is 5: give a text"),
        ("aime24", {"Answer": float("nan")}, "the answer is nan: correct or drop the row"),
        ("aime24", {"Answer": [None]}, r"the answer is \[None\]: correct"),
    ],
)
def test_bad_rows_are_refused_with_their_place(
    name: str, change: dict, message: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(ROWS[name][0] | change) + "\n")
    with pytest.raises(ValueError, match=rf"{name}.jsonl, line 1: .*{message}"):
        load_benchmark(name, tmp_path)


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    rows = [ROWS["aime24"][0] | {"ID": name} for name in (1, 0, None, "")]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ids = [p.extra_info["id"] for p in load_benchmark("aime24", tmp_path)]
    assert ids == ["1", "0", "2", "3"]


PROGRAMS = {
    "livecodebench": [
        ("print(sum(map(int, input().split())))", "print(3)"),
        (
            "class Solution:\n    def double(self, x):\n        return 2 * x",
            "class Solution:\n    def double(self, x):\n        return 8",
        ),
    ],
    "humanevalplus": [("def add(a, b):\n    return a + b", "def add(a, b):\n    return 4")],
    "codeforces": [("print(2 * int(input()))", "print(2)")],
}


def test_programs_are_graded_by_their_tests(tmp_path: Path) -> None:
    requests = []
    for name, programs in PROGRAMS.items():
        write_rows(tmp_path, name, ".jsonl")
        for prompt, pair in zip(load_benchmark(name, tmp_path), programs, strict=True):
            for program in pair:
                solution = f"So:\n```python\n{program}\n```"
                requests.append(
                    RewardRequest(
                        prompt.data_source, solution, prompt.ground_truth, prompt.extra_info
                    )
                )
    with RewardPool("code", num_workers=1, timeout_s=60.0) as pool:
        results = pool.score(requests)
    assert [r.failure for r in results] == [None] * len(requests), [r.message for r in results]
    assert [r.score for r in results] == [1.0, 0.0] * (len(requests) // 2)
