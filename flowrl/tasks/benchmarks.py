"""The benchmarks of the field: where their data comes from and how a row becomes a prompt.

Nothing is downloaded: the public files are read from a local folder (benchmarks_rows.find_files).
A row's columns are named as in the source that the definition gives; where mirrors call a column
otherwise, the other names follow it.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flowrl.tasks.benchmarks_rows import find_files, read_rows
from flowrl.tasks.file_rows import Row
from flowrl.tasks.permutation import fixed_permutation
from flowrl.tasks.prompts import Prompt, did_you_mean, shorten

Kind = Literal["math", "choice", "code"]
LETTERS = "ABCD"

# One wording for both graders: the DAPO rule reads the line, math-verify the box.
MATH_TEMPLATE = (
    "{question}\n\nReason step by step. Write the final answer on a last line of its own, in the "
    "form\nAnswer: \\boxed{{...}}"
)
CHOICE_TEMPLATE = (
    "{question}\n\nReason step by step. Write the letter of the right choice on a last line of its "
    "own, in the form\nAnswer: \\boxed{{...}}"
)
# Seconds, for the code reward: what one test and what all tests of a program may take. The limits
# of single tests are those of FlowRL's evaluation; HumanEval+ runs all its checks as one test.
TEST_SECONDS = {"livecodebench": 6.0, "codeforces": 12.0, "humanevalplus": 60.0}
ALL_TESTS_SECONDS = 120.0

# As text: what stands where a table has no answer.
NO_ANSWERS = ("", "[]", "nan", "NaN", "inf", "-inf", "None")

CODE_TEMPLATE = "{question}\n\nWrite the whole program in Python, in one ```python block."


@dataclass(frozen=True)
class Item:
    """What a row holds, before it is worded as a prompt."""

    question: str
    ground_truth: Any
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark. `num_items` None: it depends on the release."""

    source: str  # data set on the Hugging Face hub, and the reward's data_source
    num_items: int | None
    kind: Kind
    columns: tuple[str, ...]
    to_item: Callable[["Columns", int], Item]  # (row, seed)
    id_column: str | None = None


class Columns:
    """A row whose missing or empty columns are errors that name the place."""

    def __init__(self, place: str, row: Row) -> None:
        self.place, self.row = place, row

    def first(self, *names: str) -> Any:
        """The value of the first of these columns that is there and not null."""
        for name in names:
            if self.row.get(name) is not None:
                return self.row[name]
        raise ValueError(
            f"{self.place}: column {names[0]!r} is missing or null; columns: "
            f"{shorten(sorted(self.row))}; is this the benchmark's public file?"
        )

    def whole_text(self, *names: str) -> str:
        """The non-empty text of the first of these columns, with the space around it."""
        value = self.first(*names)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{self.place}: column {names[0]!r} is {shorten(value)}: give a text")
        return value

    def text(self, *names: str) -> str:
        """The stripped, non-empty text of the first of these columns."""
        return self.whole_text(*names).strip()

    def optional_text(self, name: str) -> str:
        """The text of a column, "" where it is missing or null."""
        value = self.row.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.place}: column {name!r} is {shorten(value)}: give a text")
        return value or ""

    def pairs(self, name: str) -> list[tuple[str, str]]:
        """A column of objects with the texts input and output; [] where it is missing or null."""
        value = self.row.get(name)
        items = [] if value is None else value
        if not isinstance(items, list):
            raise ValueError(f"{self.place}: column {name!r} is {shorten(items)}: give a list")
        found = []
        for index, item in enumerate(items):
            pair = [item.get(key) for key in ("input", "output")] if isinstance(item, dict) else []
            if not pair or not all(isinstance(text, str) for text in pair):
                raise ValueError(
                    f"{self.place}: column {name!r}, item {index} is {shorten(item)}: give an "
                    "object with the texts input and output"
                )
            found.append((pair[0], pair[1]))
        return found

    def decoded(self, name: str) -> Any:
        """A column that holds JSON text."""
        try:
            return json.loads(self.text(name))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.place}: column {name!r} is no JSON: {error}") from error


