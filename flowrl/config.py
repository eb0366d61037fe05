"""Typed configuration: YAML plus `key=value` overrides; the only reader of environment variables.

Names follow veRL where veRL has one. An unknown key is an error that suggests the near ones.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Moment = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

# What veRL calls a setting that has another home here; used in error messages only.
VERL_HOMES = {
    "rollout.name": "rollout.engine",
    "actor.use_dynamic_bsz": "actor.ppo_max_token_len_per_gpu",
    "algorithm.adv_estimator": "algorithm.objective",
    "custom_reward_function.path": "reward.function",
    "custom_reward_function.name": "reward.function",
    "trainer.total_epochs": "trainer.total_training_steps",
    "model.use_remove_padding": "nothing: sequences are always packed",
}


class Section(BaseModel):
    """A part of the configuration that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DataConfig(Section):
    """Where prompts come from."""

    task: str = Field("files", description="`files`, a built-in task, or `reasoning_gym/<name>`")
    task_options: dict[str, Any] = Field({}, description="options of the task (docs/tasks.md)")
    train_files: list[str] = Field([], description="parquet or jsonl files in veRL's schema")
    val_files: list[str] = Field([], description="held-out files in the same schema")
    train_batch_size: PositiveInt = Field(64, description="prompts per training step")
    train_max_samples: PositiveInt | None = Field(None, description="cap on training prompts")
    val_max_samples: PositiveInt | None = Field(256, description="cap on held-out prompts")
    max_prompt_length: PositiveInt = Field(1024, description="prompt limit in tokens")
    max_response_length: PositiveInt = Field(1024, description="response limit in tokens")
    filter_overlong_prompts: bool = Field(True, description="drop prompts over the limit")
    truncation: Literal["error", "left"] = Field(
        "error", description="what happens to an overlong prompt that is not filtered"
    )
    chat_template: bool = Field(True, description="apply the tokenizer's chat template")
    shuffle: bool = Field(True, description="draw training prompts in a seeded random order")


class ModelConfig(Section):
    """The pretrained policy."""

    path: str = Field(description="HF folder or name, `builtin:smollm2-135m-instruct`, ...")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="compute dtype; bfloat16 keeps float32 master weights"
    )
    trust_remote_code: bool = Field(False, description="let the model folder run its own code")
    enable_gradient_checkpointing: bool = Field(False, description="recompute activations")


class RolloutConfig(Section):
    """How responses are sampled."""

    engine: Literal["transformers"] = Field("transformers", description="generation engine")
    n: PositiveInt = Field(8, description="responses per prompt, the group size")
    temperature: PositiveFloat = Field(1.0, description="sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="nucleus mass; 1: off")
    top_k: int = Field(-1, ge=-1, description="keep the k likeliest tokens; -1: off")
    stop: list[str] = Field([], description="strings that end a response (kept in it)")
    max_num_seqs: PositiveInt = Field(256, description="sequences decoded together")


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: NonNegativeFloat = Field(1e-6, description="learning rate after warm-up")
    betas: tuple[Moment, Moment] = Field((0.9, 0.999), description="AdamW moments")
    weight_decay: NonNegativeFloat = Field(0.1, description="not applied to norms and biases")
    lr_warmup_steps: NonNegativeInt = Field(10, description="linear warm-up, in training steps")
    clip_grad: PositiveFloat = Field(1.0, description="global gradient norm limit")


class ActorConfig(Section):
    """How the policy is updated."""

    strategy: Literal["auto", "torch", "megatron"] = Field(
        "auto",
        description="torch: one process; megatron: many; auto: megatron under torchrun or when a "
        "size in `parallel` exceeds 1",
    )
    ppo_mini_batch_size: PositiveInt = Field(64, description="prompts per optimiser step")
    ppo_epochs: PositiveInt = Field(1, description="passes over each batch of rollouts")
    ppo_max_token_len_per_gpu: PositiveInt = Field(
        16384, description="strict cap on the packed tokens of one micro-batch"
    )
    drop_mass: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="softmax mass the head's backward may leave out; 0: exact"
    )
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]


