"""Megatron's GPT model with the head cut off: the last stage hands its states to a function.

On a CPU, and on a GPU without Transformer Engine, the layers are Megatron's local ones with our
attention and torch's RMSNorm. With Transformer Engine its layers are used; no machine of the
project's tests has it.
"""

from collections.abc import Callable

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from transformers import PretrainedConfig

from flowrl.megatron.attention import PackedAttention
from flowrl.megatron.experts import local_moe_spec, mark_experts
from flowrl.megatron.layout import Layout
from flowrl.megatron.model_config import (
    HAS_TRANSFORMER_ENGINE,
    expert_layers,
    padded_vocab_size,
    rope_frequencies,
    transformer_config,
)
from flowrl.partition import PartitionNetwork


class RMSNorm(torch.nn.RMSNorm):
    """torch's, with the mark by which Megatron sums its gradient under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        super().__init__(hidden_size, eps=eps, device=device, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore


def _layer_spec(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    if HAS_TRANSFORMER_ENGINE:
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if has_experts else None,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
    qk_norm = RMSNorm if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,  # pyright: ignore[reportArgumentType]
            linear_proj=RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    mlp = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
            pre_mlp_layernorm=RMSNorm,
            mlp=local_moe_spec() if has_experts else mlp,
            mlp_bda=get_bias_dropout_add,  # pyright: ignore[reportArgumentType]
        ),
    )


def _block_spec(
    hf_config: PretrainedConfig, config: TransformerConfig, chunk: int | None
) -> TransformerBlockSubmodules:
    norm = RMSNorm
    if HAS_TRANSFORMER_ENGINE:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    first = get_transformer_layer_offset(config, chunk)
    layers = expert_layers(hf_config)[first : first + get_num_layers_to_build(config, chunk)]
    return TransformerBlockSubmodules(
        layer_specs=[_layer_spec(config, has_experts) for has_experts in layers],
        layer_norm=norm,  # pyright: ignore[reportArgumentType]
    )


def _mark_shards(model: torch.nn.Module) -> None:
    """Say which weights are shards and no copies; before 0.18 Megatron does so only if it inits.

    Without the mark the gradient norm leaves out the shards of all tensor-parallel ranks but one.
    """
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        if type(module) not in dims or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):  # to set it twice is an error
            set_tensor_model_parallel_attributes(module.weight, True, dims[type(module)], 1)


class FlowModel(GPTModel):
    """One model chunk. The last one holds the output weight and may hold Z, but makes no logits.

    There, `postprocess(model, hidden)` turns the post-norm states [s, 1, H], of which each
    tensor-parallel rank has its part under sequence parallelism, into what the pipeline schedule
    calls the model's output; without one the states are the output. A critic's last chunk holds a
    value head and no output weight.
    """

    def __init__(
        self,
        hf_config: PretrainedConfig,
        config: TransformerConfig,
        layout: Layout,
        chunk: int,
        partition: PartitionNetwork | None,
        value_head: torch.nn.Linear | None,
    ):
        vp_stage = chunk if layout.virtual_pipeline > 1 else None
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        super().__init__(
            config=config,
            transformer_layer_spec=_block_spec(hf_config, config, vp_stage),  # pyright: ignore
            vocab_size=padded_vocab_size(hf_config, layout),
            max_sequence_length=hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(
                ignore_virtual=False, vp_stage=vp_stage
            ),
            post_process=is_last,
            share_embeddings_and_output_weights=(
                hf_config.tie_word_embeddings and value_head is None
            ),
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        _mark_shards(self)
        mark_experts(self)
        self.hf_config = hf_config
        self.rotary_pos_emb.inv_freq = rope_frequencies(hf_config)[0]
        self.partition = partition if is_last else None
        self.postprocess: Callable[[FlowModel, Tensor], object] | None = None
        num_rows = padded_vocab_size(hf_config, layout) // layout.tensor
        self.vocab_start = num_rows * parallel_state.get_tensor_model_parallel_rank()
        self.num_vocab_rows = min(num_rows, hf_config.vocab_size - self.vocab_start)
        self.value_head = value_head if is_last else None
        if self.value_head is not None:
            # Its gradient is then a sum over the rows of each tensor-parallel rank.
            for parameter in self.value_head.parameters():
                parameter.sequence_parallel = config.sequence_parallel  # pyright: ignore
            del self.output_layer
        elif is_last:
            # The head runs as the output layer's forward pass, because a module's call is what
            # makes DDP wait for its weight when it gathers parameters during the forward pass.
            self.output_layer.forward = self._head  # pyright: ignore

    def output_weight(self) -> torch.nn.Parameter:
        """This rank's rows of the output weight, tied or not: [padded V / tp, H].

        Only the first `num_vocab_rows`, for tokens from `vocab_start`, are of the vocabulary.
        """
        weight = self.output_layer.weight
        if weight is None:
            weight = self.shared_embedding_or_output_weight()
        assert isinstance(weight, torch.nn.Parameter)
        return weight

    def _head(self, hidden: Tensor) -> object:
        return hidden if self.postprocess is None else self.postprocess(self, hidden)

    def _postprocess(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        """What GPTModel.forward ends with."""
        if not self.post_process:
            return hidden_states
        if self.value_head is not None:
            return self._head(hidden_states)
        return self.output_layer(hidden_states)


def build_chunks(
    hf_config: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    *,
    partition: PartitionNetwork | None = None,
    value_head: torch.nn.Linear | None = None,
    recompute: str | None = None,
) -> list[FlowModel]:
    """This rank's model chunks, one per virtual pipeline stage, with weights yet to be loaded.

    `partition` (Z, the same on all ranks) goes to the chunk that computes the loss and stays
    float32, as does a critic's `value_head` (H to 1), with which there is no output weight. Raises
    ValueError for a model that Megatron's layers do not represent.
    """
    config = transformer_config(hf_config, layout, dtype, recompute)
    chunks = [
        FlowModel(hf_config, config, layout, chunk, partition, value_head)
        for chunk in range(layout.virtual_pipeline)
    ]
    if torch.cuda.is_available():
        for chunk in chunks:
            chunk.cuda(torch.cuda.current_device())
    return chunks


WrappedChunks = list[DistributedDataParallel]


def wrap(
    chunks: list[FlowModel],
    *,
    distributed_optimizer: bool = False,
    overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False,
    bucket_size: int | None = None,
) -> WrappedChunks:
    """Wrap chunks for training: float32 `main_grad` buffers, summed over data and context ranks.

    Gradients are summed and not averaged, since the config says calculate_per_token_loss: the
    schedule divides them once, by the global count that the loss function reports. `bucket_size`
    is the number of elements whose communication overlaps as one, by default Megatron's.
    """
    ddp_config = DistributedDataParallelConfig(
        # float64, for exact comparisons, keeps its own dtype.
        grad_reduce_in_fp32=chunks[0].config.params_dtype != torch.float64,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather,
        bucket_size=bucket_size,
    )
    return [
        DistributedDataParallel(
            chunk.config,
            ddp_config,
            chunk,
            disable_bucketing=index > 0,  # only the first chunk's reduction is left to overlap
        )
        for index, chunk in enumerate(chunks)
    ]
