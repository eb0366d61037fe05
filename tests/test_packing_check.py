"""Models whose packed log-probs would not be their own are refused before training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_model import CONFIGS, random_model
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flowrl.policy.attention import NAME as PACKED_ATTENTION
from flowrl.policy.packing_check import check_packing
from flowrl.policy.pretrained import load_model

SIZES: Any = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LINEAR: Any = {"layer_types": ["linear_attention", "full_attention"], "head_dim": 16}
DELTA: Any = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
MIXING: dict[str, PreTrainedConfig] = {
    "convolution": transformers.Lfm2Config(
        **SIZES, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "delta net": transformers.Qwen3_5TextConfig(
        **SIZES, **LINEAR, **DELTA, linear_key_head_dim=8, linear_value_head_dim=8
    ),
    "lightning attention": transformers.MiniMaxConfig(**SIZES, **LINEAR, num_local_experts=2),
    "attention of its own": transformers.BloomConfig(
        vocab_size=64, hidden_size=32, n_layer=2, n_head=2
    ),
}


def made(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=PACKED_ATTENTION
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", CONFIGS)
def test_models_that_mix_tokens_by_attention_pass(kind: str, dtype: torch.dtype) -> None:
    model = random_model(kind, dtype=dtype).eval()
    check_packing(model, longest=10_000)
    assert model.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", MIXING)
def test_models_that_carry_state_over_the_borders_are_refused(
    kind: str, dtype: torch.dtype
) -> None:
    with pytest.raises(
        ValueError, match=r"ForCausalLM lets packed sequences into one another.*nats"
    ):
        check_packing(made(MIXING[kind], dtype), longest=8)


def test_logits_that_are_not_the_heads_are_refused() -> None:
    model = random_model().eval()
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    head.register_forward_hook(lambda module, inputs, logits: logits * torch.tensor(1.2))
    with pytest.raises(ValueError, match=r"by its own forward than by its trunk.*nats"):
        check_packing(model, longest=8)


def test_a_window_must_hold_the_longest_sequence() -> None:
    config = transformers.MistralConfig(**SIZES, sliding_window=40)
    model = made(config, torch.float32)
    check_packing(model, longest=40)
    with pytest.raises(ValueError, match=r"the last 40 tokens.*max_response_length = 41"):
        check_packing(model, longest=41)
    # A window that no layer uses.
    check_packing(made(transformers.Qwen2Config(**SIZES, sliding_window=40), torch.float32), 41)


def test_an_architecture_without_attention_functions_is_refused_by_path(tmp_path: Path) -> None:
    config = transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=2, rotary_dim=8)
    transformers.GPTJForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path}: its attention layers take no other"):
        load_model(str(tmp_path), torch.float32, torch.device("cpu"))
