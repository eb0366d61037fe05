"""Prompts from parquet and jsonl files in veRL's data schema.

One row is one prompt:

    data_source   str, picks the reward                        required
    prompt        [{"role": str, "content": str}, ...]         required
    reward_model  {"ground_truth": any, "style": str}          required, style defaults to "rule"
    ability       str                                          optional
    extra_info    object                                       optional

With the options input_key and label_key a row is plain instead: row[input_key] is the text of one
user message (or a chat list), row[label_key] the ground truth.

Both formats give the same prompts: null members of objects are dropped, because parquet fills the
members that other rows have with nulls.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl.tasks.file_rows import Row, iterate_rows
from flowrl.tasks.options import check_int, parse_options
from flowrl.tasks.prompts import Prompt, PromptSet, shorten

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileOptions:
    """Which columns to read and what to do with repeated rows.

    prompt_key: the column with the chat list.
    input_key, label_key: both or neither; rows are plain, see above.
    data_source: for rows that name none.
    deduplicate: keep only the first row of those with equal messages and ground truth.
    max_line_bytes: the longest jsonl line that is accepted.
    """

    prompt_key: str = "prompt"
    input_key: str | None = None
    label_key: str | None = None
    data_source: str | None = None
    deduplicate: bool = True
    max_line_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        optional = (
            ("input_key", self.input_key),
            ("label_key", self.label_key),
            ("data_source", self.data_source),
        )
        for name, value in (("prompt_key", self.prompt_key), *optional):
            if value is None and name != "prompt_key":
                continue
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} is {shorten(value)}: give a non-empty string")
        if (self.input_key is None) != (self.label_key is None):
            raise ValueError(
                f"input_key is {self.input_key!r} and label_key is {self.label_key!r}: give both "
                "or neither"
            )
        if not isinstance(self.deduplicate, bool):
            raise ValueError(f"deduplicate is {shorten(self.deduplicate)}: give true or false")
        check_int("max_line_bytes", self.max_line_bytes, 2, 2**31)


def read_prompt_files(
    files: Sequence[str],
    *,
    count: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Read at most `count` prompts (all if None) from the files, in their order.

    Reading stops at `count`, so the numbers of rows and duplicates are those seen until then.

    Raises ValueError, naming file, line or row, column, value and remedy, for the first row that
    does not fit the schema, and for a file without rows.
    """
    parsed = parse_options(FileOptions, options, "files")
    if isinstance(files, str) or not files:
        raise ValueError(f"files is {files!r}: give a list of at least one file")
    if parsed.input_key is not None and parsed.label_key is not None:
        required, optional = [parsed.input_key, parsed.label_key], ["ability", "extra_info"]
    else:
        required, optional = [parsed.prompt_key, "reward_model"], ["ability", "extra_info"]
    (required if parsed.data_source is None else optional).append("data_source")

    prompts: list[Prompt] = []
    seen: set[tuple[object, ...]] = set()
    num_rows = num_duplicates = 0
    for file in files:
        if len(prompts) == count:
            break
        rows_before = num_rows
        rows = iterate_rows(file, required, optional, max_line_bytes=parsed.max_line_bytes)
        for place, row in rows:
            if len(prompts) == count:
                break
            num_rows += 1
            prompt = _prompt_of_row(place, row, parsed)
            identity = _identity(place, prompt)
            if parsed.deduplicate and identity in seen:
                num_duplicates += 1
                continue
            seen.add(identity)
            prompts.append(prompt)
        if num_rows == rows_before:
            raise ValueError(f"{file}: has no rows: remove it from the list, or fill it")
    logger.info(
        "%d prompts from %d rows of %d files, %d duplicates dropped",
        *(len(prompts), num_rows, len(files), num_duplicates),
    )
    return PromptSet(prompts, num_rows, num_duplicates)


def _prompt_of_row(place: str, row: Row, options: FileOptions) -> Prompt:
    if options.input_key is not None and options.label_key is not None:
        column, label, reward_model = options.input_key, options.label_key, {}
        ground_truth = row[label]
        messages = row[column]
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
    else:
        column, label = options.prompt_key, "reward_model.ground_truth"
        reward_model = _without_nulls(row["reward_model"])
        if not isinstance(reward_model, dict):
            raise ValueError(
                f"{place}: column 'reward_model' is {shorten(reward_model)}: "
                'give {"style": "rule", "ground_truth": ...}'
            )
        ground_truth = reward_model.get("ground_truth")
        messages = row[column]
    if ground_truth is None:
        raise ValueError(
            f"{place}: column {label!r} is missing or null: give the answer that the reward needs"
        )
    extra_info = _without_nulls(row.get("extra_info"))
    if extra_info is not None and not isinstance(extra_info, dict):
        raise ValueError(f"{place}: column 'extra_info' is {shorten(extra_info)}: give an object")
    return Prompt(
        data_source=_text(place, "data_source", row.get("data_source"), options.data_source),
        messages=_checked_messages(place, column, messages),
        ground_truth=_without_nulls(ground_truth),
        ability=_text(place, "ability", row.get("ability"), ""),
        style=_text(place, "reward_model.style", reward_model.get("style"), "rule"),
        extra_info=extra_info or {},
    )


def _text(place: str, column: str, value: object, default: str | None) -> str:
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {column!r} is {shorten(value)}: give a string")
    return value


def _checked_messages(place: str, column: str, messages: object) -> list[dict[str, str]]:
    if isinstance(messages, str):
        raise ValueError(
            f"{place}: column {column!r} is the string {shorten(messages)}: give a list of "
            '{"role", "content"}, or set input_key and label_key to read it as one user message'
        )
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{place}: column {column!r} is {shorten(messages)}: give a list of "
            '{"role", "content"}, at least one'
        )
    checked = [_checked_message(place, f"{column}[{i}]", m) for i, m in enumerate(messages)]
    if not any(message["content"] for message in checked):
        raise ValueError(f"{place}: column {column!r} has only empty messages: give a question")
    return checked


def _checked_message(place: str, name: str, message: object) -> dict[str, str]:
    if not isinstance(message, dict):
        raise ValueError(
            f'{place}: column {name!r} is {shorten(message)}: give {{"role", "content"}}'
        )
    present = {key: value for key, value in message.items() if value is not None}
    for key in ("role", "content"):
        if key not in present:
            raise ValueError(
                f"{place}: column {name!r} has no {key}, it is {shorten(message)}: "
                'give {"role", "content"}'
            )
    for key, value in present.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{place}: column '{name}.{key}' is {shorten(value)}: give a string; "
                "images, tool calls and other parts are not supported"
            )
    if not present["role"]:
        raise ValueError(f"{place}: column '{name}.role' is '': give user, assistant or system")
    return present


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def _identity(place: str, prompt: Prompt) -> tuple[object, ...]:
    """What makes two rows duplicates; refers to the prompt's own strings, so it costs no copy."""
    truth = prompt.ground_truth
    is_text = isinstance(truth, str)
    try:
        # As JSON text, because 1, 1.0 and True are equal in Python.
        written = truth if is_text else json.dumps(truth, sort_keys=True)
        for text in (written, *(text for message in prompt.messages for text in message.values())):
            if not text.isascii():
                text.encode()
    except (TypeError, UnicodeEncodeError) as error:
        raise ValueError(
            f"{place}: messages or ground truth cannot be used, {error}: "
            "store text, numbers, lists and objects, as valid Unicode"
        ) from error
    # Sorted: the two formats may order a message's members differently.
    return (is_text, written, *(tuple(sorted(message.items())) for message in prompt.messages))
