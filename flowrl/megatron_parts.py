"""The parts of a run that torchrun started in many processes: Megatron trains, rank 0 samples."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.background_save import BackgroundSave
from flowrl.batch import Sample
from flowrl.checkpoint import (
    HF_FOLDER,
    TENSORS_FILE,
    Checkpoint,
    check_tensors,
    load_state,
    save_folder,
)
from flowrl.device import resolve_device
from flowrl.main_rank import (
    SHARED_ERRORS,
    MainRankEngine,
    MainRankRewards,
    gathered,
    is_main_rank,
    on_main_rank,
)
from flowrl.megatron.critic import MegatronCritic, critic_name
from flowrl.megatron.experts import file_tensors
from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import FlowModel, WrappedChunks, build_chunks, wrap
from flowrl.megatron.optimizer import MegatronAdamW
from flowrl.megatron.optimizer_state import (
    load_training_tensors,
    training_shapes,
    training_tensors,
)
from flowrl.megatron.policy import MegatronPolicy
from flowrl.megatron.watchdog import Watchdog
from flowrl.megatron.weights import load_hf_weights
from flowrl.parts import (
    build_engine,
    check_fingerprint,
    partition_of,
    resolve_flow,
    step_seed,
)
from flowrl.policy.critic import build_value_head
from flowrl.policy.pretrained import load_model, weights_fingerprint
from flowrl.rewards import RewardPool
from flowrl.rollout import RolloutEngine
from flowrl.rollout.publication import expected_weights
from flowrl.settings import Config, OptimConfig, ParallelConfig
from flowrl.tensor_file import TensorSpec, plan_tensor_file

T = TypeVar("T")
NamedTensors = Iterable[tuple[str, Tensor]]


@dataclass
class MegatronParts:
    """Every rank holds its part of the policy and the reference; see flowrl.parts.Parts."""

    policy: MegatronPolicy
    engine: MainRankEngine
    rewards: MainRankRewards
    reference: list[FlowModel] | None  # None: the objective does not read it
    offload_reference: bool
    reference_fingerprint: str
    model_path: str
    tokenizer: PreTrainedTokenizerBase
    hf_config: PretrainedConfig
    generation_config: GenerationConfig | None
    shapes: dict[str, torch.Size]  # of the model's weights, by HF name
    trained_shapes: dict[str, torch.Size]  # of all that is trained, by the checkpoint's names
    watchdog: Watchdog
    critic: MegatronCritic | None = None

    @property
    def is_main(self) -> bool:
        return is_main_rank()

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
        assert self.reference is not None
        for chunk in self.reference:
            torch.nn.Module.to(chunk, torch.cuda.current_device())
        logprobs = self.policy.logprobs(samples, self.reference)
        if self.offload_reference:
            for chunk in self.reference:
                torch.nn.Module.to(chunk, "cpu")
        return logprobs

    def any_rank(self, flag: bool) -> bool:
        flags = torch.tensor([flag], dtype=torch.int32, device=torch.cuda.current_device())
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def on_main(self, compute: Callable[[], T]) -> T:
        return on_main_rank(compute)

    def save(
        self,
        run_dir: Path,
        step: int,
        state: dict[str, Any],
        keep: int,
        background: BackgroundSave | None = None,
    ) -> Path:
        """Write what one process would write, tensor by tensor through the main rank.

        Any layout, or one process, can continue from it. With `background` the main rank's host
        memory holds all of it until it is written: 14 bytes per bfloat16 parameter of the whole
        model, 16 per float32 one, and 12 per parameter of a critic, where it otherwise holds one
        tensor. Raises GatherError, on that rank alone, where the gathering itself fails.
        """
        if background is not None:  # before the next copies; a failure is every rank's
            on_main_rank(background.wait)
        weights = gathered(self.policy.named_weights())
        trained = gathered(self._training_tensors())
        dtype = self.policy.chunks[0].config.params_dtype

        def write(folder: Path, weights: NamedTensors, trained: NamedTensors) -> None:
            self.tokenizer.save_pretrained(folder / HF_FOLDER)
            hf_config = deepcopy(self.hf_config)
            hf_config.dtype = dtype  # the weights', not that of the files the run began with
            hf_config.save_pretrained(folder / HF_FOLDER)
            if self.generation_config is not None:  # some end tokens stand there alone
                self.generation_config.to_json_file(folder / HF_FOLDER / "generation_config.json")
            shapes = {
                part: tensor.shape
                for name, shape in self.shapes.items()
                for part, tensor in file_tensors(name, torch.empty(shape, device="meta"))
            }
            parts = (part for name, weight in weights for part in file_tensors(name, weight))
            write_tensors(folder / HF_FOLDER / "model.safetensors", shapes, dtype, parts)
            shapes = training_shapes(self.trained_shapes)
            write_tensors(folder / TENSORS_FILE, shapes, torch.float32, trained)

        def save() -> Path:
            try:
                sources: tuple[NamedTensors, NamedTensors] = (weights, trained)
                if background is not None:  # gathering needs all ranks, so it happens here
                    sources = on_host(weights, dtype), on_host(trained, torch.float32)
                write_from = partial(write, weights=sources[0], trained=sources[1])
                return save_folder(run_dir, step, write_from, state, keep, background)
            except SHARED_ERRORS:  # a full disk must not leave the others in a collective
                deque(weights, maxlen=0)
                deque(trained, maxlen=0)
                raise

        if not self.is_main:
            deque(weights, maxlen=0)
            deque(trained, maxlen=0)
        return on_main_rank(save)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        state = load_state(checkpoint)
        check_fingerprint(checkpoint, state, self.model_path, self.reference_fingerprint)
        critic = {name for name in self.trained_shapes if name.startswith("critic.")}
        check_tensors(checkpoint, [self.trained_shapes.keys() - critic, critic])
        load_training_tensors(self.policy, checkpoint.path / TENSORS_FILE)
        if self.critic is not None:
            load_training_tensors(self.critic, checkpoint.path / TENSORS_FILE, critic_name)
        self.engine.publish(self.policy.named_weights(), version=checkpoint.step)
        return state

    def _training_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from training_tensors(self.policy)
        if self.critic is not None:
            yield from training_tensors(self.critic, critic_name)

    def close(self) -> None:
        self.watchdog.close(sys.exception())  # the one that ends the run, if any
        self.rewards.close()
        self.engine.close()


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout that the configuration asks for."""
    return Layout(
        tensor=parallel.tensor_model_parallel_size,
        pipeline=parallel.pipeline_model_parallel_size,
        virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
        context=parallel.context_parallel_size,
        expert=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
    )