class ParallelConfig(Section):
    """How Megatron spreads the policy; the ranks that are left over are data parallel."""

    tensor_model_parallel_size: PositiveInt = Field(1, description="ranks that share a layer")
    pipeline_model_parallel_size: PositiveInt = Field(1, description="stages of layers")
    virtual_pipeline_model_parallel_size: PositiveInt = Field(
        1, description="interleaved chunks per stage"
    )
    context_parallel_size: PositiveInt = Field(1, description="ranks that share a sequence")
    expert_model_parallel_size: PositiveInt = Field(1, description="ranks that share the experts")
    sequence_parallel: bool = Field(
        False, description="spread norms and activations over the tensor-parallel ranks as well"
    )
    use_distributed_optimizer: bool = Field(
        True, description="spread the optimiser's state over data-parallel ranks"
    )
    overlap_grad_reduce: bool = Field(True, description="reduce gradients during the backward")
    timeout_minutes: PositiveInt = Field(
        30, description="how long a rank waits for the others before the job stops"
    )

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the policy."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )


class RefConfig(Section):
    """The frozen reference policy."""

    offload: bool = Field(False, description="keep the reference on the CPU between uses")


class FlowConfig(Section):
    """The FlowRL objective (arXiv 2509.15207, Eq. 6)."""

    preset: Literal["paper", "original", "recipe", "cispo"] = Field(
        "paper", description="published variant; the keys below override it when set"
    )
    beta: PositiveFloat = Field(15.0, description="reward coefficient; tilt is beta*|y| nats")
    weighting: Literal["clip", "raw", "cap", "one", "cispo"] | None = Field(
        None, description="what becomes of the importance weight S; unset: the preset's"
    )
    clip_low: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="`clip` and `cispo`: lower bound 1 - clip_low; unset: the preset's"
    )
    clip_high: NonNegativeFloat | None = Field(
        None, description="`clip` and `cispo`: upper bound 1 + clip_high; unset: the preset's"
    )
    weight_cap: PositiveFloat | None = Field(
        None, description="`cap`: upper bound of S; unset: the preset's"
    )
    log_z: Literal["network", "vargrad", "none"] = Field(
        "network", description="where log Z(x) comes from"
    )
    z_num_layers: PositiveInt = Field(3, description="linear layers of the partition network")
    z_pooling: Literal["all", "without_last"] | None = Field(
        None, description="prompt tokens whose mean feeds Z; unset: the preset's"
    )
    z_dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="dropout inside Z; unset: the preset's"
    )
    z_detach: bool | None = Field(
        None, description="stop Z's gradient at the hidden states; unset: the preset's"
    )
    z_lr: NonNegativeFloat | None = Field(None, description="Z's own learning rate; unset: lr")
    old_logprobs: Literal["policy", "rollout"] = Field(
        "policy",
        description="whose log-probs the weight divides by: the policy's before the update, or the "
        "rollout engine's, which saves their pass and admits top_p and top_k",
    )


class AlgorithmConfig(Section):
    """Which objective is optimised."""

    objective: Literal["flow_balance"] = Field("flow_balance", description="the loss")
    unbiased_std: bool = Field(True, description="ddof of the group's standard deviation")


class RewardConfig(Section):
    """Who scores the responses."""

    function: str = Field("auto", description="a built-in name or `path/to/file.py:function`")
    num_workers: PositiveInt = Field(2, description="worker processes")
    timeout_s: PositiveFloat = Field(10.0, description="hard limit per response, seconds")
    failure_score: float = Field(0.0, allow_inf_nan=False, description="score of a failure")
    correct_threshold: float = Field(
        1.0, allow_inf_nan=False, description="scores from here on count as correct"
    )


class ValidationConfig(Section):
    """How held-out prompts are judged."""

    n: PositiveInt = Field(4, description="samples per held-out prompt (avg@n)")
    temperature: PositiveFloat | None = Field(None, description="unset: the rollout's")
    greedy: bool = Field(True, description="also decode greedily")


