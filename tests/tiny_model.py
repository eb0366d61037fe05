"""Random language models and a tokenizer, small enough for every test."""

from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from flowrl.policy.attention import NAME as PACKED_ATTENTION

CONFIGS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def tiny_model(
    tied: bool = False, dtype: torch.dtype = torch.float32, hidden_size: int = 8
) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=hidden_size,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<unk>", "<s>", "</s>", *"0123456789", "+", "=", "?"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def random_model(
    kind: str = "llama",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    num_key_value_heads: int = 2,
    vocab_size: int = 16,
    attention: str = PACKED_ATTENTION,
    seed: int = 0,
) -> PreTrainedModel:
    """Two layers of width 16, four heads; every weight random, norms and biases too.

    The spread of the weights makes next-token distributions of a few nats, which differ visibly
    from position to position. In float64 the norms are torch's, because those of transformers
    compute in float32 whatever they are given.
    """
    config = CONFIGS[kind](
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=num_key_value_heads,
        head_dim=4,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if dtype == torch.float64:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    eps = config.rms_norm_eps
                    setattr(parent, name, nn.RMSNorm(child.weight.shape, eps, dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_matrix = parameter.ndim > 1
            parameter.copy_(0.4 * noise if is_matrix else 1 + 0.2 * noise)
    return model.eval()
