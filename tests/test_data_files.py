"""Parquet and jsonl files in veRL's schema: same prompts from both, and errors that help."""

import json
import logging
import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowrl.tasks import Prompt, load_prompts, read_prompt_files

INSTRUCTION = "Solve the following math problem step by step. The last line is Answer: $Answer.\n\n"


def dapo_row(number: int, problem: str = "What is 1 + 2?", answer: str = "3") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": INSTRUCTION + problem, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"id-{number}"},
    }


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list, row_group_size: int | None = None) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return str(path)


def write(kind: str, directory: Path, rows: list) -> str:
    path = directory / f"data.{kind}"
    return write_parquet(path, rows) if kind == "parquet" else write_jsonl(path, rows)


both_kinds = pytest.mark.parametrize("kind", ["parquet", "jsonl"])


@both_kinds
def test_dapo_file_unchanged(kind, tmp_path, caplog):
    rows = [dapo_row(0), dapo_row(1, "2 + 2?", "4"), dapo_row(2), dapo_row(3, answer="5")]
    file = write(kind, tmp_path, rows)
    with caplog.at_level(logging.INFO, logger="flowrl"):
        result = read_prompt_files([file])
    assert result.prompts[0] == Prompt(
        data_source="math_dapo",
        messages=[{"role": "user", "content": INSTRUCTION + "What is 1 + 2?"}],
        ground_truth="3",
        ability="MATH",
        style="rule-lighteval/MATH_v2",
        extra_info={"index": "id-0"},
    )
    # Row 2 repeats row 0; row 3 asks the same with another answer.
    assert [p.extra_info["index"] for p in result.prompts] == ["id-0", "id-1", "id-3"]
    assert (result.num_rows, result.num_duplicates) == (4, 1)
    assert "3 prompts from 4 rows of 1 files, 1 duplicates dropped" in caplog.text
    kept = read_prompt_files([file], options={"deduplicate": False})
    assert [p.extra_info["index"] for p in kept.prompts] == ["id-0", "id-1", "id-2", "id-3"]
    assert (kept.num_rows, kept.num_duplicates) == (4, 0)
    assert load_prompts("files", "val", files=[file], seed=9) == result.prompts


def test_both_formats_give_the_same_prompts(tmp_path):
    rows = [
        {
            **dapo_row(0),
            "prompt": [
                {"role": "system", "content": ""},
                {"role": "user", "content": "Gr\u00fc\u00dfe \u4e2d\u6587 \U0001f600\n\u2028x"},
            ],
            "extra_info": {"index": 0, "split": "train", "nested": {"a": [1, 2]}},
            "unused": "x",
        },
        {**dapo_row(1, "b"), "extra_info": {"index": 1, "nested": {"b": "only here"}}},
        {**dapo_row(2, "c"), "ability": None, "extra_info": None},
        {**dapo_row(3, "d"), "reward_model": {"ground_truth": "7"}, "extra_info": {}},
    ]
    parquet = write_parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    expected = read_prompt_files([jsonl]).prompts
    assert read_prompt_files([parquet]).prompts == expected
    assert expected[0].messages[1]["content"] == rows[0]["prompt"][1]["content"]
    assert expected[0].extra_info == rows[0]["extra_info"]
    assert expected[1].extra_info == {"index": 1, "nested": {"b": "only here"}}
    assert (expected[2].ability, expected[2].extra_info) == ("", {})
    assert expected[3].style == "rule"
    both = read_prompt_files([parquet, jsonl])
    assert (both.num_rows, both.num_duplicates, both.prompts) == (8, 4, expected)


@both_kinds
def test_plain_rows(kind, tmp_path):
    rows = [{"question": "3 apples and 4?", "answer": 7}, {"question": "2 and 2?", "answer": 4}]
    options = {"input_key": "question", "label_key": "answer", "data_source": "apples"}
    prompts = load_prompts("files", "train", files=[write(kind, tmp_path, rows)], options=options)
    assert prompts[0] == Prompt(
        "apples", [{"role": "user", "content": "3 apples and 4?"}], 7, "", "rule", {}
    )
    assert prompts[1].ground_truth == 4