class TrainerConfig(Section):
    """The run itself."""

    total_training_steps: PositiveInt = Field(100, description="batches of rollouts to train on")
    seed: NonNegativeInt = Field(0, description="of sampling, prompt order, Z and its dropout")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the first GPU, else the CPU"
    )
    num_threads: PositiveInt | None = Field(None, description="CPU threads; unset: torch's")
    project_name: str = Field("flowrl", description="project of the wandb logger")
    experiment_name: str = Field("run", description="name of the run and of its directory")
    default_local_dir: str | None = Field(None, description="unset: `runs/<experiment_name>`")
    save_freq: int = Field(-1, ge=-1, description="steps between checkpoints; -1: at the end")
    test_freq: int = Field(-1, ge=-1, description="steps between evaluations; -1: start and end")
    val_before_train: bool = Field(True, description="evaluate before the first step")
    max_actor_ckpt_to_keep: PositiveInt = Field(2, description="older checkpoints are deleted")
    resume_mode: Literal["auto", "disable"] = Field(
        "auto", description="auto: continue from the run directory's last checkpoint"
    )
    logger: list[Literal["console", "jsonl", "tensorboard", "wandb"]] = Field(
        ["console", "jsonl", "tensorboard"], description="where metrics go"
    )


class Config(Section):
    """A whole training run."""

    data: DataConfig = DataConfig()  # pyright: ignore[reportCallIssue]
    model: ModelConfig
    rollout: RolloutConfig = RolloutConfig()  # pyright: ignore[reportCallIssue]
    actor: ActorConfig = ActorConfig()  # pyright: ignore[reportCallIssue]
    parallel: ParallelConfig = ParallelConfig()  # pyright: ignore[reportCallIssue]
    ref: RefConfig = RefConfig()  # pyright: ignore[reportCallIssue]
    flow: FlowConfig = FlowConfig()  # pyright: ignore[reportCallIssue]
    algorithm: AlgorithmConfig = AlgorithmConfig()  # pyright: ignore[reportCallIssue]
    reward: RewardConfig = RewardConfig()  # pyright: ignore[reportCallIssue]
    validation: ValidationConfig = ValidationConfig()  # pyright: ignore[reportCallIssue]
    trainer: TrainerConfig = TrainerConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        data, actor, rollout = self.data, self.actor, self.rollout
        longest = data.max_prompt_length + data.max_response_length
        if longest > actor.ppo_max_token_len_per_gpu:
            raise ValueError(
                f"data.max_prompt_length + data.max_response_length = {longest} exceeds "
                f"actor.ppo_max_token_len_per_gpu = {actor.ppo_max_token_len_per_gpu}; a sequence "
                "is never split, so raise the cap or shorten the limits"
            )
        if rollout.max_num_seqs < rollout.n:
            raise ValueError(
                f"rollout.max_num_seqs = {rollout.max_num_seqs} is below rollout.n = {rollout.n}; "
                "the responses to one prompt are decoded together, so raise it"
            )
        if data.train_batch_size % actor.ppo_mini_batch_size != 0:
            raise ValueError(
                f"data.train_batch_size = {data.train_batch_size} is not a multiple of "
                f"actor.ppo_mini_batch_size = {actor.ppo_mini_batch_size}"
            )
        if data.task == "files" and not data.train_files:
            raise ValueError("data.train_files is empty: name a file, or choose data.task")
        truncated = rollout.top_p < 1 or rollout.top_k > 0
        if truncated and self.flow.old_logprobs != "rollout":
            raise ValueError(
                f"rollout.top_p = {rollout.top_p}, rollout.top_k = {rollout.top_k}: the weight "
                "must divide by the truncated distribution that was sampled from; use top_p=1 "
                "top_k=-1, or flow.old_logprobs=rollout"
            )
        if actor.strategy == "torch" and self.parallel.model_size > 1:
            raise ValueError(
                f"actor.strategy = torch runs in one process, but `parallel` asks for "
                f"{self.parallel.model_size}; use actor.strategy=megatron under torchrun"
            )
        return self

    @property
    def is_megatron(self) -> bool:
        """Whether Megatron trains the policy."""
        if self.actor.strategy != "auto":
            return self.actor.strategy == "megatron"
        is_spread = self.parallel.model_size * self.parallel.expert_model_parallel_size > 1
        return is_spread or int(os.environ.get("WORLD_SIZE", "1")) > 1

    @property
    def run_dir(self) -> Path:
        """The directory that receives everything this run writes."""
        return Path(self.trainer.default_local_dir or f"runs/{self.trainer.experiment_name}")


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
