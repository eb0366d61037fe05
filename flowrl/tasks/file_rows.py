"""Rows of parquet and jsonl files as dicts, in bounded memory, each with its place in the file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from flowrl.tasks.prompts import did_you_mean, shorten

Row = dict[str, Any]

SUFFIXES = (".parquet", ".jsonl")
# 1000 rows of DAPO-Math-17k are 2 MB; larger batches were no faster.
_BATCH_ROWS = 1024


def iterate_rows(
    file: str, required: Sequence[str], optional: Sequence[str], *, max_line_bytes: int
) -> Iterator[tuple[str, Row]]:
    """Yield (place, row); a row has every required column, and the optional ones of the file.

    A place reads "<file>, line 3" (from 1) or "<file>, row 2" (from 0). A jsonl line longer than
    max_line_bytes is an error, found without reading more of it.

    Raises ValueError for anything that cannot be read, with the place and the remedy.
    """
    path = Path(file)
    if path.is_dir():
        raise ValueError(f"{file}: is a directory: name the files in it")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{file}: suffix {path.suffix!r} is not supported: use .parquet or .jsonl")
    if not path.is_file():
        raise ValueError(f"{file}: no such file (current directory: {Path.cwd()})")
    try:
        with path.open("rb") as stream:
            if path.suffix == ".jsonl":
                yield from _jsonl_rows(file, stream, required, optional, max_line_bytes)
            else:
                yield from _parquet_rows(file, stream, required, optional)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error}") from error


def check_columns(place: str, present: Sequence[str], required: Sequence[str]) -> None:
    """Raise ValueError for the first required column that is not there."""
    for name in required:
        if name not in present:
            raise ValueError(
                f"{place}: column {name!r} is missing{did_you_mean(name, present)}"
                f"; columns: {shorten(list(present))}; rename it, or set prompt_key, or input_key "
                "and label_key, in the task's options"
            )


def _jsonl_rows(
    file: str,
    stream: BinaryIO,
    required: Sequence[str],
    optional: Sequence[str],
    max_line_bytes: int,
) -> Iterator[tuple[str, Row]]:
    wanted = {*required, *optional}
    number = 0
    # One more than the limit tells a longest line from a longer one; one more holds its newline.
    while ended_line := stream.readline(max_line_bytes + 2):
        number += 1
        place = f"{file}, line {number}"
        line = ended_line.rstrip(b"\r\n")
        if len(line) > max_line_bytes:
            raise ValueError(
                f"{place}: longer than {max_line_bytes} bytes, starts with {shorten(line[:64])}: "
                "write one object a line, or raise max_line_bytes in the task's options"
            )
        if not line.strip():
            continue
        row = _parse_line(place, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        check_columns(place, list(row), required)
        yield place, {name: value for name, value in row.items() if name in wanted}


def _parse_line(place: str, line: bytes) -> Row:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        wrong = line[error.start : error.start + 1]
        raise ValueError(
            f"{place}: byte {wrong!r} at column {error.start + 1} is not UTF-8: re-encode the file"
        ) from error
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}: not JSON, {error.msg} (column {error.colno}) in {shorten(text)}: "
            "write one object a line"
        ) from error
    except (RecursionError, ValueError) as error:  # nesting or a number beyond Python's limits
        raise ValueError(f"{place}: JSON cannot be read, {error}, in {shorten(text)}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: {shorten(row)} is no object: write one object a line")
    return row


def _parquet_rows(
    file: str, stream: BinaryIO, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    try:
        parquet = pq.ParquetFile(stream)
        present = parquet.schema_arrow.names
        check_columns(file, present, required)
        columns = [name for name in (*required, *optional) if name in present]
        number = 0
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
            for row in _batch_rows(file, number, batch):
                yield f"{file}, row {number}", row
                number += 1
    except pa.ArrowException as error:
        raise ValueError(f"{file}: not a readable parquet file: {error}") from error


def _batch_rows(file: str, first: int, batch: pa.RecordBatch) -> list[Row]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        # Parquet files may hold invalid UTF-8 and dates beyond Python's: look for the cell.
        for index in range(batch.num_rows):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column[index].as_py()
                except (ValueError, OverflowError) as error:
                    raise ValueError(
                        f"{file}, row {first + index}: column {name!r} cannot be read: {error}: "
                        "re-encode or drop the column"
                    ) from error
        raise
