"""What a run trains with: policy, reference, engine and rewards, in one process or in many."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.background_save import BackgroundSave
from flowrl.batch import Sample
from flowrl.checkpoint import (
    Checkpoint,
    check_state,
    check_tensors,
    load_training_state,
    save_checkpoint,
)
from flowrl.device import resolve_device
from flowrl.interface import Critic, Policy
from flowrl.objectives.flow_balance import PRESETS, FlowBalancePreset
from flowrl.partition import PartitionNetwork, build_partition
from flowrl.policy.critic import TorchCritic, build_value_head
from flowrl.policy.optimizer import MasterAdamW, ParamGroup
from flowrl.policy.packing_check import check_packing
from flowrl.policy.pretrained import load_model, move, weights_fingerprint
from flowrl.policy.torch_policy import TorchPolicy
from flowrl.rewards import RewardPool, RewardScorer
from flowrl.rollout import RolloutEngine
from flowrl.rollout.transformers import TransformersEngine
from flowrl.rollout.vllm_engine import VllmEngine
from flowrl.settings import Config, FlowConfig, OptimConfig

T = TypeVar("T")


class Parts(Protocol):
    """The parts that differ between one process and many. Every rank makes the same calls."""

    @property
    def policy(self) -> Policy: ...

    @property
    def engine(self) -> RolloutEngine: ...

    @property
    def rewards(self) -> RewardScorer: ...

    @property
    def critic(self) -> Critic | None:
        """PPO's critic."""
        ...

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        ...

    @property
    def reference_fingerprint(self) -> str:
        """Says whether two runs have the same reference weights."""
        ...

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Response log-probs [|y|] per sample under the frozen reference policy."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        ...

    def on_main(self, compute: Callable[[], T]) -> T:
        """Run `compute` where files are written; every rank gets its result or its error."""
        ...

    def save(
        self,
        run_dir: Path,
        step: int,
        state: dict[str, Any],
        keep: int,
        background: BackgroundSave | None = None,
    ) -> Path:
        """Write a checkpoint with `state` beside the policy; no file in it is a pickle.

        With `background` it is copied to host memory and written while the caller goes on.
        """
        ...

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take the policy from a checkpoint, publish it, and return the `state` saved with it."""
        ...

    def close(self) -> None:
        """Free engine and reward workers."""
        ...


@dataclass
class TorchParts:
    """Everything in this process, on one device."""

    policy: TorchPolicy
    critic: TorchCritic | None
    engine: RolloutEngine
    rewards: RewardScorer
    reference: PreTrainedModel | None  # None: the objective does not read it
    reference_fingerprint: str
    model_path: str
    tokenizer: PreTrainedTokenizerBase
    offload_reference: bool
    is_main: bool = True

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        assert self.reference is not None
        move(self.reference, self.policy.device)
        logprobs = self.policy.logprobs(samples, self.reference)
        if self.offload_reference:
            move(self.reference, "cpu")
        return logprobs

    def any_rank(self, flag: bool) -> bool:
        return flag

    def on_main(self, compute: Callable[[], T]) -> T:
        return compute()

    def save(
        self,
        run_dir: Path,
        step: int,
        state: dict[str, Any],
        keep: int,
        background: BackgroundSave | None = None,
    ) -> Path:
        return save_checkpoint(
            run_dir,
            step,
            model=self.policy.model,
            tokenizer=self.tokenizer,
            tensors={
                name: tensor
                for trained in (self.policy, self.critic)
                if trained is not None
                for name, tensor in trained.optimizer.state_tensors().items()
            },
            state=state,
            keep=keep,
            background=background,
        )

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        trained = [t for t in (self.policy, self.critic) if t is not None]
        tensors, state = load_training_state(checkpoint)
        check_fingerprint(checkpoint, state, self.model_path, self.reference_fingerprint)
        check_tensors(checkpoint, [t.optimizer.masters for t in trained])
        for own in trained:
            own.optimizer.load_state_tensors(tensors)
        self.engine.publish(self.policy.named_weights(), version=checkpoint.step)
        return state

    def close(self) -> None:
        try:
            self.rewards.close()
        finally:
            self.engine.close()


def check_fingerprint(
    checkpoint: Checkpoint, state: dict[str, Any], model_path: str, fingerprint: str
) -> None:
    """Raise ValueError unless the checkpoint was made against the same reference weights.

    So it does for a state that lacks what a run resumes from.
    """
    check_state(checkpoint, state)
    if state["reference_fingerprint"] != fingerprint:
        raise ValueError(
            f"{checkpoint.path} was trained against a reference with fingerprint "
            f"{state['reference_fingerprint']}, but model.path = {model_path} has {fingerprint}; "
            "restore the model and model.dtype, or use another run directory"
        )


def step_seed(seed: int, step: int, generation: int = 0) -> int:
    """The seed of everything random in one step, or of its further batches of responses."""
    entropy = [seed, step, generation] if generation else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


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


def partition_of(config: Config, hidden_size: int) -> PartitionNetwork | None:
    """The partition network, if the objective has one."""
    if config.algorithm.objective != "flow_balance" or config.flow.log_z != "network":
        return None
    return build_partition(
        hidden_size,
        config.flow.z_num_layers,
        resolve_flow(config.flow).z_dropout,
        step_seed(config.trainer.seed, 0),
    )


def build_torch(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> TorchParts:
    """The parts of a run in one process."""
    device, dtype = resolve_device(config.trainer.device), getattr(torch, config.model.dtype)
    reward = config.reward
    with ExitStack() as stack:  # a start that is refused leaves nothing behind
        rewards = stack.enter_context(
            RewardPool(reward.function, reward.num_workers, reward.timeout_s, reward.failure_score)
        )
        model = load_model(path, dtype, device, config.model.trust_remote_code)
        check_packing(model, config.data.max_prompt_length + config.data.max_response_length)
        fingerprint = weights_fingerprint(model)
        reference = None
        if config.needs_reference:
            reference = load_model(path, dtype, device, config.model.trust_remote_code)
            reference.requires_grad_(False)
        engine = build_engine(config, path, tokenizer, model)
        stack.callback(engine.close)
        parts = TorchParts(
            policy=build_policy(config, model, device),
            critic=build_critic(config, path, device),
            engine=engine,
            rewards=rewards,
            reference=reference,
            reference_fingerprint=fingerprint,
            model_path=config.model.path,
            tokenizer=deepcopy(tokenizer),  # a thread may save it while another encodes
            offload_reference=config.ref.offload,
        )
        stack.pop_all()
    return parts


def build_engine(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> RolloutEngine:
    """The engine that samples; the transformers engine does so with `model`.

    Raises ValueError when the engine is not installed or cannot run the model.
    """
    rollout, data = config.rollout, config.data
    if rollout.engine == "transformers":
        return TransformersEngine(model, tokenizer, rollout.max_num_seqs)
    max_model_len = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    if rollout.servers:
        from flowrl.rollout.vllm_server import VllmServerEngine

        return VllmServerEngine(path, model, tokenizer, rollout, max_model_len=max_model_len)
    return VllmEngine(
        path,
        tokenizer,
        rollout,
        dtype=config.model.dtype,
        max_model_len=max_model_len,
        trust_remote_code=config.model.trust_remote_code,
    )


def build_policy(config: Config, model: PreTrainedModel, device: torch.device) -> TorchPolicy:
    """The trainable policy with its partition network and optimiser."""
    flow = resolve_flow(config.flow)
    partition = partition_of(config, model.config.hidden_size)
    groups = [ParamGroup(list(model.named_parameters()), config.actor.optim.lr)]
    if partition is not None:
        partition.to(device)
        z_lr = config.actor.optim.lr if config.flow.z_lr is None else config.flow.z_lr
        named = [(f"partition.{n}", p) for n, p in partition.named_parameters()]
        groups.append(ParamGroup(named, z_lr))
    if config.model.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return TorchPolicy(
        model=model,
        partition=partition,
        optimizer=build_optimizer(groups, config.actor.optim),
        temperature=config.rollout.temperature,
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
        pooling=flow.pooling,
        detach_z=flow.detach_z,
        drop_mass=config.actor.drop_mass,
        memory_budget=config.actor.memory_budget,
        device=device,
    )


def build_critic(config: Config, path: str, device: torch.device) -> TorchCritic | None:
    """PPO's critic, a copy of the policy's model with a value head; None for other objectives."""
    if config.algorithm.objective != "ppo":
        return None
    dtype, optim = getattr(torch, config.model.dtype), config.critic.optim
    model = load_model(path, dtype, device, config.model.trust_remote_code)
    head = build_value_head(model.config.hidden_size, step_seed(config.trainer.seed, 0)).to(device)
    if config.model.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    named = [(f"critic.{n}", p) for n, p in model.base_model.named_parameters()]
    named += [(f"critic.head.{n}", p) for n, p in head.named_parameters()]
    return TorchCritic(
        model=model,
        head=head,
        optimizer=build_optimizer([ParamGroup(named, optim.lr)], optim),
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
        device=device,
    )


def build_optimizer(groups: list[ParamGroup], optim: OptimConfig) -> MasterAdamW:
    return MasterAdamW(
        groups,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        warmup_steps=optim.lr_warmup_steps,
        max_grad_norm=optim.clip_grad,
    )
