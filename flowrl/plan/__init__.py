"""`flowrl plan`: memory, time and layouts of a run by arithmetic, before a GPU is rented.

`make_plan` computes and flowrl.plan.report prints. Neither torch nor the model's weights are read.
"""

from dataclasses import dataclass, replace

from flowrl.plan.hardware import find_gpu
from flowrl.plan.layout import PlannedLayout, configured_layout
from flowrl.plan.search import Candidate, Setting, evaluate, problem_of, search, too_large
from flowrl.plan.sizes import read_sizes
from flowrl.plan.step_time import (
    Generation,
    Workload,
    main_rank_generation,
    separate_generation,
)
from flowrl.settings import Config


@dataclass(frozen=True)
class Split:
    """GPUs that generate, with the fastest layout of the others."""

    num_rollout_gpus: int
    generation: Generation
    best: Candidate

    @property
    def step_s(self) -> float:
        return self.generation.seconds + self.best.time.trainer_s


@dataclass(frozen=True)
class Plan:
    """What `flowrl plan` says."""

    setting: Setting
    layout: PlannedLayout  # the configured one
    configured: Candidate | None  # None: it cannot work
    problem: str | None  # why it cannot work, or does not fit
    generation: Generation
    candidates: list[Candidate]  # that work; those that fit come first, by time
    reasons: dict[str, list[PlannedLayout]]  # why others cannot work
    splits: list[Split]  # by time; empty without rollout GPUs

    @property
    def best(self) -> Candidate | None:
        """The fastest layout that fits."""
        fitting = [c for c in self.candidates if c.fits]
        return fitting[0] if fitting else None


def make_plan(
    config: Config,
    *,
    num_gpus: int,
    gpu: str,
    gpus_per_node: int = 8,
    num_rollout_gpus: int = 0,
    mfu: float = 0.4,
    response_tokens: float | None = None,
) -> Plan:
    """Memory and time of `config` on `num_gpus` GPUs, and of the layouts that it might use.

    Args:
        config: as for `flowrl train`.
        num_gpus: all of them; `num_rollout_gpus` of them only generate.
        gpu: a name of flowrl.plan.hardware.GPUS.
        mfu: FLOPs that the trainer reaches over the GPU's peak.
        response_tokens: mean length; None is half of data.max_response_length.

    Raises:
        ValueError: for numbers out of range and for a model whose sizes are not known. A layout
            that cannot work is a finding and no error.
    """
    for name, value in (("--gpus", num_gpus), ("--gpus-per-node", gpus_per_node)):
        if value < 1:
            raise ValueError(f"{name} {value}: give at least 1")
    if not 0 <= num_rollout_gpus < num_gpus:
        raise ValueError(
            f"--rollout-gpus {num_rollout_gpus} of --gpus {num_gpus}: leave at least one to train"
        )
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu {mfu:g}: give a share above 0 and up to 1")
    longest = config.data.max_response_length
    mean = longest / 2 if response_tokens is None else response_tokens
    if not 0 < mean <= longest:
        raise ValueError(
            f"--response-length {mean:g}: give more than 0 and up to data.max_response_length = "
            f"{longest}"
        )
    if config.model.dtype == "auto":  # every GPU of the list has it
        config = config.with_dtype("bfloat16")
    workload = Workload(find_gpu(gpu), gpus_per_node, mfu, config.data.max_prompt_length / 2, mean)
    sizes = read_sizes(config.model.path)
    setting = Setting(
        config,
        sizes,
        workload,
        num_gpus - num_rollout_gpus,
        is_separate=num_rollout_gpus > 0,
        is_megatron=_is_megatron(config, num_gpus - num_rollout_gpus),
    )
    if num_rollout_gpus:
        generation = separate_generation(config, sizes, workload, num_rollout_gpus)
    else:
        generation = main_rank_generation(config, sizes, workload)
    layout = configured_layout(config, setting.num_gpus)
    problem = problem_of(setting, layout)
    configured = evaluate(setting, layout) if problem is None else None
    if configured is not None and not configured.fits:
        problem = too_large(setting, configured)
    candidates, reasons = search(setting)
    splits = _splits(setting, num_gpus) if num_rollout_gpus else []
    return Plan(setting, layout, configured, problem, generation, candidates, reasons, splits)


def _is_megatron(config: Config, num_gpus: int) -> bool:
    """As flowrl.config.is_megatron decides under torchrun with one process per GPU."""
    if config.actor.strategy != "auto":
        return config.actor.strategy == "megatron"
    return max(num_gpus, config.parallel.num_shares) > 1


def _splits(setting: Setting, num_gpus: int) -> list[Split]:
    """The best layout for every number of rollout GPUs that fills its engines."""
    splits = []
    engine = separate_generation(setting.config, setting.sizes, setting.workload, num_gpus)
    for num_rollout in range(engine.gpus_per_engine, num_gpus, engine.gpus_per_engine):
        num_trainer = num_gpus - num_rollout
        candidates, _ = search(
            replace(
                setting,
                num_gpus=num_trainer,
                is_megatron=_is_megatron(setting.config, num_trainer),
            )
        )
        if candidates and candidates[0].fits:
            generation = separate_generation(
                setting.config, setting.sizes, setting.workload, num_rollout
            )
            splits.append(Split(num_rollout, generation, candidates[0]))
    return sorted(splits, key=lambda split: split.step_s)
