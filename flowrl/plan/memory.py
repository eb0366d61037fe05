"""The memory of one GPU: what stays, and what a micro-batch or a generation adds for a while.

Weights and states are exact up to buckets and alignment. Activations and the head are estimates:
formulas of what the layers save, for as many tokens as `actor.ppo_max_token_len_per_gpu` admits,
with attention that keeps no scores.
"""

from dataclasses import dataclass, fields

from flowrl.plan.layout import PlannedLayout
from flowrl.plan.sizes import (
    ModelSizes,
    model_parameters,
    partition_parameters,
    stage_expert_parameters,
    stage_layers,
    stage_parameters,
    trunk_parameters,
    vocab_rows,
)
from flowrl.settings import Config

HEAD_TILE = 128  # entries under one log-sum-exp, as in flowrl.kernels.linear_logprob
HEAD_SLICE_BYTES = 128 * 2**20  # of d logits, in the head's backward
USABLE_SHARE = 0.92  # the rest: CUDA context, NCCL's buffers, fragments


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by purpose. KV cache and activations never exist together."""

    weights: float
    main_grads: float
    optimizer: float
    partition: float
    reference: float
    critic: float
    engine_weights: float
    activations: float
    head: float
    kv_cache: float

    @property
    def resident(self) -> float:
        """What is there all the time."""
        passing = self.activations + self.head + self.kv_cache
        return sum(getattr(self, field.name) for field in fields(self)) - passing

    @property
    def peak(self) -> float:
        """The larger of update and generation."""
        return self.resident + max(self.activations + self.head, self.kv_cache)


def element_bytes(config: Config) -> int:
    """Bytes of one weight or activation."""
    return {"bfloat16": 2, "float32": 4}[config.model.dtype]


def optimizer_bytes(
    config: Config, num_parameters: float, layout: PlannedLayout, num_of_experts: float = 0
) -> float:
    """AdamW's two float32 moments and, of bfloat16 weights, the float32 master.

    8 or 12 bytes a parameter; the distributed optimiser divides them by all ranks with the same
    shard, data- and context-parallel ones (ZeRO stage 1, arXiv 1910.02054, section 5.1).
    `num_of_experts` of the parameters are experts', whose copies are on every expert-th rank of
    the stage.
    """
    each = 8 if config.model.dtype == "float32" else 12
    total = (num_parameters - num_of_experts) / _optimizer_ranks(config, layout)
    is_spread = config.parallel.use_distributed_optimizer
    copies = layout.stage_gpus / layout.expert if is_spread else 1
    return each * (total + num_of_experts / copies)


def _optimizer_ranks(config: Config, layout: PlannedLayout) -> int:
    return layout.data * layout.context if config.parallel.use_distributed_optimizer else 1


def has_partition(config: Config) -> bool:
    """Whether Z is a network that is trained."""
    return config.algorithm.objective == "flow_balance" and config.flow.log_z == "network"


def own_master_bytes(config: Config, num_parameters: float, layout: PlannedLayout) -> float:
    """Float32 parameters of Z or of the value head: weights, gradients and two moments."""
    return 8 * num_parameters + 8 * num_parameters / _optimizer_ranks(config, layout)


def critic_bytes(
    config: Config, sizes: ModelSizes, layout: PlannedLayout, stage: int, is_megatron: bool
) -> float:
    """Weights, gradients and optimiser of PPO's critic; one process also has an output weight.

    It trains before the policy with the same activations and a smaller head, so these add nothing
    to the peak.
    """
    element, num = element_bytes(config), trunk_parameters(sizes, layout, stage)
    num_weights = num if is_megatron else stage_parameters(sizes, layout, stage)
    num_head = sizes.hidden_size + 1 if stage == layout.pipeline - 1 else 0
    num_of_experts = stage_expert_parameters(sizes, layout, stage)
    total = element * num_weights + 4 * num
    total += optimizer_bytes(config, num, layout, num_of_experts)
    return total + own_master_bytes(config, num_head, layout)


def layer_activation_bytes(
    sizes: ModelSizes, layout: PlannedLayout, num_tokens: int, element: int, layer: int = 0
) -> float:
    """What one layer saves for its backward, for a rank's tokens N, element size e and t ranks.

        N e (4 H / s + (3 Q + 3 K + 3 F) / t) + 4 N heads / t,   s = t with sequence parallelism

    arXiv 2205.05198, section 4 (Eq. 4 with sequence parallelism), counted anew for RMSNorm, SwiGLU,
    grouped keys of width K, queries of width Q and attention that saves its output and one
    log-sum-exp per head instead of scores. H: inputs of two norms and of the two projections behind
    them. Q, K: the projection's output, which the values keep alive, the rotated queries and keys,
    and the attention's output. F: both inputs of the gate and its output. Norm and gate are fused
    kernels, as on a GPU; without, they would save intermediate results too. With k experts a token,
    F is k times their width, and k H more are the copies of the input that they receive; that they
    are chosen equally often is assumed.
    """
    keys = max(sizes.key_width, layout.tensor * sizes.head_dim)  # at least a group on each rank
    shards = 3 * (sizes.query_width + keys + sizes.mlp_width(layer))
    if layer in sizes.expert_layers:
        shards += sizes.num_experts_per_tok * sizes.hidden_size
    stream = 4 * sizes.hidden_size / (layout.tensor if layout.sequence_parallel else 1)
    log_sums = 4 * sizes.num_attention_heads / layout.tensor
    return num_tokens * (element * (stream + shards / layout.tensor) + log_sums)


def chunks_in_flight(layout: PlannedLayout, stage: int, num_micro_batches: int) -> int:
    """Forward passes of model chunks whose backward is still to come, at the most.

    1F1B keeps p - r on stage r; with v chunks per stage, 2 (p - r - 1) + (v - 1) p + 1 (arXiv
    2104.04473, section 2.2; on the first stage p (1 + (p - 1) / (p v)) micro-batches, arXiv
    2205.05198, section 4.2.3).
    """
    stages, chunks = layout.pipeline, layout.virtual_pipeline
    if chunks == 1:
        return min(stages - stage, num_micro_batches)
    in_flight = 2 * (stages - stage - 1) + (chunks - 1) * stages + 1
    return min(in_flight, num_micro_batches * chunks)


def activation_bytes(
    sizes: ModelSizes,
    layout: PlannedLayout,
    stage: int,
    num_tokens: int,
    num_micro_batches: int,
    element: int,
) -> float:
    """Saved activations of a stage's micro-batches in flight, and one layer's working set.

    With recomputation each layer keeps its input alone, and one layer at a time all of its own.
    The working set of the backward is the gradient of the widest part, the gated MLP.
    """
    stream_ranks = layout.tensor if layout.sequence_parallel else 1
    stream = num_tokens * element * sizes.hidden_size
    layers = stage_layers(sizes, layout, stage)
    whole = [layer_activation_bytes(sizes, layout, num_tokens, element, x) for x in layers]
    kept = len(layers) * stream / stream_ranks if layout.recompute else sum(whole)
    total = chunks_in_flight(layout, stage, num_micro_batches) * kept / layout.virtual_pipeline
    if layout.recompute:
        total += max(whole)
    width = max(sizes.mlp_width(x) for x in layers)
    total += num_tokens * element * 3 * width / layout.tensor + 2 * stream
    if stage == layout.pipeline - 1:
        total += 2 * stream / stream_ranks  # the final norm's input and output
    return total


def head_bytes(sizes: ModelSizes, layout: PlannedLayout, num_rows: int, element: int) -> float:
    """What the head adds for R rows on t ranks; logits are never there.

    kept       e R H (rows)  +  4 R V / (128 t) (tile_lse)
    forward    4 R V / (128 t) (tile_mean, for the entropy)
    backward   4 R H (grad_hidden)  +  2 e R H  +  128 MiB (a slice)  +  e V H / t, if many
               ranks train (the zeros that autograd gets beside main_grad)

    With t > 1 a half of the rows is computed while the sum of the other half is under way. Beside
    grad_hidden there are then, in the place of 2 e R H, all in float32:

    no SP      8 R H (the other half's grad_hidden, and the sums)
    SP         8 R H (the other half's part to send, the rows in their places, the part of them to
               send)  +  4 R H / t (the sums)
    """
    rows = num_rows * sizes.hidden_size
    tiles = 4 * num_rows * -(-vocab_rows(sizes, layout.tensor) // HEAD_TILE)
    zeros = element * vocab_rows(sizes, layout.tensor) * sizes.hidden_size
    beside = 2 * element * rows if layout.tensor == 1 else 8 * rows
    if layout.sequence_parallel:
        beside += 4 * rows / layout.tensor
    backward = 4 * rows + beside + HEAD_SLICE_BYTES
    if layout.num_gpus > 1:
        backward += zeros
    return element * rows + tiles + max(tiles, backward)


def kept_softmax_bytes(
    config: Config, sizes: ModelSizes, layout: PlannedLayout, num_rows: float
) -> float:
    """What the head's forward keeps of R rows besides: e R V / t, or 0 beyond the budget for it."""
    num_columns = -(-vocab_rows(sizes, layout.tensor) // HEAD_TILE) * HEAD_TILE
    needed = element_bytes(config) * num_rows * num_columns
    is_kept = config.actor.drop_mass == 0 and needed <= config.actor.memory_budget
    return needed if is_kept else 0


def logits_bytes(sizes: ModelSizes, layout: PlannedLayout, num_rows: int) -> float:
    """What logits would cost at least: float32, once as values and once as gradients."""
    return 8 * num_rows * vocab_rows(sizes, layout.tensor)


def kv_bytes_per_token(sizes: ModelSizes, element: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * sizes.num_hidden_layers * sizes.key_width * element


def stage_memory(
    config: Config,
    sizes: ModelSizes,
    layout: PlannedLayout,
    stage: int,
    num_micro_batches: int,
    *,
    has_own_engine: bool,
    is_megatron: bool,
) -> Memory:
    """Memory of a stage's GPU; `has_own_engine`: the main rank, which also generates.

    Without Megatron the engine shares the policy's weights and has a KV cache only.
    """
    element = element_bytes(config)
    num_tokens = config.actor.ppo_max_token_len_per_gpu
    num = stage_parameters(sizes, layout, stage)
    is_last = stage == layout.pipeline - 1
    num_z = 0
    if is_last and has_partition(config):
        num_z = partition_parameters(sizes.hidden_size, config.flow.z_num_layers)
    has_critic = config.algorithm.objective == "ppo"
    # Under sequence and tensor parallelism every rank has all rows, of its part of the vocabulary.
    head = 0
    if is_last:
        head = head_bytes(sizes, layout, num_tokens, element)
        head += kept_softmax_bytes(config, sizes, layout, num_tokens)
    sequence = config.data.max_prompt_length + config.data.max_response_length
    num_sequences = min(
        config.rollout.max_num_seqs, config.data.train_batch_size * config.rollout.n
    )
    kv_cache = num_sequences * sequence * kv_bytes_per_token(sizes, element)
    return Memory(
        weights=element * num,
        main_grads=4 * num,
        optimizer=optimizer_bytes(
            config, num, layout, stage_expert_parameters(sizes, layout, stage)
        ),
        partition=own_master_bytes(config, num_z, layout),
        reference=element * num if config.needs_reference and not config.ref.offload else 0,
        critic=critic_bytes(config, sizes, layout, stage, is_megatron) if has_critic else 0,
        engine_weights=element * model_parameters(sizes) if has_own_engine and is_megatron else 0,
        activations=activation_bytes(sizes, layout, stage, num_tokens, num_micro_batches, element),
        head=head,
        kv_cache=kv_cache if has_own_engine else 0,
    )
