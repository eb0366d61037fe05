"""Rows of a benchmark's public files, from a local folder: jsonl, parquet, json and csv."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowrl.tasks.file_rows import Row, iterate_rows
from flowrl.tasks.prompts import shorten

SUFFIXES = (".jsonl", ".parquet", ".json", ".csv")
# The hidden tests of one LiveCodeBench problem, compressed, are one line of up to 100 MB.
MAX_LINE_BYTES = 2**30
MAX_CELL_CHARACTERS = 2**24


def find_files(data: Path, name: str) -> list[Path]:
    """The files of benchmark `name`: data/name.<suffix>, else all data files under data/name/.

    Raises ValueError if there is none, or several data/name.<suffix>.
    """
    alone = [path for suffix in SUFFIXES if (path := data / f"{name}{suffix}").is_file()]
    if len(alone) > 1:
        raise ValueError(f"{alone[0]} and {alone[1]} are both there: keep one of them")
    if alone:
        return alone
    inside = sorted(p for p in (data / name).rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not inside:
        raise ValueError(
            f"no data of {name!r} in {data}: put its public file there as {name}.jsonl, .parquet, "
            f".json or .csv, or its files into {data / name}/ (docs/evaluation.md)"
        )
    return inside


def read_rows(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of all files; a row has those of `columns` that the file has.

    Raises ValueError for anything that cannot be read, with the place and the remedy.
    """
    for path in files:
        if path.suffix == ".csv":
            rows = _csv_rows(path)
        elif path.suffix == ".json":
            rows = _json_rows(path)
        else:
            rows = iterate_rows(str(path), [], columns, max_line_bytes=MAX_LINE_BYTES)
        for place, row in rows:
            yield place, {name: value for name, value in row.items() if name in columns}


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: holds {shorten(rows)}: give a list of objects")
    for index, row in enumerate(rows):
        yield f"{path}, row {index}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for index, row in enumerate(csv.DictReader(stream, strict=True)):
                yield f"{path}, row {index}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as CSV: {error}") from error
