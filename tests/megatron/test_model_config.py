"""Settings that reach Megatron's config, and settings that are refused by name."""

from typing import Any

import pytest
import torch
from hf_reference import hf_config
from transformers import GPT2Config, PretrainedConfig, Qwen2Config, Qwen2MoeConfig

from flowrl.megatron.layout import Layout
from flowrl.megatron.model_config import (
    expert_layers,
    head_dim,
    padded_vocab_size,
    rope_frequencies,
    transformer_config,
)

SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


def test_fields_are_translated() -> None:
    source = hf_config("qwen3", head_dim=12, rms_norm_eps=3e-5)
    layout = Layout(tensor=2, pipeline=2, virtual_pipeline=2, context=2, sequence_parallel=True)
    config = transformer_config(source, layout, torch.bfloat16, "full")
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (4, 16, 24)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 12)
    assert (config.layernorm_epsilon, config.normalization) == (3e-5, "RMSNorm")
    assert (config.params_dtype, config.pipeline_dtype) == (torch.bfloat16, torch.bfloat16)
    assert (config.bf16, config.fp16) == (True, False)
    assert (config.hidden_dropout, config.attention_dropout) == (0.0, 0.0)
    assert (config.recompute_granularity, config.recompute_num_layers) == ("full", 1)
    assert config.virtual_pipeline_model_parallel_size == 2 and config.sequence_parallel
    assert config.calculate_per_token_loss and config.variable_seq_lengths


@pytest.mark.parametrize(
    ("kind", "bias", "norm"),
    [("llama", False, False), ("qwen2", True, False), ("qwen3", False, True)],
)
def test_families_differ(kind: str, bias: bool, norm: bool) -> None:
    config = transformer_config(hf_config(kind), Layout(), torch.float32)
    assert (config.add_qkv_bias, config.qk_layernorm) == (bias, norm)
    assert not config.add_bias_linear


def test_vocabulary_is_padded_to_equal_shards() -> None:
    sizes = [padded_vocab_size(hf_config("llama"), Layout(tensor=n)) for n in (1, 2, 3, 4)]
    assert sizes == [19, 20, 21, 20]


def test_head_dim_follows_from_the_width() -> None:
    assert head_dim(hf_config("llama", head_dim=None)) == 4
    without = Qwen2Config(hidden_size=12, num_attention_heads=2)
    assert not hasattr(without, "head_dim") and head_dim(without) == 6