@both_kinds
def test_prompt_key_and_default_data_source(kind, tmp_path):
    row = {**dapo_row(0), "chat": [{"role": "user", "content": "hello"}]}
    other = {**row, "data_source": None, "chat": [{"role": "user", "content": "there"}]}
    file = write(kind, tmp_path, [row, other])
    options = {"prompt_key": "chat", "data_source": "mine"}
    prompts = read_prompt_files([file], options=options).prompts
    assert [p.messages[0]["content"] for p in prompts] == ["hello", "there"]
    assert [p.data_source for p in prompts] == ["math_dapo", "mine"]


@both_kinds
def test_count_stops_reading(kind, tmp_path):
    rows = [dapo_row(i, str(i // 2)) for i in range(10)]
    file = write(kind, tmp_path, rows)
    result = read_prompt_files([file, str(tmp_path / "never_opened.jsonl")], count=3)
    assert [p.extra_info["index"] for p in result.prompts] == ["id-0", "id-2", "id-4"]
    assert (result.num_rows, result.num_duplicates) == (5, 2)


def test_many_parquet_batches_number_rows_on(tmp_path):
    rows = [dapo_row(i, str(i)) for i in range(3000)]
    rows[2500] = {**rows[2500], "reward_model": {"ground_truth": None, "style": "rule"}}
    file = write_parquet(tmp_path / "a.parquet", rows, row_group_size=700)
    assert len(read_prompt_files([file], count=2500).prompts) == 2500
    with pytest.raises(ValueError, match="a.parquet, row 2500: column 'reward_model.ground_truth'"):
        read_prompt_files([file])


def test_equal_numbers_of_other_types_are_no_duplicates(tmp_path):
    rows = [{"q": "x", "a": value} for value in (1, 1.0, True, "1", [1], 1)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    options = {"input_key": "q", "label_key": "a", "data_source": "s"}
    result = read_prompt_files([file], options=options)
    assert [repr(p.ground_truth) for p in result.prompts] == ["1", "1.0", "True", "'1'", "[1]"]
    assert result.num_duplicates == 1


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


BAD_ROWS = {
    "no-prompt": (without(dapo_row(1), "prompt"), "column 'prompt' is missing"),
    "near-name": (
        {**without(dapo_row(1), "prompt"), "prompts": 1},
        "column 'prompt' is missing; did you mean 'prompts'",
    ),
    "no-reward-model": (without(dapo_row(1), "reward_model"), "column 'reward_model' is missing"),
    "no-data-source": (without(dapo_row(1), "data_source"), "column 'data_source' is missing"),
    "null-data-source": (
        {**dapo_row(1), "data_source": None},
        "column 'data_source' is None: give a string",
    ),
    "number-ability": ({**dapo_row(1), "ability": 3}, "column 'ability' is 3: give a string"),
    "string-prompt": (
        {**dapo_row(1), "prompt": "What is 1 + 2?"},
        r"column 'prompt' is the string 'What is 1 \+ 2\?': .* set input_key and label_key",
    ),
    "number-prompt": ({**dapo_row(1), "prompt": 5}, "column 'prompt' is 5: give a list"),
    "null-prompt": ({**dapo_row(1), "prompt": None}, "column 'prompt' is None: give a list"),
    "empty-prompt": ({**dapo_row(1), "prompt": []}, r"column 'prompt' is \[\]: give a list"),
    "blank-prompt": (
        {**dapo_row(1), "prompt": [{"role": "user", "content": ""}]},
        "column 'prompt' has only empty messages",
    ),
    "no-role": (
        {**dapo_row(1), "prompt": [{"content": "hi"}]},
        r"column 'prompt\[0\]' has no role, it is {'content': 'hi'}",
    ),
    "empty-role": (
        {**dapo_row(1), "prompt": [{"role": "", "content": "hi"}]},
        r"column 'prompt\[0\].role' is '': give user",
    ),
    "no-content": (
        {**dapo_row(1), "prompt": [{"role": "user"}]},
        r"column 'prompt\[0\]' has no content, it is {'role': 'user'}",
    ),
    "string-message": (
        {**dapo_row(1), "prompt": ["hi"]},
        r"column 'prompt\[0\]' is 'hi': give",
    ),
    "image-content": (
        {**dapo_row(1), "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
        r"column 'prompt\[0\].content' is \[{'type': 'image'}\]: give a string; images",
    ),
    "string-reward-model": (
        {**dapo_row(1), "reward_model": "rule"},
        "column 'reward_model' is 'rule': give {",
    ),
    "no-ground-truth": (
        {**dapo_row(1), "reward_model": {"style": "rule"}},
        "column 'reward_model.ground_truth' is missing or null: give the answer",
    ),
    "number-style": (
        {**dapo_row(1), "reward_model": {"style": 1, "ground_truth": "3"}},
        "column 'reward_model.style' is 1: give a string",
    ),
    "list-extra-info": (
        {**dapo_row(1), "extra_info": [1]},
        r"column 'extra_info' is \[1\]: give an object",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_jsonl_row_names_file_line_column_value(case, tmp_path):
    row, message = BAD_ROWS[case]
    file = write_jsonl(tmp_path / "bad.jsonl", [dapo_row(0), row])
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2: {message}"):
        read_prompt_files([file])


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_parquet_row_names_file_row_column_value(case, tmp_path):
    row, message = BAD_ROWS[case]
    file = write_parquet(tmp_path / "bad.parquet", [row])
    # A missing column is missing in every row of a parquet file.
    place = "bad.parquet" if "' is missing" in message and "." not in message else ", row 0"
    with pytest.raises(ValueError, match=f"{place}: {message}"):
        read_prompt_files([file])


def test_long_values_are_shortened(tmp_path):
    row = {**dapo_row(1), "prompt": "x" * 10**6}
    with pytest.raises(ValueError, match=r"string 'x+\.\.\.x+'") as caught:
        read_prompt_files([write_jsonl(tmp_path / "a.jsonl", [row])])
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


BAD_LINES = {
    "not-json": (b"{'a': 1}", "line 2: not JSON, .* .column 2. in"),
    "cut": (b'{"data_source": "math', "line 2: not JSON, Unterminated string"),
    "list": (b"[1, 2]", r"line 2: \[1, 2\] is no object: write one object a line"),
    "utf8": (b'{"a": "\xff"}', r"line 2: byte b'\\xff' at column 8 is not UTF-8: re-encode"),
    "deep": (b"[" * 200_000, r"line 2: JSON cannot be read, .*recursion.*'\[\["),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "line 2: JSON cannot be read, .*4300 digits"),
    "surrogate": (
        json.dumps(dapo_row(1, "\ud800")).encode(),
        "line 2: messages or ground truth cannot be used, .*surrogates not allowed: store",
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_jsonl_lines(case, tmp_path):
    line, message = BAD_LINES[case]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(json.dumps(dapo_row(0)).encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, {message}"):
        read_prompt_files([str(file)])


def test_line_limit_is_exact(tmp_path):
    line = json.dumps(dapo_row(0)).encode()
    file = tmp_path / "a.jsonl"
    for ending in (b"\n", b"\r\n", b""):
        file.write_bytes(line + ending)
        assert (
            read_prompt_files([str(file)], options={"max_line_bytes": len(line)}).prompts
            == read_prompt_files([str(file)]).prompts
        )
        with pytest.raises(ValueError, match=f"line 1: longer than {len(line) - 1} bytes, starts"):
            read_prompt_files([str(file)], options={"max_line_bytes": len(line) - 1})


def test_gigabyte_line_fails_in_bounded_memory(tmp_path):
    file = tmp_path / "huge.jsonl"
    file.write_text(json.dumps(dapo_row(0)) + "\n")
    os.truncate(file, 2**30)  # sparse: no disk is used
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"huge.jsonl, line 2: longer than 16777216 bytes"):
        read_prompt_files([str(file)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 16 * 2**20


def test_byte_order_mark_and_blank_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    lines = [json.dumps(dapo_row(i, str(i))).encode() for i in range(2)]
    file.write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\n  \n" + lines[1])
    prompts = read_prompt_files([str(file)]).prompts
    assert [p.extra_info["index"] for p in prompts] == ["id-0", "id-1"]


def test_unreadable_files(tmp_path):
    def message_of(name: str) -> str:
        with pytest.raises(ValueError) as caught:
            read_prompt_files([str(tmp_path / name)])
        return str(caught.value).replace(str(tmp_path), "")

    (tmp_path / "dir.jsonl").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "empty.parquet").write_text("")
    (tmp_path / "text.parquet").write_text("this is no parquet file")
    pq.write_table(pa.Table.from_pylist([dapo_row(0)]).slice(0, 0), tmp_path / "norows.parquet")
    whole = Path(write_parquet(tmp_path / "whole.parquet", [dapo_row(i) for i in range(50)]))
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-20])
    damaged = bytearray(whole.read_bytes())
    damaged[4:400] = b"\xff" * 396
    (tmp_path / "damaged.parquet").write_bytes(bytes(damaged))
    os.symlink(tmp_path / "nowhere", tmp_path / "dangling.jsonl")

    assert message_of("dir.jsonl") == "/dir.jsonl: is a directory: name the files in it"
    assert message_of("a.csv") == "/a.csv: suffix '.csv' is not supported: use .parquet or .jsonl"
    assert message_of("gone.jsonl").startswith("/gone.jsonl: no such file (current directory: ")
    assert message_of("dangling.jsonl").startswith("/dangling.jsonl: no such file")
    for name in ("empty.jsonl", "blank.jsonl", "norows.parquet"):
        assert message_of(name) == f"/{name}: has no rows: remove it from the list, or fill it"
    for name in ("empty", "text", "cut", "damaged"):
        assert message_of(f"{name}.parquet").startswith(f"/{name}.parquet: ")
        assert "read" in message_of(f"{name}.parquet")


def test_invalid_utf8_in_parquet_names_row_and_column(tmp_path):
    offsets = pa.py_buffer(b"".join(i.to_bytes(4, "little") for i in (0, 1, 2)))
    text = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff"))
    table = pa.Table.from_pylist([dapo_row(0), dapo_row(1)]).set_column(2, "ability", text)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet, row 1: column 'ability' cannot be read:"):
        read_prompt_files([str(tmp_path / "a.parquet")])


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ([], {}, r"files is \[\]: give a list of at least one file"),
        ("a.jsonl", {}, "files is 'a.jsonl': give a list"),
        (["a.jsonl"], {"prompt_kye": "p"}, "no option 'prompt_kye'; did you mean 'prompt_key'"),
        (["a.jsonl"], {"prompt_key": None}, "prompt_key is None: give a non-empty string"),
        (["a.jsonl"], {"input_key": "q"}, "input_key is 'q' and label_key is None: give both"),
        (["a.jsonl"], {"data_source": 3}, "data_source is 3: give a non-empty string"),
        (["a.jsonl"], {"deduplicate": 1}, "deduplicate is 1: give true or false"),
        (["a.jsonl"], {"max_line_bytes": 0}, "max_line_bytes is 0: give a whole number from 2"),
    ],
)
def test_option_errors(files, options, message):
    with pytest.raises(ValueError, match=message):
        load_prompts("files", "train", files=files, options=options)


def test_bytes_are_no_ground_truth(tmp_path):
    rows = [{"q": "x", "a": b"\x00"}]
    file = write_parquet(tmp_path / "a.parquet", rows)
    options = {"input_key": "q", "label_key": "a", "data_source": "s"}
    with pytest.raises(ValueError, match="row 0: .* type bytes is not JSON serializable: store"):
        read_prompt_files([file], options=options)
