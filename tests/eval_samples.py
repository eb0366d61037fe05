"""Small benchmarks of our own in the public files' schemas."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

LCB_HIDDEN = [{"input": "3 4\n", "output": "7\n", "testtype": "stdin"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "aime24": [
        {"ID": "2024-I-1", "Problem": "How much is $2+2$?", "Solution": "...", "Answer": 4},
        {"ID": "2024-I-2", "Problem": "How much is $20+7$?", "Solution": "...", "Answer": 27},
    ],
    "aime25": [{"problem": "How much is $5\\cdot 7$?", "answer": "035", "solution": "..."}],
    "amc23": [{"id": 0, "question": "How much is $30-3$?", "answer": 27.0, "url": "..."}],
    "math500": [
        {
            "problem": "Write $0.5$ as a fraction.",
            "solution": "...",
            "answer": "\\frac{1}{2}",
            "subject": "Prealgebra",
            "level": 1,
            "unique_id": "test/prealgebra/1.json",
        }
    ],
    "minerva": [{"question": "What is $2\\pi/2$?", "answer": "\\pi"}],
    "olympiadbench": [{"id": 7, "question": "Solve $x^2=4$.", "final_answer": ["$2,-2$", "3"]}],
    "gpqa": [
        {
            "Record ID": "rec1",
            "Question": "Which is a noble gas?",
            "Correct Answer": "neon",
            "Incorrect Answer 1": "iron",
            "Incorrect Answer 2": "sodium",
            "Incorrect Answer 3": 'sulfur, "brimstone"',
        }
    ],
    "livecodebench": [
        {
            "question_title": "sum",
            "question_content": "Print the sum of two numbers.",
            "platform": "atcoder",
            "question_id": "abc1_a",
            "contest_date": "2024-01-01T00:00:00",
            "difficulty": "easy",
            "starter_code": "",
            "public_test_cases": json.dumps(
                [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
            ),
            "private_test_cases": base64.b64encode(
                zlib.compress(pickle.dumps(json.dumps(LCB_HIDDEN)))
            ).decode(),
            "metadata": "{}",
        },
        {
            "question_title": "double",
            "question_content": "Double a number.",
            "platform": "leetcode",
            "question_id": "1",
            "contest_date": "2024-01-02T00:00:00",
            "difficulty": "easy",
            "starter_code": "class Solution:\n    def double(self, x: int) -> int:\n        ",
            "public_test_cases": json.dumps(
                [{"input": "4", "output": "8", "testtype": "functional"}]
            ),
            "private_test_cases": json.dumps(
                [{"input": "-1", "output": "-2", "testtype": "functional"}]
            ),
            "metadata": json.dumps({"func_name": "double"}),
        },
    ],
    "humanevalplus": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def add(a, b):\n    """Add two numbers."""\n',
            "canonical_solution": "    return a + b\n",
            "entry_point": "add",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        }
    ],
    "codeforces": [
        {
            "id": "1/A",
            "title": "Twice",
            "description": "Print twice the number.",
            "input_format": "One number.",
            "output_format": "One number.",
            "note": None,
            "examples": [{"input": "1", "output": "2"}],
            "official_tests": [{"input": "5\n", "output": "10\n"}],
            "time_limit": 1.0,
            "rating": 800,
        }
    ],
}


def write_rows(folder: Path, name: str, suffix: str) -> Path:
    """One benchmark's file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, rows = folder / f"{name}{suffix}", ROWS[name]
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path
