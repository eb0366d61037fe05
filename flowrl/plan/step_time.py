"""Estimates of a step's time: FLOPs at an assumed utilisation, bytes at assumed bandwidths.

Nothing here is measured. Every assumption is a named constant or an option of `flowrl plan`, and
`assumptions` puts them into words for the report.
"""

import math
from dataclasses import dataclass

from flowrl.plan.hardware import Gpu
from flowrl.plan.layout import PlannedLayout
from flowrl.plan.memory import (
    USABLE_SHARE,
    element_bytes,
    kept_softmax_bytes,
    kv_bytes_per_token,
)
from flowrl.plan.sizes import (
    ModelSizes,
    active_parameters,
    model_parameters,
    stage_expert_parameters,
    stage_parameters,
)
from flowrl.settings import Config

BANDWIDTH_SHARE = 0.7  # of the peak, for memory, links and network
KEPT_PAIRS = 0.05  # of the head's (token, tile) pairs, when actor.drop_mass > 0
HOST_S_PER_LAYER = 1e-3  # of one decoding step of the transformers engine, which launches layers
ENGINE_MEMORY_SHARE = 0.9  # of a rollout GPU, for weights and KV cache


@dataclass(frozen=True)
class Workload:
    """What a plan assumes of a run beyond its configuration."""

    gpu: Gpu
    gpus_per_node: int
    mfu: float  # trainer FLOPs per second over the peak's
    prompt_tokens: float  # mean
    response_tokens: float  # mean


@dataclass(frozen=True)
class PassTime:
    """One pass over a batch on the trainer's GPUs."""

    seconds: float
    communication_s: float  # contained in `seconds`, as nothing is assumed to overlap
    bubble: float  # share of the time in which the slowest stage has no micro-batch
    num_micro_batches: int  # per data-parallel rank


@dataclass(frozen=True)
class StepTime:
    """Seconds of one training step, by phase; the phases follow one another."""

    reference: PassTime | None  # None: the objective does not read it
    old_logprobs: PassTime | None  # None: the update's own forward gives them
    update: PassTime  # one optimiser step
    num_updates: int
    critic_s: float  # PPO's: values, and its own optimiser steps
    publish_s: float

    @property
    def trainer_s(self) -> float:
        passes = [p for p in (self.reference, self.old_logprobs) if p is not None]
        total = sum(p.seconds for p in passes) + self.num_updates * self.update.seconds
        return total + self.critic_s + self.publish_s


@dataclass(frozen=True)
class Generation:
    """How the responses of one step are sampled."""

    seconds: float
    num_engines: int
    gpus_per_engine: int
    concurrency: int  # sequences decoded together by one engine


def layer_flops(sizes: ModelSizes, num_tokens: float, mean_length: float) -> tuple[float, float]:
    """Forward FLOPs of a mean layer: matrices, and causal attention (half of the scores).

    2 H (2 Q + 2 K + 3 F) and 2 Q L per token of a sequence of length L; arXiv 2205.05198, appendix
    A, with grouped keys and a gated MLP, and half the scores. F is the width that a token passes;
    the router, a hundredth of the experts that it chooses, is left out.
    """
    hidden, queries, keys = sizes.hidden_size, sizes.query_width, sizes.key_width
    layers = range(sizes.num_hidden_layers)
    width = sum(sizes.mlp_width(layer) for layer in layers) / len(layers)
    matrices = 2 * hidden * (2 * queries + 2 * keys + 3 * width)
    return num_tokens * matrices, num_tokens * 2 * queries * mean_length


