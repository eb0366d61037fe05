"""Write configuration.md from the models in flowrl/settings.py, so that it cannot drift from them.

`python docs/generate_configuration.py` writes the page, with `--check` it exits 1 when the page is
stale. A path may be named as well.
"""

import argparse
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout this script lies in, installed or not

from flowrl.config import VERL_HOMES, config_keys  # noqa: E402
from flowrl.settings import Config  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
VERL_ROLES = ("actor.", "model.", "ref.", "rollout.")  # veRL has them under actor_rollout_ref

HEAD = """\
# Configuration

<!-- Written by docs/generate_configuration.py from flowrl/settings.py: edit that, not this. -->

A run is one YAML file and, after it, `key=value` overrides:

```
flowrl train configs/quickstart.yaml flow.beta=0.5 rollout.n=16 trainer.seed=1
```

The value of an override is read as YAML, so lists and mappings work (`'rollout.stop=["\\n"]'`),
and a leading `+` is ignored. An unknown key is an error that names the near ones; a value of the
wrong type or out of range is one that shows it. What a run resolved to is in its `config.yaml`.

The trainer reads one environment variable of its own, `FLOWRL_CACHE`, the folder of converted
models (`~/.cache/flowrl`), and torchrun's.

Rules across keys:

- `data.max_prompt_length` + `data.max_response_length` fits into `actor.ppo_max_token_len_per_gpu`
  times `parallel.context_parallel_size`: a sequence is never split over micro-batches.
- `data.train_batch_size` is a multiple of `actor.ppo_mini_batch_size`. Both count prompts.
- `rollout.top_p` < 1 or `rollout.top_k` > 0 needs `flow.old_logprobs` to be `rollout`.
- The task `files` needs `data.train_files`.

What the keys of `flow` mean, and how to choose `flow.beta`: [objective.md](objective.md). Tasks and
their options: [tasks.md](tasks.md). Rewards: [rewards.md](rewards.md).
"""

VERL = """
## If you come from veRL

Names and meanings are veRL's wherever veRL has the setting. What it keeps under `actor_rollout_ref`
stands at the top level: `actor_rollout_ref.rollout.n` is `rollout.n`. Written the old way, a key is
refused with its new name. Settings that have another home:

| veRL | here |
|---|---|
"""


def bounds(metadata: Sequence[Any]) -> dict[str, float]:
    """The limits of a number: `{"gt": 0}`, from annotated_types or pydantic's nested FieldInfo."""
    found = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= bounds(item.metadata)
        for name in BOUNDS:
            if isinstance(item, getattr(annotated_types, name.capitalize())):
                found[name] = getattr(item, name)
    return found


def type_text(kind: Any, metadata: Sequence[Any] = ()) -> str:
    """A type as a reader of YAML wants it: `int > 0`, `a, b or null`, `list of str`.

    Raises ValueError for a kind of annotation that the configuration has not used so far.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return type_text(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        members = [type_text(a, metadata) for a in args if a is not type(None)]
        return " or ".join(members + ["null"] * (type(None) in args))
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in args)
    if origin is list:
        return f"list of {type_text(args[0])}"
    if origin is tuple:
        return "[" + ", ".join(type_text(a) for a in args) + "]"
    if origin is dict:
        return "mapping"
    if isinstance(kind, type):
        limits = ", ".join(f"{BOUNDS[n]} {v}" for n, v in bounds(metadata).items())
        return f"{kind.__name__} {limits}".strip()
    raise ValueError(f"no text for the type {kind!r}: add a case to type_text")


def default_text(field: FieldInfo) -> str:
    """The default as it would stand in YAML."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, tuple):
        default = list(default)
    text = yaml.safe_dump(default, default_flow_style=True, width=1000)
    return f"`{text.removesuffix('...' + chr(10)).strip()}`"


def section_lines(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table of the section's own keys, then a part for each section inside it."""
    rows, inner = [], []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            inner.append((f"{prefix}{name}", kind))
            continue
        if not field.description:
            raise ValueError(f"`{prefix}{name}` has no description in flowrl/settings.py")
        description = field.description.replace("|", "\\|")  # else it ends the cell
        kind_text = type_text(kind, field.metadata)
        rows.append(f"| `{prefix}{name}` | {kind_text} | {default_text(field)} | {description} |")
    if rows:
        yield from ("", "| key | type | default | |", "|---|---|---|---|", *rows)
    for name, kind in inner:
        yield from ("", f"{'#' * (2 + name.count('.'))} {name}", "", (kind.__doc__ or "").strip())
        yield from section_lines(kind, f"{name}.")


def verl_name(key: str) -> str:
    """A key of VERL_HOMES as veRL's own files spell it."""
    return f"actor_rollout_ref.{key}" if key.startswith(VERL_ROLES) else key


def page() -> str:
    """The whole page."""
    known = config_keys()
    rows = [
        f"| `{verl_name(old)}` | {f'`{new}`' if new in known else new} |\n"
        for old, new in VERL_HOMES.items()
    ]
    return HEAD + "\n".join(section_lines(Config)) + "\n" + VERL + "".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=PAGE)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    text = page()
    if not arguments.check:
        arguments.path.write_text(text, encoding="utf-8")
        return 0
    if arguments.path.read_text(encoding="utf-8") == text:
        return 0
    print(
        f"{arguments.path} is stale: run python docs/generate_configuration.py and commit it",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