def plain_answer(value: object) -> str:
    """A math answer as text: of a list the first, 27.0 and "027" as 27, without $ around it."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return str(int(text)) if text.isascii() and text.isdigit() else text


def _math_item(columns: Columns, seed: int) -> Item:
    question = columns.text("problem", "question", "Problem", "Question")
    value = columns.first("answer", "final_answer", "Answer")
    answer = plain_answer(value)
    if answer in NO_ANSWERS:
        raise ValueError(
            f"{columns.place}: the answer is {shorten(value)}: correct or drop the row"
        )
    # Levels and subjects, where a benchmark has them, for whoever regroups the results.
    kept = ("level", "subject", "type")
    return Item(question, answer, {k: columns.row[k] for k in kept if k in columns.row})


def _gpqa_item(columns: Columns, seed: int) -> Item:
    right = columns.text("Correct Answer")
    choices = [right, *(columns.text(f"Incorrect Answer {i}") for i in (1, 2, 3))]
    question = columns.text("Question")
    order = fixed_permutation(len(choices), f"gpqa/{seed}/{question}").tolist()
    lines = [f"({letter}) {choices[i]}" for letter, i in zip(LETTERS, order, strict=True)]
    return Item("\n".join([question, "", *lines]), LETTERS[order.index(0)], {"order": order})


def _livecodebench_item(columns: Columns, seed: int) -> Item:
    question = columns.text("question_content")
    starter = columns.optional_text("starter_code")
    if starter.strip():
        question += f"\n\nComplete this code:\n```python\n{starter.rstrip()}\n```"
    else:
        question += "\n\nRead from standard input and write to standard output."
    truth = {
        "public_test_cases": columns.text("public_test_cases"),
        "private_test_cases": columns.text("private_test_cases"),  # compressed: decoded when graded
        "metadata": columns.row.get("metadata") or "{}",
    }
    kept = ("difficulty", "platform", "contest_date")
    extra = {k: str(columns.row[k]) for k in kept if columns.row.get(k) is not None}
    return Item(question, truth, extra)


def _humaneval_item(columns: Columns, seed: int) -> Item:
    stub = columns.whole_text("prompt")  # its indentation counts
    question = f"Complete this function:\n```python\n{stub.rstrip()}\n```"
    names = ("test", "entry_point")
    truth = {"prompt": stub, **{name: columns.text(name) for name in names}}
    return Item(question, truth, {})


def _codeforces_item(columns: Columns, seed: int) -> Item:
    parts = [columns.text("description")]
    for name, title in (("input_format", "Input"), ("output_format", "Output"), ("note", "Note")):
        if text := columns.optional_text(name).strip():
            parts.append(f"{title}\n{text}")
    for given, expected in columns.pairs("examples"):
        parts.append(f"Example input\n{given}\nExample output\n{expected}")
    parts.append("Read from standard input and write to standard output.")
    columns.first("official_tests")  # an error if it is not there
    tests = columns.pairs("official_tests")
    truth = {"inputs": [test[0] for test in tests], "outputs": [test[1] for test in tests]}
    if not tests:
        raise ValueError(f"{columns.place}: official_tests is empty: use the 'verifiable' subset")
    rating = columns.row.get("rating")
    return Item("\n\n".join(parts), truth, {} if rating is None else {"rating": rating})


_MATH_COLUMNS = (
    *("problem", "question", "Problem", "Question", "answer", "final_answer", "Answer"),
    *("level", "subject", "type"),
)


def _math(source: str, num_items: int, id_column: str | None = None) -> Benchmark:
    columns = _MATH_COLUMNS if id_column is None else (*_MATH_COLUMNS, id_column)
    return Benchmark(source, num_items, "math", columns, _math_item, id_column)


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": _math("Maxwell-Jia/AIME_2024", 30, "ID"),
    "aime25": _math("yentinglin/aime_2025", 30),
    "amc23": _math("zwhe99/amc23", 40),
    "math500": _math("HuggingFaceH4/MATH-500", 500, "unique_id"),
    "minerva": _math("math-ai/minervamath", 272),
    "olympiadbench": _math("math-ai/olympiadbench", 674),
    "gpqa": Benchmark(
        "Idavidrein/gpqa",
        198,
        "choice",
        ("Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)), "Record ID"),
        _gpqa_item,
        "Record ID",
    ),
    "livecodebench": Benchmark(
        "livecodebench",
        None,
        "code",
        (
            *("question_content", "starter_code", "public_test_cases", "private_test_cases"),
            *("metadata", "difficulty", "platform", "contest_date", "question_id"),
        ),
        _livecodebench_item,
        "question_id",
    ),
    "humanevalplus": Benchmark(
        "humanevalplus",
        164,
        "code",
        ("task_id", "prompt", "entry_point", "test"),
        _humaneval_item,
        "task_id",
    ),
    "codeforces": Benchmark(
        "codeforces",
        None,
        "code",
        (
            *("id", "description", "input_format", "output_format", "note", "examples"),
            *("official_tests", "rating"),
        ),
        _codeforces_item,
        "id",
    ),
}

TEMPLATES: dict[Kind, str] = {
    "math": MATH_TEMPLATE,
    "choice": CHOICE_TEMPLATE,
    "code": CODE_TEMPLATE,
}


def load_benchmark(
    name: str,
    data: Path,
    *,
    count: int | None = None,
    seed: int = 0,
    template: str | None = None,
) -> list[Prompt]:
    """Read a benchmark's prompts from a local folder, in the order of its files.

    Every prompt is one user message; extra_info["id"] is the row's own name, else its number, and
    `seed` shuffles the choices of gpqa. `template` replaces the wording around {question}.

    Raises ValueError for an unknown name, missing or unreadable data, and a template without
    {question}.
    """
    if name not in BENCHMARKS:
        raise ValueError(
            f"unknown benchmark {name!r}{did_you_mean(name, BENCHMARKS)}; benchmarks: "
            f"{', '.join(BENCHMARKS)}"
        )
    benchmark = BENCHMARKS[name]
    if template is not None and template.count("{question}") != 1:
        raise ValueError(f"the prompt template is {shorten(template)}: write {{question}} once")
    prompts: list[Prompt] = []
    for place, row in read_rows(find_files(data, name), benchmark.columns):
        if len(prompts) == count:
            break
        item = benchmark.to_item(Columns(place, row), seed)
        own = row.get(benchmark.id_column) if benchmark.id_column else None
        item.extra_info["id"] = str(len(prompts) if own in (None, "") else own)
        if benchmark.kind == "code":
            item.extra_info["code"] = {
                "time_limit_s": TEST_SECONDS[name],
                "total_time_limit_s": ALL_TESTS_SECONDS,
            }
        if template is None:
            text = TEMPLATES[benchmark.kind].format(question=item.question)
        else:
            text = template.replace("{question}", item.question)  # its other braces are LaTeX's
        prompts.append(
            Prompt(
                data_source=benchmark.source,
                messages=[{"role": "user", "content": text}],
                ground_truth=item.ground_truth,
                ability=benchmark.kind,
                extra_info=item.extra_info,
            )
        )
    if not prompts:
        raise ValueError(f"{data}: {name!r} has no rows: fill its file")
    return prompts


def known_problems(name: str, prompts: Sequence[Prompt]) -> str:
    """What is unusual about a loaded benchmark, for the report; "" for nothing."""
    expected = BENCHMARKS[name].num_items
    if expected is None or expected == len(prompts):
        return ""
    return f"{len(prompts)} of {expected} items"
