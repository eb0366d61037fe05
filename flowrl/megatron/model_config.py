"""Translates a transformers config into Megatron's, and refuses what would not be represented.

A setting that is neither translated nor refused would change the model without a word, so every
field of a supported config that alters the forward pass is looked at here.
"""

import importlib.util
import math

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flowrl.megatron.layout import Layout

MODEL_TYPES = ("llama", "qwen2", "qwen3")
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


def transformer_config(
    hf_config: PretrainedConfig,
    layout: Layout,
    dtype: torch.dtype,
    recompute: str | None = None,
) -> TransformerConfig:
    """Megatron's config of a Llama, Qwen2 or Qwen3 model on one layout.

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
        qk_layernorm=hf_config.model_type == "qwen3",
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
