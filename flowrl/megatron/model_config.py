"""Translates a transformers config into Megatron's, and refuses what would not be represented.

A setting that is neither translated nor refused would change the model without a word, so every
field of a supported config that alters the forward pass is looked at here.
"""

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flowrl.megatron.layout import Layout

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies are constant
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
RECOMPUTE = {
    None: {},
    "selective": {"recompute_granularity": "selective"},  # the attention's inside
    "full": {  # every layer, keeping its input alone
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
# Fields with the only value that is represented. A config without the field is fine.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,  # it would put a bias on the output projection too
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}
HAS_TRANSFORMER_ENGINE = (
    torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
)


def head_dim(hf_config: PretrainedConfig) -> int:
    """Width of one attention head."""
    if hasattr(hf_config, "head_dim") and hf_config.head_dim is not None:
        return hf_config.head_dim
    return hf_config.hidden_size // hf_config.num_attention_heads


def expert_layers(hf_config: PretrainedConfig) -> list[bool]:
    """For each layer whether a mixture of experts takes the place of the MLP."""
    if hf_config.model_type != "qwen3_moe":
        return [False] * hf_config.num_hidden_layers
    return [
        layer not in hf_config.mlp_only_layers
        and hf_config.num_experts > 0
        and (layer + 1) % hf_config.decoder_sparse_step == 0
        for layer in range(hf_config.num_hidden_layers)
    ]


def padded_vocab_size(hf_config: PretrainedConfig, layout: Layout) -> int:
    """Rows of the embedding over all tensor-parallel ranks: equal shards, the last one padded."""
    return -(-hf_config.vocab_size // layout.tensor) * layout.tensor


def rope_frequencies(hf_config: PretrainedConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32 and the factor on cosine and sine (yarn's).

    Non-default types come from transformers' own functions, so both libraries rotate alike.
    """
    parameters = hf_config.rope_parameters
    if parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](hf_config, torch.device("cpu"))
    dim = head_dim(hf_config)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / parameters["rope_theta"] ** exponents, 1.0


def _refuse_unrepresented(hf_config: PretrainedConfig, layout: Layout) -> None:
    model_type = hf_config.model_type
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"model_type = {model_type}: the Megatron policy knows {', '.join(MODEL_TYPES)}; "
            "train this model with the torch policy"
        )
    found = {name: hf_config.to_dict().get(name, value) for name, value in REQUIRED.items()}
    wrong = {name: value for name, value in found.items() if value != REQUIRED[name]}
    if "sliding_attention" in (hf_config.to_dict().get("layer_types") or ()):
        wrong["layer_types"] = "sliding_attention"
    if hf_config.rope_parameters["rope_type"] not in ROPE_TYPES:
        wrong["rope_type"] = hf_config.rope_parameters["rope_type"]
    if hf_config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        wrong["partial_rotary_factor"] = hf_config.rope_parameters["partial_rotary_factor"]
    for name, value in wrong.items():
        raise ValueError(
            f"{model_type} with {name} = {value!r} is not represented in the Megatron policy; "
            "train this model with the torch policy"
        )
    _refuse_experts(hf_config, layout)
    num_chunks = layout.pipeline * layout.virtual_pipeline
    for name, parts, axis in (
        ("num_attention_heads", layout.tensor, "tensor"),
        ("intermediate_size", layout.tensor, "tensor"),
        ("num_hidden_layers", num_chunks, "pipeline * virtual_pipeline"),
    ):
        if getattr(hf_config, name) % parts:
            raise ValueError(
                f"{model_type} with {name} = {getattr(hf_config, name)} does not divide over "
                f"{axis} = {parts}: choose a divisor"
            )
    groups = hf_config.num_key_value_heads
    if groups % layout.tensor and layout.tensor % groups:
        raise ValueError(
            f"{model_type} with num_key_value_heads = {groups} does not divide over tensor = "
            f"{layout.tensor}: choose a divisor or a multiple"
        )
    last_start = padded_vocab_size(hf_config, layout) // layout.tensor * (layout.tensor - 1)
    if last_start >= hf_config.vocab_size:
        raise ValueError(
            f"{model_type} with vocab_size = {hf_config.vocab_size} leaves the last of tensor = "
            f"{layout.tensor} ranks without a row: choose a smaller tensor"
        )


def _refuse_experts(hf_config: PretrainedConfig, layout: Layout) -> None:
    """Raise for a mixture of experts, or the lack of one, that does not go with the layout."""
    model_type, has_experts = hf_config.model_type, any(expert_layers(hf_config))
    if layout.expert > 1 and not has_experts:
        raise ValueError(
            f"expert = {layout.expert}: this {model_type} has no experts to share; set expert = 1"
        )
    if model_type != "qwen3_moe":
        return
    if not has_experts:
        raise ValueError(
            f"{model_type} with num_experts = {hf_config.num_experts}, decoder_sparse_step = "
            f"{hf_config.decoder_sparse_step} and mlp_only_layers = {hf_config.mlp_only_layers} "
            "has no layer with experts; save it as the dense qwen3 that it is"
        )
    if hf_config.sliding_window is not None:
        raise ValueError(
            f"{model_type} with sliding_window = {hf_config.sliding_window} is not represented in "
            "the Megatron policy; set use_sliding_window = false, or train it with the torch policy"
        )
    if hf_config.output_router_logits:
        raise ValueError(
            f"{model_type} with output_router_logits = True asks for a load-balancing loss, which "
            "no policy here adds; set it to false"
        )
    if hf_config.num_experts_per_tok == 1 and hf_config.norm_topk_prob:
        raise ValueError(
            f"{model_type} with num_experts_per_tok = 1 and norm_topk_prob = True weighs every "
            "expert with 1, so its router would learn nothing; set norm_topk_prob = false"
        )
    if hf_config.num_experts % layout.expert:
        raise ValueError(
            f"{model_type} with num_experts = {hf_config.num_experts} does not divide over expert "
            f"= {layout.expert}: choose a divisor"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise ValueError(
            f"{model_type} on tensor = {layout.tensor} ranks without sequence parallelism would "
            "send every token to its experts once per rank; set sequence_parallel = True"
        )


def _expert_settings(hf_config: PretrainedConfig, layout: Layout) -> dict[str, Any]:
    """What Megatron is told of the experts.

    The router's logits have the model's dtype, its softmax is float32 and no token is dropped, as
    in transformers. There is no load-balancing loss. Experts are whole: the tensor-parallel ranks
    share them like other ranks, and tokens travel to them.
    """
    if hf_config.model_type != "qwen3_moe":
        return {}
    return {
        "num_moe_experts": hf_config.num_experts,
        "moe_layer_freq": [int(has_experts) for has_experts in expert_layers(hf_config)],
        "moe_ffn_hidden_size": hf_config.moe_intermediate_size,
        "moe_router_topk": hf_config.num_experts_per_tok,
        # A softmax over the chosen logits is one over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": HAS_TRANSFORMER_ENGINE,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": 1,
    }


def transformer_config(
    hf_config: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: str | None = None,
) -> TransformerConfig:
    """Megatron's config of a Llama, Qwen2, Qwen3 or Qwen3-MoE model on one layout.

    `recompute`: None, "selective" or "full". The head's dropout-free forward pass is what
    transformers computes. Raises ValueError for every setting that Megatron's layers would not
    represent, for sizes that do not divide over the layout, and for other dtypes than bfloat16,
    float32 and float64.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype = {dtype}: choose bfloat16, or float32; float16 overflows")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute = {recompute!r}: choose None, 'selective' or 'full'")
    _refuse_unrepresented(hf_config, layout)
    has_cuda, is_interleaved = torch.cuda.is_available(), layout.virtual_pipeline > 1
    rope_factor = rope_frequencies(hf_config)[1]
    config = TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.intermediate_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        qk_layernorm=hf_config.model_type in ("qwen3", "qwen3_moe"),
        add_bias_linear=False,
        add_qkv_bias=hf_config.model_type == "qwen2",
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every weight comes from outside
        use_cpu_initialization=not has_cuda,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if is_interleaved else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,  # gradients are summed, then divided by one global count
        variable_seq_lengths=True,  # packed micro-batches differ in length
        moe_token_dispatcher_type="alltoall",  # variable lengths demand it of dense models too
        # Interleaved, two pipeline ranks would else mix up what they send forward and backward.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=has_cuda and not is_interleaved,
        batch_p2p_sync=has_cuda,
        gradient_accumulation_fusion=False,  # needs apex
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # On a CPU these two would compile for 40 s.
        bias_dropout_fusion=has_cuda,
        bias_activation_fusion=has_cuda,
        # The fused rope has no factor.
        apply_rope_fusion=HAS_TRANSFORMER_ENGINE and rope_factor == 1.0,
        **_expert_settings(hf_config, layout),
        **RECOMPUTE[recompute],
    )
    if rope_factor != 1.0:
        # Megatron looks for these, and makes the factor 0.1 * yarn_mscale * log(scaling) + 1.
        vars(config).update(
            yarn_rotary_scaling_factor=math.e,
            yarn_mscale=10.0 * (rope_factor - 1.0),
            yarn_mscale_all_dim=0.0,
        )
    return config