def test_yarn_factor_reaches_megatron() -> None:
    """0.1 log(factor) + 1, arXiv 2309.00071 equation 22, unless the config sets its own."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    source = hf_config("llama", rope_parameters={"rope_theta": 1e4, **rope})
    assert rope_frequencies(source)[1] == pytest.approx(1.1386294361)
    config = transformer_config(source, Layout(), torch.float32)
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as yarn

    factor = yarn._yarn_get_concentration_factor_from_config(config)
    assert factor == pytest.approx(1.1386294361, abs=1e-10)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = "),
        ({"rope_parameters": DYNAMIC_ROPE}, "rope_type = 'dynamic'"),
        ({"rope_parameters": PARTIAL_ROPE}, "partial_rotary_factor = 0.5"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_unrepresented_setting_is_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=f"llama with {text}.*torch policy"):
        transformer_config(hf_config("llama", **settings), Layout(), torch.float32)


def test_sliding_window_is_refused() -> None:
    config = hf_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    with pytest.raises(ValueError, match="qwen2 with layer_types = 'sliding_attention'"):
        transformer_config(config, Layout(), torch.float32)


@pytest.mark.parametrize("config", [GPT2Config(), Qwen2MoeConfig()], ids=["gpt2", "qwen2-moe"])
def test_unknown_model_is_refused(config: PretrainedConfig) -> None:
    with pytest.raises(ValueError, match=f"model_type = {config.model_type}: .*torch policy"):
        transformer_config(config, Layout(), torch.float32)


@pytest.mark.parametrize(
    ("settings", "layout", "text"),
    [
        ({"num_attention_heads": 2}, Layout(tensor=4), "num_attention_heads = 2"),
        ({"hidden_size": 24, **SIX_HEADS}, Layout(tensor=2), "num_key_value_heads = 3"),
        ({"intermediate_size": 25}, Layout(tensor=2), "intermediate_size = 25"),
        ({"num_hidden_layers": 3}, Layout(pipeline=2), "num_hidden_layers = 3"),
        ({"vocab_size": 5}, Layout(tensor=4), "vocab_size = 5"),
    ],
    ids=lambda x: "" if isinstance(x, dict | Layout) else x,
)
def test_size_that_does_not_divide_is_refused(
    settings: dict[str, Any], layout: Layout, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        transformer_config(hf_config("llama", **settings), layout, torch.float32)


def test_other_dtypes_and_recomputation_are_refused() -> None:
    with pytest.raises(ValueError, match="float16"):
        transformer_config(hf_config("llama"), Layout(), torch.float16)
    with pytest.raises(ValueError, match="recompute = 'some'"):
        transformer_config(hf_config("llama"), Layout(), torch.float32, "some")


def test_experts_are_translated() -> None:
    source = hf_config("qwen3_moe", mlp_only_layers=[2], decoder_sparse_step=1)
    config = transformer_config(source, Layout(expert=2), torch.bfloat16)
    assert (config.num_moe_experts, config.moe_router_topk) == (4, 2)
    assert (config.ffn_hidden_size, config.moe_ffn_hidden_size) == (24, 12)
    assert config.moe_layer_freq == [1, 1, 0, 1]
    assert (config.expert_model_parallel_size, config.expert_tensor_parallel_size) == (2, 1)
    # As in transformers: logits in the model's dtype, no token dropped, no loss of the router's.
    assert (config.moe_router_dtype, config.moe_expert_capacity_factor) == (None, None)
    assert (config.moe_router_load_balancing_type, config.moe_aux_loss_coeff) == ("none", 0.0)
    assert config.moe_z_loss_coeff is None and not config.moe_router_pre_softmax
    assert config.qk_layernorm
    whole = hf_config("qwen3_moe", norm_topk_prob=False)
    assert transformer_config(whole, Layout(), torch.float32).moe_router_pre_softmax


def test_every_nth_layer_may_have_experts() -> None:
    source = hf_config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    assert expert_layers(source) == [False, True, False, False]
    assert expert_layers(hf_config("qwen3")) == [False] * 4


@pytest.mark.parametrize(
    ("settings", "layout", "text"),
    [
        ({}, Layout(expert=3), "num_experts = 4 does not divide over expert = 3"),
        ({}, Layout(tensor=2), "tensor = 2 ranks without sequence parallelism"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, Layout(), "has no layer with experts"),
        ({"num_experts": 0}, Layout(), "num_experts = 0"),
        ({"output_router_logits": True}, Layout(), "output_router_logits = True"),
        ({"num_experts_per_tok": 1}, Layout(), "num_experts_per_tok = 1"),
        (
            {"use_sliding_window": True, "sliding_window": 8},
            Layout(),
            "sliding_window = 8 is not represented",
        ),
    ],
    ids=lambda x: "" if isinstance(x, dict | Layout) else x,
)
def test_experts_that_are_not_represented_are_refused(
    settings: dict[str, Any], layout: Layout, text: str
) -> None:
    with pytest.raises(ValueError, match=f"qwen3_moe .*{text}"):
        transformer_config(hf_config("qwen3_moe", **settings), layout, torch.float32)


def test_dense_model_has_no_experts_to_share() -> None:
    with pytest.raises(ValueError, match="expert = 2: this llama has no experts"):
        transformer_config(hf_config("llama"), Layout(expert=2), torch.float32)