def build_megatron(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> MegatronParts:
    """The parts of one rank. Raises ValueError for what Megatron's layers do not represent."""
    layout, dtype = layout_of(config.parallel), getattr(torch, config.model.dtype)
    initialize(layout, 60.0 * config.parallel.timeout_minutes, config.trainer.device)
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(60.0 * config.parallel.timeout_minutes))
        hf_config = AutoConfig.from_pretrained(path)
        partition = partition_of(config, hf_config.hidden_size)
        chunks = build_chunks(
            hf_config, layout, dtype, partition=partition, recompute=recompute_of(config)
        )
        load_hf_weights(chunks, path)
        value_head, critic = None, None
        if config.algorithm.objective == "ppo":
            value_head = build_value_head(hf_config.hidden_size, step_seed(config.trainer.seed, 0))
            critic = build_critic(config, hf_config, path, layout, value_head)
        shapes = expected_weights(hf_config)
        reference = None
        if config.needs_reference:
            reference = build_chunks(hf_config, layout, dtype)
            load_hf_weights(reference, path)
            for chunk in reference:
                chunk.requires_grad_(False)
        rewards, engine, fingerprint, generation_config = on_main_rank_only(
            config, path, tokenizer, dtype
        )
        watchdog.num_steps = lambda: engine.weight_version
        parts = MegatronParts(
            policy=build_policy(config, chunks, layout),
            critic=critic,
            engine=engine,
            rewards=rewards,
            reference=reference,
            offload_reference=config.ref.offload,
            reference_fingerprint=fingerprint,
            model_path=config.model.path,
            tokenizer=deepcopy(tokenizer),  # a thread may save it while another encodes
            hf_config=hf_config,
            generation_config=generation_config,
            shapes=shapes,
            trained_shapes=trained_shapes(shapes, partition, value_head),
            watchdog=watchdog,
        )
        stack.pop_all()
    return parts


def on_host(tensors: NamedTensors, dtype: torch.dtype) -> list[tuple[str, Tensor]]:
    """Copies in host memory; with one rank, what is gathered is the trained tensor itself."""
    return [(name, tensor.detach().to("cpu", dtype, copy=True)) for name, tensor in tensors]


