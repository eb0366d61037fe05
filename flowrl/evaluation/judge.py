"""An optional judge: a language model behind an OpenAI-compatible endpoint rates the diversity.

Every prompt with two or more sampled responses is one request, which shows all responses in full.
Answers are kept in judge.jsonl as they come, each with a hash of the request, so the same responses
are never paid for twice and others are never given their score. A request that fails is kept as
failed and scores nothing; it is asked again the next time.
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from flowrl.evaluation.results import Answers

logger = logging.getLogger(__name__)

JUDGE_FILE = "judge.jsonl"
RUBRIC = """\
Below are {n} responses to one problem. Rate how many different approaches they take, whatever \
their answers and whether they are right. Wording, notation, order of steps and length are no \
difference of approach.

5: no approach is shared by more than a fifth of the responses
4: several approaches, none of them shared by half of the responses
3: two or more approaches, one of them shared by about half of the responses
2: nearly all responses take one approach
1: all responses take one approach

Write one or two sentences of reasons, then a last line: Score: <1 to 5>

Problem:
{problem}

{responses}"""
# "Score: 4.", "**Score**: <4>"; neither "4.5" nor the "<1 to 5>" of the rubric.
SCORE = re.compile(
    r"score[\s*_]*[:=][\s*_`]*[<\[(]?([1-5])(?![0-9]|\.[0-9]|\s*(?:to|-)\s*[0-9])", re.IGNORECASE
)
MAX_REPLY_BYTES = 1 << 20


@dataclass(frozen=True)
class JudgeSettings:
    """url: up to and including /v1; key: sent as a bearer token, if any.

    timeout_s: of one try, from the connection to the last byte.
    """

    url: str
    model: str
    key: str | None = None
    timeout_s: float = 120.0
    num_retries: int = 3
    retry_wait_s: float = 2.0  # doubled from try to try
    num_workers: int = 4

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"--judge-url is {self.url!r}: give http://host:port/v1 or https://..."
            )


class JudgeFailed(Exception):
    """No usable answer after all tries."""


def judge_all(
    folder: Path, answers: Sequence[Answers], settings: JudgeSettings
) -> dict[tuple[str, str], float]:
    """Scores 1 to 5 by (task, prompt id), of the prompts that the judge could score."""
    path = folder / JUDGE_FILE
    kept = _kept_scores(path, settings.model)
    judged = [(a, _request_hash(a)) for a in answers if len(a.samples) > 1]
    scores = {_place(a): kept[own] for a, own in judged if own in kept}
    todo = [a for a, own in judged if own not in kept]
    num_failed = 0
    # "a": failures stay on record; the later line of a prompt counts.
    with ThreadPoolExecutor(settings.num_workers) as pool, path.open("a", encoding="utf-8") as file:
        for asked, row in zip(todo, pool.map(lambda a: _judge(a, settings), todo), strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if row["score"] is None:
                num_failed += 1
            else:
                scores[_place(asked)] = float(row["score"])
    if num_failed:
        logger.warning(
            "the judge failed on %d of %d prompts, which have no score; see %s",
            *(num_failed, len(todo), path),
        )
    return scores


def _place(answers: Answers) -> tuple[str, str]:
    return answers.prompt.task, answers.prompt.prompt_id


def _request_text(answers: Answers) -> str:
    problem = answers.prompt.prompt.messages[-1]["content"]
    parts = [f"Response {i + 1}:\n{g.response}" for i, g in enumerate(answers.samples)]
    return RUBRIC.format(n=len(parts), problem=problem, responses="\n\n".join(parts))


def _request_hash(answers: Answers) -> str:
    """16 hex digits of what the judge is shown of a prompt and its responses."""
    text = _request_text(answers).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:16]


def _kept_scores(path: Path, model: str) -> dict[str, float]:
    """Scores by the hash of the request; rows without one are of unknown responses."""
    if not path.exists():
        return {}
    whole = path.read_bytes()
    if not whole.endswith(b"\n"):  # torn by a kill
        whole = whole[: whole.rfind(b"\n") + 1]
        path.write_bytes(whole)
    rows = [json.loads(line) for line in whole.splitlines()]
    return {
        row["request_hash"]: float(row["score"])
        for row in rows
        if row["judge"] == model and row["score"] is not None and "request_hash" in row
    }


def _judge(answers: Answers, settings: JudgeSettings) -> dict[str, Any]:
    row = {
        "task": answers.prompt.task,
        "prompt_id": answers.prompt.prompt_id,
        "request_hash": _request_hash(answers),
        "judge": settings.model,
        "score": None,
        "answer": None,
        "failure": None,
    }
    try:
        row["answer"] = _ask(_request_text(answers), settings)
    except JudgeFailed as failure:
        return {**row, "failure": str(failure)}
    found = SCORE.findall(row["answer"])
    if not found:
        return {**row, "failure": "the answer has no line 'Score: <1 to 5>'"}
    return {**row, "score": int(found[-1])}


def _ask(text: str, settings: JudgeSettings) -> str:
    """The judge's answer at temperature 0. Raises JudgeFailed with the last reason."""
    request = {
        "model": settings.model,
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
    }
    reason = ""
    for attempt in range(settings.num_retries + 1):
        if attempt:
            time.sleep(settings.retry_wait_s * 2 ** (attempt - 1))
        try:
            status, reply = asyncio.run(_post(request, settings))
        except TimeoutError:
            reason = f"no whole answer within {settings.timeout_s:g} s"
            continue
        except (aiohttp.ClientError, OSError) as error:  # no connection, or one that broke
            reason = f"{type(error).__name__}: {error}"
            continue
        if status != 200:
            reason = f"HTTP {status}: {reply[:500].decode(errors='replace')}"
            if status < 500 and status not in (408, 429):
                break  # asking again does not help
            continue
        try:
            answer = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError) as error:
            reason = f"unreadable reply: {type(error).__name__}: {error}"
            continue
        if isinstance(answer, str):
            return answer
        reason = "the reply has no text"
    raise JudgeFailed(reason)


async def _post(request: dict[str, Any], settings: JudgeSettings) -> tuple[int, bytes]:
    """Status and body of one try. Raises TimeoutError, aiohttp.ClientError and OSError."""
    url = settings.url.rstrip("/") + "/chat/completions"
    headers = {"Authorization": f"Bearer {settings.key}"} if settings.key else {}
    # Not by urllib: its time-out starts anew with every byte.
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    async with (
        aiohttp.ClientSession(timeout=timeout, trust_env=True) as session,  # proxies, as urllib
        session.post(url, json=request, headers=headers) as response,
    ):
        reply = bytearray()
        async for part in response.content.iter_any():
            reply += part
            if len(reply) > MAX_REPLY_BYTES:
                break
        return response.status, bytes(reply[:MAX_REPLY_BYTES])
