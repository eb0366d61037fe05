"""What an evaluation generates, kept beside its generations so that they are never mixed."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from flowrl.evaluation.estimators import MAX_SAMPLES
from flowrl.files import write_whole

SETTINGS_FILE = "settings.json"
GENERATIONS_FILE = "generations.jsonl"
# Where things lie may change between runs; what they are may not.
PLACES = ("model", "data")

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class EvalSettings:
    """Everything that decides which responses are generated.

    model: as given; fingerprint: of its weights, configuration and tokenizer. tasks: names, see
    flowrl.evaluation.tasks; data: the folder of the benchmarks. template: wording of benchmark
    prompts around {question}; None is the benchmark's own. greedy: one more response per prompt,
    decoded greedily.
    """

    model: str
    fingerprint: str
    tasks: tuple[str, ...]
    data: str | None
    n: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    greedy: bool
    limit: int | None
    template: str | None
    chat_template: bool
    engine: EngineName
    dtype: str
    max_num_seqs: int

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"--tasks is {','.join(self.tasks)!r}: name each task once")
        if not 1 <= self.n <= MAX_SAMPLES:
            raise ValueError(f"--n is {self.n}: give 1 to {MAX_SAMPLES} responses a prompt")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"--temperature is {self.temperature}: give a number above 0; see also --greedy"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p is {self.top_p}: give a share above 0, at most 1")
        if self.max_tokens < 1:
            raise ValueError(f"--max-tokens is {self.max_tokens}: give 1 or more")
        if self.max_num_seqs < 1:
            raise ValueError(f"--max-num-seqs is {self.max_num_seqs}: give 1 or more")
        if self.seed < 0:
            raise ValueError(f"--seed is {self.seed}: give 0 or more")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"--limit is {self.limit}: give 1 or more")
        if self.engine not in ("transformers", "vllm"):
            raise ValueError(f"--engine is {self.engine!r}: give transformers or vllm")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype is {self.dtype!r}: give auto, float32 or bfloat16")


def load_settings(folder: Path) -> EvalSettings:
    """What `keep_settings` wrote. Raises ValueError if the folder holds no evaluation."""
    path = folder / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} holds no evaluation (no {SETTINGS_FILE})")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: cannot be read as JSON ({error}): restore it, or remove the folder"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds {values!r:.80}: restore it, or remove the folder")
    names = {field.name for field in fields(EvalSettings)}
    if values.keys() != names:
        raise ValueError(
            f"{path}: missing or unknown {sorted(values.keys() ^ names)}: it is of another version"
        )
    try:
        return EvalSettings(**{**values, "tasks": tuple(values["tasks"])})
    except (TypeError, ValueError) as error:  # a value of another type, or out of range
        raise ValueError(f"{path}: {error}; restore it, or remove the folder") from error


def keep_settings(folder: Path, settings: EvalSettings) -> None:
    """Write the settings; where generations are kept, check that their settings are the same.

    Raises ValueError naming the settings that differ from those of the generations in the folder,
    and if the settings of the generations are not there.
    """
    if (folder / GENERATIONS_FILE).exists():
        if not (folder / SETTINGS_FILE).exists():
            raise ValueError(
                f"{folder} holds generations without their {SETTINGS_FILE}: restore it, or name "
                "another --output"
            )
        kept, asked = asdict(load_settings(folder)), asdict(settings)
        changed = [k for k in asked if k not in PLACES and kept[k] != asked[k]]
        if changed:
            differences = ", ".join(f"{k} {kept[k]!r} -> {asked[k]!r}" for k in changed)
            raise ValueError(
                f"{folder} holds generations of other settings ({differences}): name another "
                "--output, or remove the folder"
            )
    write_whole(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=1))
