"""How the ranks divide the work: tensor, pipeline, context, expert and data parallelism."""

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from flowrl.megatron.cpu import enable_cpu


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; data parallelism takes what remains of the world.

    Raises ValueError for a combination that no world size could satisfy.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline rank
    context: int = 1
    expert: int = 1  # ranks that share the experts: tensor, context and data ranks of a stage
    sequence_parallel: bool = False  # shard activations between the tensor-parallel layers

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: give at least 1")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"virtual_pipeline = {self.virtual_pipeline} interleaves the chunks of several "
                "pipeline ranks, but pipeline = 1: raise pipeline, or set virtual_pipeline = 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "sequence_parallel = True shards over the tensor-parallel ranks, but tensor = 1: "
                "raise tensor, or set sequence_parallel = False"
            )

    @property
    def model_ranks(self) -> int:
        """The least number of ranks, and what any number must be a multiple of.

        They hold one copy of the model, and without experts one micro-batch.
        """
        return math.lcm(self.tensor * self.context, self.expert) * self.pipeline

    @property
    def sequence_multiple(self) -> int:
        """What the padded length of every sequence must be a multiple of.

        Context parallelism deals 2 chunks of each sequence to every rank; sequence parallelism
        shards what a rank has got once more.
        """
        zigzag = 2 * self.context if self.context > 1 else 1
        return zigzag * (self.tensor if self.sequence_parallel else 1)


def check_device(device: str, local_rank: int, num_gpus: int) -> None:
    """Refuse a device that this rank cannot have: Megatron takes the GPU of the rank's number.

    Args:
        device: trainer.device; auto and cuda take the GPUs where there are some.
        local_rank: the rank's number among those of its machine.
        num_gpus: that torch sees there.

    Raises ValueError for cpu where there are GPUs, and for more ranks than GPUs.
    """
    if num_gpus == 0:
        return
    if device == "cpu":
        raise ValueError(
            f"trainer.device = cpu, but torch sees {num_gpus} GPU(s), which Megatron takes: "
            'start with CUDA_VISIBLE_DEVICES="" to train on the CPU, or use trainer.device=auto'
        )
    if local_rank >= num_gpus:
        raise ValueError(
            f"rank {local_rank} of this machine has no GPU: torch sees {num_gpus}, and every rank "
            f"needs one of its own; start torchrun with --nproc-per-node {num_gpus}, or with "
            'CUDA_VISIBLE_DEVICES="" to train on the CPU'
        )


def initialize(layout: Layout, timeout_s: float = 1800.0, device: str = "auto") -> None:
    """Create the process groups of `layout`, and the default group under torchrun if there is none.

    A collective that waits longer than `timeout_s` fails. Raises ValueError when the world's size
    does not fit the layout, and for a `device` that this rank cannot have (check_device).
    """
    enable_cpu()
    has_cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if has_cuda else "gloo", timeout=timedelta(seconds=timeout_s)
            )
        except ValueError as error:  # the variables that torchrun sets are missing
            raise ValueError(
                f"this layout needs a multiple of {layout.model_ranks} processes; start them with "
                f"torchrun --nproc-per-node {layout.model_ranks} -m flowrl train ... ({error})"
            ) from error
        if has_cuda:
            local_rank = dist.get_node_local_rank()  # pyright: ignore[reportPrivateImportUsage]
            check_device(device, local_rank, torch.cuda.device_count())
            torch.cuda.set_device(local_rank)
    world_size = dist.get_world_size()
    if world_size % layout.model_ranks:
        raise ValueError(
            f"{world_size} ranks are no multiple of tensor * pipeline * context = "
            f"{layout.tensor} * {layout.pipeline} * {layout.context} and of pipeline * expert = "
            f"{layout.pipeline} * {layout.expert}: start a multiple of {layout.model_ranks} ranks"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=(
            layout.virtual_pipeline if layout.virtual_pipeline > 1 else None
        ),
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,  # experts are narrow: they are dealt out whole
        distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
    )
    # The model has no dropout and takes its weights from outside: no state per rank is needed.
    initialize_rng_tracker(inference_rng_tracker=True)


def is_last_stage() -> bool:
    """Whether this rank belongs to the last pipeline stage, which computes the loss."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def data_rank() -> int:
    """Which share of the samples this rank trains; context-parallel ranks have the same."""
    return parallel_state.get_data_parallel_rank()


def data_size() -> int:
    """The number of shares that the samples are divided into."""
    return parallel_state.get_data_parallel_world_size()


def tensor_group() -> dist.ProcessGroup:
    """Ranks that share one layer's matrices and the vocabulary."""
    return _one(parallel_state.get_tensor_model_parallel_group())


def expert_group() -> dist.ProcessGroup:
    """Ranks that share the experts of a layer."""
    return _one(parallel_state.get_expert_model_parallel_group())


def context_group() -> dist.ProcessGroup:
    """Ranks that share the tokens of every sequence."""
    return _one(parallel_state.get_context_parallel_group())


def pipeline_group() -> dist.ProcessGroup:
    """Ranks that share the layers."""
    return _one(parallel_state.get_pipeline_model_parallel_group())


def _one(group: object) -> dist.ProcessGroup:
    """Megatron's accessors are annotated for several groups."""
    assert isinstance(group, dist.ProcessGroup)
    return group
