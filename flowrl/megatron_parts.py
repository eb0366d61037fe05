"""The parts of a run that torchrun started in many processes: Megatron trains, rank 0 samples."""

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.batch import Sample
from flowrl.checkpoint import HF_FOLDER, TENSORS_FILE, Checkpoint, load_state, save_folder
from flowrl.main_rank import MainRankEngine, MainRankRewards, is_main_rank, on_main_rank
from flowrl.megatron.layout import Layout, initialize
from flowrl.megatron.model import FlowModel, build_chunks, wrap
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
    resolve_device,
    resolve_flow,
)
from flowrl.policy.pretrained import load_model, weights_fingerprint
from flowrl.rewards import RewardPool
from flowrl.rollout import RolloutEngine
from flowrl.rollout.publication import expected_weights
from flowrl.settings import Config, ParallelConfig
from flowrl.tensor_file import TensorSpec, plan_tensor_file


@dataclass
class MegatronParts:
    """Every rank holds its part of the policy and the reference; see flowrl.parts.Parts."""

    policy: MegatronPolicy
    engine: MainRankEngine
    rewards: MainRankRewards
    reference: list[FlowModel]
    offload_reference: bool
    reference_fingerprint: str
    model_path: str
    tokenizer: PreTrainedTokenizerBase
    hf_config: PretrainedConfig
    shapes: dict[str, torch.Size]  # of the model's weights, by HF name
    partition_shapes: dict[str, torch.Size]
    watchdog: Watchdog
    critic: None = None

    @property
    def is_main(self) -> bool:
        return is_main_rank()

    def reference_logprobs(self, samples: Sequence[Sample]) -> list[Tensor]:
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

    def save(self, run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
        """Write what one process would write, tensor by tensor through the main rank.

        Any layout, or one process, can continue from it.
        """
        weights, trained = self.policy.named_weights(), training_tensors(self.policy)

        def write(folder: Path) -> None:
            self.tokenizer.save_pretrained(folder / HF_FOLDER)
            self.hf_config.save_pretrained(folder / HF_FOLDER)
            dtype = self.policy.chunks[0].config.params_dtype
            write_tensors(folder / HF_FOLDER / "model.safetensors", self.shapes, dtype, weights)
            shapes = training_shapes(self.shapes, self.partition_shapes)
            write_tensors(folder / TENSORS_FILE, shapes, torch.float32, trained)

        def save() -> Path:
            try:
                return save_folder(run_dir, step, write, state, keep)
            finally:  # a full disk must not leave the others in a collective
                deque(weights, maxlen=0)
                deque(trained, maxlen=0)

        if not self.is_main:
            deque(weights, maxlen=0)
            deque(trained, maxlen=0)
        return on_main_rank(save)

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        state = load_state(checkpoint)
        check_fingerprint(checkpoint, state, self.model_path, self.reference_fingerprint)
        load_training_tensors(self.policy, checkpoint.path / TENSORS_FILE)
        self.engine.publish(self.policy.named_weights(), version=checkpoint.step)
        return state

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
    if config.algorithm.objective == "ppo":
        raise ValueError(
            "algorithm.objective = ppo needs a critic, which runs in one process only so far; use "
            "actor.strategy=torch, or another objective"
        )
    layout, dtype = layout_of(config.parallel), getattr(torch, config.model.dtype)
    initialize(layout, 60.0 * config.parallel.timeout_minutes)
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(60.0 * config.parallel.timeout_minutes))
        hf_config = AutoConfig.from_pretrained(path)
        recompute = "full" if config.model.enable_gradient_checkpointing else None
        partition = partition_of(config, hf_config.hidden_size)
        chunks = build_chunks(hf_config, layout, dtype, partition=partition, recompute=recompute)
        load_hf_weights(chunks, path)
        reference = build_chunks(hf_config, layout, dtype)
        load_hf_weights(reference, path)
        for chunk in reference:
            chunk.requires_grad_(False)
        rewards, engine, fingerprint = on_main_rank_only(config, path, tokenizer, dtype)
        watchdog.num_steps = lambda: engine.weight_version
        parts = MegatronParts(
            policy=build_policy(config, chunks, layout),
            engine=engine,
            rewards=rewards,
            reference=reference,
            offload_reference=config.ref.offload,
            reference_fingerprint=fingerprint,
            model_path=config.model.path,
            tokenizer=tokenizer,
            hf_config=hf_config,
            shapes=expected_weights(hf_config),
            partition_shapes={} if partition is None else shapes_of(partition),
            watchdog=watchdog,
        )
        stack.pop_all()
    return parts


def write_tensors(
    path: Path,
    shapes: dict[str, torch.Size],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write tensors of one dtype as they come."""
    file = plan_tensor_file({name: TensorSpec(dtype, shape) for name, shape in shapes.items()})
    file.write(path, tensors)


def shapes_of(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of a module's parameters; a tied one appears once."""
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def on_main_rank_only(
    config: Config, path: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> tuple[MainRankRewards, MainRankEngine, str]:
    """Reward workers, engine and the reference's fingerprint; the engine has a model of its own."""
    pool: RewardPool | None = None
    engine: RolloutEngine | None = None

    def build() -> str:
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
            engine = build_engine(config, path, tokenizer, model)
            stack.pop_all()
        return fingerprint

    fingerprint = on_main_rank(build)  # what is refused there is refused on every rank
    return MainRankRewards(pool), MainRankEngine(engine), fingerprint


def build_policy(config: Config, chunks: list[FlowModel], layout: Layout) -> MegatronPolicy:
    """The trainable policy of this rank with its optimiser."""
    flow, optim, parallel = resolve_flow(config.flow), config.actor.optim, config.parallel
    wrapped = wrap(
        chunks,
        distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
    )
    return MegatronPolicy(
        chunks=wrapped,
        optimizer=MegatronAdamW(
            wrapped,
            lr=optim.lr,
            z_lr=optim.lr if config.flow.z_lr is None else config.flow.z_lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            warmup_steps=optim.lr_warmup_steps,
            max_grad_norm=optim.clip_grad,
        ),
        layout=layout,
        temperature=config.rollout.temperature,
        max_tokens=config.actor.ppo_max_token_len_per_gpu,
        pooling=flow.pooling,
        detach_z=flow.detach_z,
        drop_mass=config.actor.drop_mass,
    )
