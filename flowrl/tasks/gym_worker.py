"""Generates questions of one reasoning-gym data set: a request on stdin, an answer on stdout.

A script, started by gym.py; it imports nothing of flowrl. Request: {"name", "split", "count",
"seed", "options"}. Answer: {"entries", "num_draws"}, {"kind", "unknown", "known"} for a misspelt
name, or {"error"}.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import sys
from typing import Any

# A data set computes some questions ahead for its whole size (acre: 4 s at 16,000), or limits it.
_CHUNK = 512
# Draws before a data set counts as exhausted: five times what a val split needs on average.
_DRAWS_PER_PROMPT = 25
_MIN_DRAWS = 2000


def is_val(question: str) -> bool:
    """Whether the question belongs to the val split, about one in five."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest(), "big") % 5 == 0


def answer_request(request: dict[str, Any]) -> dict[str, Any]:
    """Draw distinct questions of the split until there are enough."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        return {"error": f"{error}; pip install reasoning-gym"}
    name, options = request["name"], request["options"]
    # composite needs other data sets inside its options; their own names do the same.
    known = sorted(set(DATASETS) - {"composite"})
    if name not in known:
        return {"kind": "data set", "unknown": name, "known": known}
    dataset_class, config_class = DATASETS[name]
    fields = [f.name for f in dataclasses.fields(config_class) if f.name not in ("seed", "size")]
    for key in options:
        if key not in fields:
            return {"kind": "option", "unknown": key, "known": fields}
    # Item i of a data set comes from seed + i, so neighbouring seeds would share most items.
    # 31 bits, because numpy's generators refuse sums above 32.
    start = int.from_bytes(hashlib.sha256(str(request["seed"]).encode()).digest()[:4], "big") >> 1
    random.seed(start)
    entries: dict[str, Any] = {}
    num_draws = 0
    while num_draws < max(_MIN_DRAWS, _DRAWS_PER_PROMPT * request["count"]):
        try:
            config = config_class(**options, size=_CHUNK, seed=start + num_draws)
            dataset = dataset_class(config)
        except (AssertionError, TypeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        for i in range(_CHUNK):
            entry = dataset[i]
            num_draws += 1
            question = entry["question"]
            if question in entries or is_val(question) != (request["split"] == "val"):
                continue
            if not entries and not survives_json(dataset, entry):
                return {"error": "its scorer does not recognise entries that went through JSON"}
            entries[question] = entry
            if len(entries) == request["count"]:
                return {"entries": list(entries.values()), "num_draws": num_draws}
    if not entries:
        return {"error": f"no {request['split']} question in {num_draws} draws; widen its options"}
    return {"entries": list(entries.values()), "num_draws": num_draws}


def to_json(value: object) -> str:
    """JSON, with numpy's numbers and arrays as plain ones and fractions and dates as text."""
    return json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))


def survives_json(dataset: Any, entry: dict[str, Any]) -> bool:
    """Whether the scorer gives the data set's own answer the same score after JSON."""
    own = dataset.score_answer(entry["answer"], entry)
    return own == dataset.score_answer(entry["answer"], json.loads(to_json(entry)))


if __name__ == "__main__":
    # Data sets may print; only the answer may reach stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        reply = answer_request(json.loads(sys.stdin.read()))
    print(to_json(reply))
