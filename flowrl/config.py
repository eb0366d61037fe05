"""The configuration: YAML plus `key=value` overrides; the only reader of environment variables.

An unknown key is an error that suggests the near ones. The settings are in flowrl/settings.py.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from flowrl.settings import Config

# What veRL calls a setting that has another home here; used in error messages only.
VERL_HOMES = {
    "rollout.name": "rollout.engine",
    "actor.use_dynamic_bsz": "actor.ppo_max_token_len_per_gpu",
    "algorithm.adv_estimator": "algorithm.objective",
    "algorithm.kl_ctrl.kl_coef": "algorithm.kl_coef",
    "actor.clip_ratio": "actor.clip_ratio_low",
    "actor.policy_loss.loss_mode": "actor.loss_mode",
    "custom_reward_function.path": "reward.function",
    "custom_reward_function.name": "reward.function",
    "trainer.total_epochs": "trainer.total_training_steps",
    "model.use_remove_padding": "nothing: sequences are always packed",
}


def is_megatron(config: Config) -> bool:
    """Whether Megatron trains the policy.

    Raises ValueError when many processes were started for a policy in one, each of which would
    train it and write to the same files.
    """
    if config.actor.strategy == "torch" and num_processes() > 1:
        raise ValueError(
            f"actor.strategy = torch trains in one process, but torchrun started {num_processes()}:"
            " start it without torchrun, or use actor.strategy=megatron"
        )
    if config.actor.strategy != "auto":
        return config.actor.strategy == "megatron"
    return config.parallel.num_shares > 1 or num_processes() > 1


def num_processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process is alone or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def kept_environment(forced: Mapping[str, str], defaults: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, `defaults` where there is none yet, and undo every change."""
    earlier = dict(os.environ)
    os.environ.update({**defaults, **earlier, **forced})
    try:
        yield
    finally:
        for name in os.environ.keys() - earlier.keys():
            del os.environ[name]
        os.environ.update(earlier)


def cache_dir() -> Path:
    """Where converted models are kept: `FLOWRL_CACHE`, else `~/.cache/flowrl`."""
    return Path(os.environ.get("FLOWRL_CACHE", "~/.cache/flowrl")).expanduser()


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration, in file order."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += config_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def _unknown_key(key: str) -> ValueError:
    bare = key.removeprefix("actor_rollout_ref.")
    known = config_keys()
    if bare in VERL_HOMES:
        return ValueError(f"unknown key `{key}`: here it is {VERL_HOMES[bare]}")
    if bare in known:
        return ValueError(f"unknown key `{key}`: here it is {bare}")
    leaf = bare.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(bare, known, n=3, cutoff=0.6)
    near += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in near]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"unknown key `{key}`{hint}")


def _merge(base: dict, key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        base = base.setdefault(parent, {})
        if not isinstance(base, dict):
            raise ValueError(f"`{key}`: `{parent}` holds {base!r}, not a section")
    base[leaf] = value


def _read_yaml(text: str, source: str) -> Any:
    try:
        return yaml.safe_load(text)
    # PyYAML lets all but the first escape, for `!!int ''`, `!!timestamp x`, 2024-13-45 and [[[[...
    except (yaml.YAMLError, LookupError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from error


def _is_text(key: str) -> bool:
    """Whether a setting is a plain string, so that 2024-01-01 or 1e5 is meant literally."""
    kind: Any = Config
    for part in key.split("."):
        is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
        if not is_section or part not in kind.model_fields:
            return False
        kind = kind.model_fields[part].annotation
    return kind is str


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    key = key.lstrip("+").strip()
    if not separator or not key:
        raise ValueError(f"override `{override}` is not of the form key=value")
    value = _read_yaml(text, f"override `{override}`")
    if value is not None and _is_text(key):
        return key, value if isinstance(value, str) else text.strip()
    if isinstance(value, str):  # YAML 1.1 reads 1e-6 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    return key, value


def _leaves(key: str, value: Any) -> list[str]:
    """The dotted keys of an unknown section, so that each gets its own hint."""
    if not isinstance(value, dict) or not value or key.count(".") > 4:
        return [key]
    return [leaf for name, child in value.items() for leaf in _leaves(f"{key}.{name}", child)]


def _describe(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines += [str(_unknown_key(leaf)) for leaf in _leaves(key, item["input"])]
        elif item["type"] == "missing":
            lines.append(f"`{key}` is required and has no value")
        elif not key:
            lines.append(item["msg"].removeprefix("Value error, "))
        else:
            lines.append(f"`{key}` = {item['input']!r}: {item['msg']}")
    return "; ".join(lines)


def load_config(path: str | Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, and check the whole.

    Raises ValueError naming the key, the value and the remedy for anything that is wrong.
    """
    values: dict = {}
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"config file {path}: {error}") from error
        values = _read_yaml(text, f"config file {path}")
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise ValueError(f"config file {path} holds {type(values).__name__}, not sections")
    for override in overrides:
        _merge(values, *_parse_override(override))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(_describe(error)) from error


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to the same value."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