def pass_time(
    config: Config,
    sizes: ModelSizes,
    layout: PlannedLayout,
    workload: Workload,
    num_sequences: int,
    *,
    is_update: bool,
    has_head: bool = True,
) -> PassTime:
    """Time of one pass of all sequences: forward only, or forward, backward and reduction.

    Backward of matrices 2, of attention 2.5 (it recomputes the scores) and of the head 3 times the
    forward (3 f for f kept pairs, f = 1 when drop_mass = 0; 2 where the softmax is kept). The last
    of p stages also has the head and sets the pace: (m + (p - 1) / v) micro-batch times, where the
    second term is the bubble of 1F1B with v chunks a stage (arXiv 2104.04473, Eq. in section 2.2).
    """
    mean_length = workload.prompt_tokens + workload.response_tokens
    tokens = num_sequences * mean_length / layout.data
    cap = config.actor.ppo_max_token_len_per_gpu * layout.context
    num_micro_batches = max(1, math.ceil(tokens / cap))
    if layout.virtual_pipeline > 1:
        num_micro_batches = -(-num_micro_batches // layout.pipeline) * layout.pipeline
    micro_tokens = tokens / num_micro_batches

    matrices, attention = layer_flops(sizes, micro_tokens, mean_length)
    forward = matrices + attention
    layer = forward
    if is_update:
        layer += 2 * matrices + 2.5 * attention + (forward if layout.recompute else 0)
    rows = micro_tokens * workload.response_tokens / mean_length
    kept = KEPT_PAIRS if config.actor.drop_mass > 0 else 1.0
    is_softmax_kept = kept_softmax_bytes(config, sizes, layout, rows / layout.context) > 0
    backward = (2 if is_softmax_kept else 3 * kept) * is_update
    head = 2 * rows * sizes.hidden_size * sizes.vocab_size * (1 + backward)
    layers = sizes.num_hidden_layers / layout.pipeline
    slowest = layers * layer + (head if has_head else 0)
    compute_s = slowest / (layout.tensor * layout.context * workload.gpu.bf16_flops * workload.mfu)

    exchange_s = layers * _layer_exchange_s(
        config, sizes, layout, workload, micro_tokens / layout.context, is_update
    )
    num_slots = num_micro_batches + (layout.pipeline - 1) / layout.virtual_pipeline
    reduce_s = _reduce_s(config, sizes, layout, workload) if is_update else 0.0
    return PassTime(
        seconds=num_slots * (compute_s + exchange_s) + reduce_s,
        communication_s=num_slots * exchange_s + reduce_s,
        bubble=1 - num_micro_batches / num_slots,
        num_micro_batches=num_micro_batches,
    )


def _bandwidth(workload: Workload, num_ranks: int) -> float:
    gpu = workload.gpu
    is_inside = num_ranks <= workload.gpus_per_node
    return BANDWIDTH_SHARE * (gpu.link_bandwidth if is_inside else gpu.network_bandwidth)


def _layer_exchange_s(
    config: Config,
    sizes: ModelSizes,
    layout: PlannedLayout,
    workload: Workload,
    num_tokens: float,
    is_update: bool,
) -> float:
    """Tensor parallelism sums N H twice per pass of a layer, a ring moves each sum's bytes
    2 (t - 1) / t times; context parallelism gathers the others' keys and values, and on the way
    back also scatters their gradients. Expert parallelism sends each of a rank's tokens to its k
    experts and brings k results back."""
    tensor, context, element = layout.tensor, layout.context, element_bytes(config)
    num_passes = (2 + layout.recompute) if is_update else 1
    sums = 2 * num_passes * num_tokens * sizes.hidden_size * element
    seconds = sums * 2 * (tensor - 1) / tensor / _bandwidth(workload, tensor)
    keys = 2 * sizes.key_width / tensor * num_tokens * element
    num_moves = num_passes + is_update
    seconds += num_moves * (context - 1) * keys / _bandwidth(workload, tensor * context)
    copies = sizes.num_experts_per_tok * num_tokens / tensor * sizes.hidden_size * element
    sent = 2 * num_passes * copies * (layout.expert - 1) / layout.expert
    share = len(sizes.expert_layers) / sizes.num_hidden_layers
    return seconds + share * sent / _bandwidth(workload, layout.expert)


def _reduce_s(
    config: Config, sizes: ModelSizes, layout: PlannedLayout, workload: Workload
) -> float:
    """Float32 gradients are reduce-scattered and weights gathered, or gradients all-reduced."""
    ranks, expert_ranks = layout.data * layout.context, layout.stage_gpus // layout.expert
    num_of_experts = stage_expert_parameters(sizes, layout, 0)
    num = stage_parameters(sizes, layout, 0) - num_of_experts
    is_spread = config.parallel.use_distributed_optimizer
    each = 4 + element_bytes(config) if is_spread else 8
    moved = num * (ranks - 1) / ranks + num_of_experts * (expert_ranks - 1) / expert_ranks
    return each * moved / _bandwidth(workload, layout.tensor * ranks)


def step_time(
    config: Config, sizes: ModelSizes, layout: PlannedLayout, workload: Workload, is_separate: bool
) -> StepTime:
    """The trainer's phases of one step, as flowrl.train.training_step goes through them."""
    actor, data = config.actor, config.data
    num_updates = actor.ppo_epochs * data.train_batch_size // actor.ppo_mini_batch_size
    batch = data.train_batch_size * config.rollout.n
    mini_batch = actor.ppo_mini_batch_size * config.rollout.n
    arguments = (config, sizes, layout, workload)
    forward = pass_time(*arguments, batch, is_update=False)
    update = pass_time(*arguments, mini_batch, is_update=True)
    critic_s = 0.0
    if config.algorithm.objective == "ppo":
        values = pass_time(*arguments, batch, is_update=False, has_head=False)
        fit = pass_time(*arguments, mini_batch, is_update=True, has_head=False)
        critic_s = values.seconds + num_updates * fit.seconds
    # Weights travel to the engine's node, or to the main rank's copy.
    size = element_bytes(config) * model_parameters(sizes)
    ranks = workload.gpus_per_node + 1 if is_separate else layout.num_gpus
    publish_s = size / _bandwidth(workload, ranks) if is_separate or layout.num_gpus > 1 else 0.0
    old_logprobs = forward if takes_old_logprobs(config) else None
    reference = forward if config.needs_reference else None
    return StepTime(reference, old_logprobs, update, num_updates, critic_s, publish_s)


def takes_old_logprobs(config: Config) -> bool:
    """Whether the old policy's log-probs need a pass of their own, as in flowrl.train."""
    if config.flow.old_logprobs == "rollout":
        return False
    actor = config.actor
    has_many = actor.ppo_epochs * config.data.train_batch_size > actor.ppo_mini_batch_size
    has_many = has_many or config.algorithm.rollout_correction.is_on
    if config.algorithm.objective == "flow_balance":
        return has_many or config.flow.log_z == "vargrad"
    return has_many or config.algorithm.use_kl_in_reward


def _decode_s(
    sizes: ModelSizes, workload: Workload, element: int, concurrency: float, num_gpus: int
) -> float:
    """One decoding step of an engine: weights and live keys are read once, or FLOPs bind.

    Of E experts, of which every token chooses k evenly, c tokens need E (1 - (1 - k / E)^c).
    """
    parameters = model_parameters(sizes)
    if sizes.expert_layers:
        unread = (1 - sizes.num_experts_per_tok / sizes.num_experts) ** concurrency
        experts = len(sizes.expert_layers) * sizes.num_experts * sizes.expert_parameters
        parameters -= unread * experts
    length = workload.prompt_tokens + workload.response_tokens / 2  # halfway through
    num_bytes = element * parameters + concurrency * length * kv_bytes_per_token(sizes, element)
    read_s = num_bytes / (BANDWIDTH_SHARE * workload.gpu.memory_bandwidth * num_gpus)
    flops = 2 * active_parameters(sizes) * concurrency
    return max(read_s, flops / (workload.gpu.bf16_flops * workload.mfu * num_gpus))


def _prefill_s(sizes: ModelSizes, workload: Workload, num_prompts: float, num_gpus: int) -> float:
    num_tokens = num_prompts * workload.prompt_tokens
    flops = 2 * active_parameters(sizes) * num_tokens
    return flops / (workload.gpu.bf16_flops * workload.mfu * num_gpus)


def main_rank_generation(config: Config, sizes: ModelSizes, workload: Workload) -> Generation:
    """The transformers engine of the main rank: batch after batch, each as long as its longest
    response, for which the limit is taken."""
    data, rollout = config.data, config.rollout
    prompts_at_once = min(max(1, rollout.max_num_seqs // rollout.n), data.train_batch_size)
    concurrency = prompts_at_once * rollout.n
    num_batches = math.ceil(data.train_batch_size / prompts_at_once)
    host_s = HOST_S_PER_LAYER * sizes.num_hidden_layers
    step_s = max(host_s, _decode_s(sizes, workload, element_bytes(config), concurrency, 1))
    seconds = num_batches * data.max_response_length * step_s
    seconds += _prefill_s(sizes, workload, data.train_batch_size, 1)
    return Generation(seconds, 1, 1, concurrency)


def separate_generation(
    config: Config, sizes: ModelSizes, workload: Workload, num_gpus: int
) -> Generation:
    """Engines with a paged KV cache and continuous batching on `num_gpus` GPUs of their own.

    An engine takes the fewest GPUs, a power of two, that leave half of their memory to the KV
    cache; sequences come and go, but the step is never shorter than the longest response alone.
    Raises ValueError when no number of these GPUs is enough.
    """
    data, element = config.data, element_bytes(config)
    weights = element * model_parameters(sizes)
    room = ENGINE_MEMORY_SHARE * workload.gpu.memory_bytes
    size = 1
    while 2 * weights > size * room:
        size *= 2
    if size > num_gpus:
        raise ValueError(
            f"--rollout-gpus {num_gpus}: an engine of this model needs {size} {workload.gpu.name}, "
            f"half of their memory for its weights; give a multiple of {size}"
        )
    num_engines = num_gpus // size
    per_token = kv_bytes_per_token(sizes, element)
    mean_length = workload.prompt_tokens + workload.response_tokens
    num_cached = int((size * room - weights) / (mean_length * per_token))
    total = data.train_batch_size * config.rollout.n
    share = math.ceil(total / num_engines)
    concurrency = max(1, min(config.rollout.max_num_seqs, num_cached, share))
    num_steps = share * workload.response_tokens / concurrency
    full_s = num_steps * _decode_s(sizes, workload, element, concurrency, size)
    alone_s = data.max_response_length * _decode_s(sizes, workload, element, 1, size)
    seconds = max(full_s, alone_s)
    seconds += _prefill_s(sizes, workload, data.train_batch_size / num_engines, size)
    return Generation(seconds, num_engines, size, concurrency)


def assumptions(config: Config, workload: Workload, is_separate: bool) -> list[str]:
    """Everything that the times rest on, in words."""
    gpu = workload.gpu
    lines = [
        f"mean prompt {workload.prompt_tokens:.0f} and mean response "
        f"{workload.response_tokens:.0f} tokens; memory is for full micro-batches",
        f"trainer at {workload.mfu:.0%} of {gpu.bf16_flops / 1e12:.0f} TFLOP/s (--mfu)",
        f"{BANDWIDTH_SHARE:.0%} of {gpu.memory_bandwidth / 1e12:.2f} TB/s memory, "
        f"{gpu.link_bandwidth / 1e9:.0f} GB/s between GPUs of a node, "
        f"{gpu.network_bandwidth / 1e9:.0f} GB/s per GPU between nodes",
        "communication does not overlap with compute",
        f"{USABLE_SHARE:.0%} of {gpu.memory_bytes / 2**30:.0f} GiB usable; attention keeps no "
        "scores (flash kernels; with cp > 1 Transformer Engine)",
    ]
    if config.actor.drop_mass > 0:
        lines.append(f"{KEPT_PAIRS:.0%} of (token, tile) pairs survive actor.drop_mass in the head")
    if is_separate:
        lines.append(
            "generation: engines with paged KV cache and continuous batching; no training while "
            f"they generate; {ENGINE_MEMORY_SHARE:.0%} of their memory for weights and cache"
        )
    else:
        lines.append(
            "generation: the transformers engine on the main rank, every batch until "
            f"data.max_response_length, at least {1e3 * HOST_S_PER_LAYER:.0f} ms a layer and token"
        )
    return lines