def write_tensors(
    path: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, tensors: NamedTensors
) -> None:
    """Write tensors of one dtype as they come."""
    file = plan_tensor_file({name: TensorSpec(dtype, shape) for name, shape in shapes.items()})
    file.write(path, tensors)


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of a module's parameters; a tied one appears once."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def trained_shapes(
    weights: dict[str, torch.Size],
    partition: torch.nn.Module | None,
    value_head: torch.nn.Module | None,
) -> dict[str, torch.Size]:
    """All that is trained, by its name in a checkpoint; `weights` are the model's by HF name."""
    shapes = dict(weights)
    if partition is not None:
        shapes |= {f"partition.{name}": shape for name, shape in shapes_of(partition).items()}
    if value_head is not None:
        trunk = {name: shape for name, shape in weights.items() if name.startswith("model.")}
        head = {f"value_head.{name}": shape for name, shape in shapes_of(value_head).items()}
        shapes |= {critic_name(name): shape for name, shape in (trunk | head).items()}
    return shapes


def on_main_rank_only(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> tuple[MainRankRewards, MainRankEngine, str, GenerationConfig | None]:
    """Reward workers, engine, the reference's fingerprint and its generation config.

    The engine has a model of its own.
    """
    pool: RewardPool | None = None
    engine: RolloutEngine | None = None

    def build() -> tuple[str, GenerationConfig | None]:
        nonlocal pool, engine
        reward = config.reward
        is_sampled_from = config.rollout.engine == "transformers"
        device = resolve_device(config.trainer.device) if is_sampled_from else torch.device("cpu")
        with ExitStack() as stack:
            pool = stack.enter_context(
                RewardPool(
                    reward.function, reward.num_workers, reward.timeout_s, reward.failure_score
                )
            )
            model = load_model(path, dtype, device, config.model.trust_remote_code)
            fingerprint = weights_fingerprint(model)
            generation_config = deepcopy(model.generation_config)
            engine = build_engine(config, path, tokenizer, model)
            stack.pop_all()
        return fingerprint, generation_config

    # What is refused there is refused on every rank.
    fingerprint, generation_config = on_main_rank(build)
    return MainRankRewards(pool), MainRankEngine(engine), fingerprint, generation_config


def build_policy(config: Config, chunks: list[FlowModel], layout: Layout) -> MegatronPolicy:
    """The trainable policy of this rank with its optimiser."""
    flow, optim = resolve_flow(config.flow), config.actor.optim
    wrapped = wrap_for(config.parallel, chunks)
    z_lr = optim.lr if config.flow.z_lr is None else config.flow.z_lr
    return MegatronPolicy(
        chunks=wrapped,
        optimizer=build_optimizer(wrapped, optim, z_lr),
        layout=layout,
        temperature=config.rollout.temperature,
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
        pooling=flow.pooling,
        detach_z=flow.detach_z,
        drop_mass=config.actor.drop_mass,
        memory_budget=config.actor.memory_budget,
    )


def build_critic(
    config: Config,
    hf_config: PretrainedConfig,
    path: str,
    layout: Layout,
    value_head: torch.nn.Linear,
) -> MegatronCritic:
    """This rank's part of PPO's critic: the trunk of the policy's model with a value head."""
    chunks = build_chunks(
        hf_config,
        layout,
        getattr(torch, config.model.dtype),
        value_head=value_head,
        recompute=recompute_of(config),
    )
    load_hf_weights(chunks, path)
    wrapped = wrap_for(config.parallel, chunks)
    return MegatronCritic(
        chunks=wrapped,
        optimizer=build_optimizer(wrapped, config.critic.optim, config.critic.optim.lr),
        layout=layout,
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
    )


def wrap_for(parallel: ParallelConfig, chunks: list[FlowModel]) -> WrappedChunks:
    """Wrap chunks for training as the configuration says."""
    return wrap(
        chunks,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
    )


def build_optimizer(chunks: WrappedChunks, optim: OptimConfig, z_lr: float) -> MegatronAdamW:
    return MegatronAdamW(
        chunks,
        lr=optim.lr,
        z_lr=z_lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        warmup_steps=optim.lr_warmup_steps,
        max_grad_norm=optim.clip_grad,
    )


def recompute_of(config: Config) -> str | None:
    """What Megatron recomputes in the backward."""
    return "full" if config.model.enable_gradient_checkpointing else None
