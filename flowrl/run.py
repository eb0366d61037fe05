"""Everything a training run holds, built from its configuration or from its last checkpoint."""

import logging
import signal
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from rich.console import Console
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.checkpoint import Checkpoint, latest_checkpoint, load_training_state, save_checkpoint
from flowrl.config import Config, FlowConfig, cache_dir, dump_config
from flowrl.console import TrainingConsole
from flowrl.files import write_whole
from flowrl.metrics import MetricsWriter
from flowrl.objectives.flow_balance import PRESETS, FlowBalancePreset
from flowrl.partition import build_partition
from flowrl.policy.optimizer import MasterAdamW, ParamGroup
from flowrl.policy.pretrained import (
    load_model,
    load_tokenizer,
    resolve_model_path,
    weights_fingerprint,
)
from flowrl.policy.torch_policy import TorchPolicy
from flowrl.rewards import RewardPool
from flowrl.rollout import RolloutEngine, SamplingParams
from flowrl.rollout.transformers import TransformersEngine
from flowrl.tasks import PromptSampler, Split, TokenizedPrompt, load_prompts, tokenize_prompts

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """The parts of a run. `step` counts finished training steps."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    policy: TorchPolicy
    reference: PreTrainedModel
    reference_fingerprint: str
    engine: RolloutEngine
    rewards: RewardPool
    train_prompts: list[TokenizedPrompt]
    val_prompts: list[TokenizedPrompt]
    sampler: PromptSampler
    sampling: SamplingParams
    val_sampling: SamplingParams
    writer: MetricsWriter
    console: TrainingConsole
    device: torch.device
    step: int = 0

    def is_due(self, frequency: int) -> bool:
        """Whether something done every `frequency` steps (-1: only at the end) is due now."""
        is_last = self.step == self.config.trainer.total_training_steps
        return is_last or (frequency > 0 and self.step % frequency == 0)

    def log(self, metrics: dict[str, float]) -> None:
        """Record the metrics of the finished step and show them."""
        if metrics:
            self.writer.write(self.step, metrics)
            self.console.step(self.step, metrics)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.rewards.close()
        self.engine.close()
        self.writer.close()


def step_seed(seed: int, step: int) -> int:
    """The seed of everything random in one step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def resolve_flow(flow: FlowConfig) -> FlowBalancePreset:
    """The preset with the settings that the configuration overrides."""
    overrides = {
        "weighting": flow.weighting,
        "clip_low": flow.clip_low,
        "clip_high": flow.clip_high,
        "weight_cap": flow.weight_cap,
        "pooling": flow.z_pooling,
        "z_dropout": flow.z_dropout,
        "detach_z": flow.z_detach,
    }
    return replace(PRESETS[flow.preset], **{k: v for k, v in overrides.items() if v is not None})


def resolve_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU. Raises ValueError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.device = cuda, but torch sees no GPU; use auto or cpu")
    return torch.device(name)


def train_sampling(config: Config) -> SamplingParams:
    """How training responses are sampled."""
    rollout = config.rollout
    return SamplingParams(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=config.data.max_response_length,
        stop=tuple(rollout.stop),
    )


def val_sampling(config: Config) -> SamplingParams:
    """How held-out responses are sampled."""
    sampling, validation = train_sampling(config), config.validation
    temperature = validation.temperature or sampling.temperature
    return replace(sampling, n=validation.n, temperature=temperature)


def load_split(
    config: Config, split: Split, tokenizer: PreTrainedTokenizerBase
) -> list[TokenizedPrompt]:
    """The training or held-out prompts, tokenised and within the length limit."""
    data = config.data
    files = data.train_files if split == "train" else data.val_files
    if data.task == "files" and not files:
        return []
    prompts = load_prompts(
        data.task,
        split,
        files=files,
        count=data.train_max_samples if split == "train" else data.val_max_samples,
        seed=0,  # the set is the same for every training seed; only its order changes
        options=data.task_options,
    )
    tokenized, num_dropped = tokenize_prompts(
        prompts,
        tokenizer,
        data.max_prompt_length,
        chat_template=data.chat_template,
        truncation="filter" if data.filter_overlong_prompts else data.truncation,
    )
    if num_dropped:
        logger.warning(
            "%d of %d %s prompts exceed data.max_prompt_length = %d and were dropped",
            num_dropped,
            len(prompts),
            split,
            data.max_prompt_length,
        )
    return tokenized


def build_policy(config: Config, model: PreTrainedModel, device: torch.device) -> TorchPolicy:
    """The trainable policy with its partition network and optimiser."""
    flow, optim = resolve_flow(config.flow), config.actor.optim
    partition = None
    groups = [ParamGroup(list(model.named_parameters()), optim.lr)]
    if config.flow.log_z == "network":
        partition = build_partition(
            model.config.hidden_size,
            config.flow.z_num_layers,
            flow.z_dropout,
            step_seed(config.trainer.seed, 0),
        ).to(device)
        z_lr = optim.lr if config.flow.z_lr is None else config.flow.z_lr
        named = [(f"partition.{n}", p) for n, p in partition.named_parameters()]
        groups.append(ParamGroup(named, z_lr))
    if config.model.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return TorchPolicy(
        model=model,
        partition=partition,
        optimizer=MasterAdamW(
            groups,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            warmup_steps=optim.lr_warmup_steps,
            max_grad_norm=optim.clip_grad,
        ),
        temperature=config.rollout.temperature,
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
        pooling=flow.pooling,
        detach_z=flow.detach_z,
        drop_mass=config.actor.drop_mass,
        device=device,
    )


