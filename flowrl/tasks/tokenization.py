"""Prompts to token ids, within a limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jinja2 import TemplateError

from flowrl.tasks.prompts import Prompt, shorten

if TYPE_CHECKING:  # transformers takes seconds to import, and prompts load without it
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Truncation = Literal["error", "filter", "left", "right", "middle"]


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt and its token ids, at least one."""

    prompt: Prompt
    token_ids: list[int]


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    *,
    chat_template: bool,
    truncation: Truncation = "error",
) -> tuple[list[TokenizedPrompt], int]:
    """Return the tokenised prompts, in order, and how many were dropped as too long.

    With chat_template the tokenizer's template writes the text, including the opening of the
    assistant's turn and any special tokens. Without, the contents of the messages are joined
    verbatim and the tokenizer adds what it adds to any text (a beginning token, for many).

    truncation: what happens to prompts over the limit. "error" raises, "filter" drops them (veRL's
    data.filter_overlong_prompts), "left" / "right" / "middle" cut tokens away there.

    Raises ValueError if no prompt is left, one is empty, or the tokenizer has no chat template.
    """
    if truncation not in ("error", "filter", "left", "right", "middle"):
        raise ValueError(
            f"truncation is {truncation!r}: give 'error', 'filter', 'left', 'right' or 'middle'"
        )
    if max_prompt_length < 1:
        raise ValueError(f"max_prompt_length is {max_prompt_length}: give 1 or more")
    if not prompts:
        raise ValueError("prompts is empty: load at least one prompt")
    if chat_template and tokenizer.chat_template is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "set data.chat_template=false, or take an instruction-tuned model"
        )
    texts = [_text(index, p, tokenizer, chat_template) for index, p in enumerate(prompts)]
    # The template has written the special tokens already.
    all_ids = tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]
    kept: list[TokenizedPrompt] = []
    num_dropped = 0
    for index, (prompt, ids) in enumerate(zip(prompts, all_ids, strict=True)):
        if not ids:
            raise ValueError(f"prompt {index}, {shorten(texts[index])}, has no tokens: fill it")
        if len(ids) > max_prompt_length:
            if truncation == "filter":
                num_dropped += 1
                continue
            if truncation == "error":
                raise ValueError(
                    f"prompt {index} has {len(ids)} tokens, over max_prompt_length "
                    f"{max_prompt_length} ({_length_statistics(all_ids)}): raise "
                    "data.max_prompt_length, or set data.filter_overlong_prompts or data.truncation"
                )
            ids = _cut(ids, max_prompt_length, truncation)
        kept.append(TokenizedPrompt(prompt, list(ids)))
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are over max_prompt_length {max_prompt_length} "
            f"({_length_statistics(all_ids)}): raise data.max_prompt_length"
        )
    if num_dropped:
        logger.info(
            "%d of %d prompts dropped, over %d tokens (%s)",
            *(num_dropped, len(prompts), max_prompt_length, _length_statistics(all_ids)),
        )
    return kept, num_dropped


def _text(
    index: int, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> str:
    if not chat_template:
        return "".join(message["content"] for message in prompt.messages)
    try:
        text = tokenizer.apply_chat_template(
            prompt.messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise ValueError(
            f"prompt {index}, {shorten(prompt.messages)}: the chat template refuses it: {error}"
        ) from error
    assert isinstance(text, str)
    return text


def _cut(ids: list[int], length: int, side: str) -> list[int]:
    if side == "left":
        return ids[-length:]
    head = length if side == "right" else length // 2
    tail = length - head
    return ids[:head] + ids[len(ids) - tail :]


def _length_statistics(all_ids: list[list[int]]) -> str:
    lengths = sorted(len(ids) for ids in all_ids)
    median = lengths[len(lengths) // 2]
    return f"lengths: min {lengths[0]}, median {median}, max {lengths[-1]}"