def start(config: Config) -> Run:
    """Build a run, continuing from the run directory's last checkpoint when there is one.

    Raises ValueError, before anything is trained, for whatever the configuration asks that the
    machine, the data or the checkpoint cannot give.
    """
    if config.trainer.num_threads is not None:
        torch.set_num_threads(config.trainer.num_threads)
    device = resolve_device(config.trainer.device)
    path = resolve_model_path(config.model.path, cache_dir())
    dtype = getattr(torch, config.model.dtype)
    tokenizer = load_tokenizer(path, config.model.trust_remote_code)
    train_prompts = load_split(config, "train", tokenizer)
    val_prompts = load_split(config, "val", tokenizer)
    sampler = PromptSampler(
        len(train_prompts),
        config.data.train_batch_size,
        config.trainer.seed,
        shuffle=config.data.shuffle,
    )
    reward = config.reward
    with ExitStack() as stack:  # a start that is refused leaves no reward workers behind
        rewards = stack.enter_context(
            RewardPool(reward.function, reward.num_workers, reward.timeout_s, reward.failure_score)
        )
        reference = load_model(path, dtype, device, config.model.trust_remote_code)
        reference.requires_grad_(False).eval()
        model = load_model(path, dtype, device, config.model.trust_remote_code)
        policy = build_policy(config, model, device)
        engine = TransformersEngine(model, tokenizer, config.rollout.max_num_seqs)
        fingerprint = weights_fingerprint(reference)
        checkpoint = (
            latest_checkpoint(config.run_dir) if config.trainer.resume_mode == "auto" else None
        )
        if checkpoint is not None:  # before the writer: what is refused leaves the metrics alone
            resume(checkpoint, config, policy, sampler, engine, fingerprint)
        resume_step = None if checkpoint is None else checkpoint.step
        run = Run(
            config=config,
            tokenizer=tokenizer,
            policy=policy,
            reference=reference,
            reference_fingerprint=fingerprint,
            engine=engine,
            rewards=rewards,
            train_prompts=train_prompts,
            val_prompts=val_prompts,
            sampler=sampler,
            sampling=train_sampling(config),
            val_sampling=val_sampling(config),
            writer=MetricsWriter(
                config.run_dir,
                [name for name in config.trainer.logger if name != "console"],
                project_name=config.trainer.project_name,
                experiment_name=config.trainer.experiment_name,
                config=config.model_dump(mode="json"),
                resume_step=resume_step,
            ),
            console=TrainingConsole(
                config.trainer.total_training_steps,
                first_step=resume_step or 0,
                console=None if "console" in config.trainer.logger else Console(file=StringIO()),
            ),
            device=device,
            step=resume_step or 0,
        )
        write_whole(config.run_dir / "config.yaml", dump_config(config))
        stack.pop_all()
    return run


def resume(
    checkpoint: Checkpoint,
    config: Config,
    policy: TorchPolicy,
    sampler: PromptSampler,
    engine: RolloutEngine,
    reference_fingerprint: str,
) -> None:
    """Take weights, optimiser and data position from a checkpoint.

    Raises ValueError when it was made against another reference model or on other data.
    """
    tensors, state = load_training_state(checkpoint)
    if state["reference_fingerprint"] != reference_fingerprint:
        raise ValueError(
            f"{checkpoint.path} was trained against a reference with fingerprint "
            f"{state['reference_fingerprint']}, but model.path = {config.model.path} has "
            f"{reference_fingerprint}; restore the model or use another run directory"
        )
    sampler.load_state_dict(state["sampler"])
    policy.optimizer.load_state_tensors(tensors)
    engine.publish(policy.named_weights(), version=checkpoint.step)
    logger.warning("continuing %s after step %d", config.run_dir, checkpoint.step)


def save(run: Run) -> Path:
    """Write a checkpoint of the finished step; no file in it is a pickle."""
    run.console.phase("saving")
    return save_checkpoint(
        run.config.run_dir,
        run.step,
        model=run.policy.model,
        tokenizer=run.tokenizer,
        tensors=run.policy.optimizer.state_tensors(),
        state={
            "step": run.step,
            "sampler": run.sampler.state_dict(),
            "reference_fingerprint": run.reference_fingerprint,
            "torch_version": torch.__version__,
        },
        keep=run.config.trainer.max_actor_ckpt_to_keep,
    )


class Interrupt:
    """Turns SIGTERM and SIGINT into a flag, so that the running step ends and is saved.

    A second signal acts as usual. Use as a context manager in the main thread.
    """

    def __init__(self) -> None:
        self.is_set = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_set = True
        signal.signal(number, signal.SIG_DFL)
        logger.warning("%s: saving after this step", signal.Signals(number).name)

    def __enter__(self) -> "Interrupt":
        self._previous = {
            number: signal.signal(number, self._on_signal)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
