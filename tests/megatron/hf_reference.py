"""Random transformers models to compare with, and the packed shards that Megatron is given."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from flowrl.megatron.layout import Layout

CONFIGS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "qwen3_moe_apart": Qwen3MoeConfig,  # a token's number chooses its experts, see choose_by_token
    "qwen3_moe_late": Qwen3MoeConfig,  # no experts in the first half
    "qwen3_moe_raw": Qwen3MoeConfig,  # the weights of the chosen experts do not sum to 1
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
DENSE_LAYERS = {
    "qwen3_moe": [1],
    "qwen3_moe_apart": [1],
    "qwen3_moe_late": [0, 1],
    "qwen3_moe_raw": [],
}


def hf_config(kind: str, *, tied: bool = False, **settings: object) -> PretrainedConfig:
    """Four layers of width 16; 19 tokens, so that 2 and 4 shards of the vocabulary are padded."""
    sizes = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    experts = {}
    if kind in DENSE_LAYERS:
        experts = EXPERTS | {"mlp_only_layers": DENSE_LAYERS[kind]}
        experts["norm_topk_prob"] = kind != "qwen3_moe_raw"
        experts["chooses_by_token"] = kind == "qwen3_moe_apart"
        if kind == "qwen3_moe_apart":  # grouped_mm wants rows of 16 bytes in bfloat16, so 8 numbers
            experts["moe_intermediate_size"] = 16
    return CONFIGS[kind](**{**sizes, **experts, **settings}, tie_word_embeddings=tied)


class ExactRouter(nn.Module):
    """The router of transformers in the dtype of its input; theirs has a float32 softmax."""

    def __init__(self, weight: nn.Parameter, config: PretrainedConfig):
        super().__init__()
        self.weight, self.config = weight, config

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden.flatten(0, -2), self.weight)
        values, indices = logits.softmax(-1).topk(self.config.num_experts_per_tok)
        if self.config.norm_topk_prob:
            values = values / values.sum(-1, keepdim=True)
        return logits, values, indices


def hf_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of random weights, norms and biases too; in any dtype those of bfloat16 precision.

    So models of several dtypes hold equal weights. In float64 the norms are torch's and the routers
    are ours, because those of transformers compute in float32 whatever they are given.
    """
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if dtype == torch.float64:
        if config.model_type == "qwen3_moe":
            model.set_experts_implementation("eager")  # the others have no float64
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    eps = config.rms_norm_eps
                    setattr(parent, name, nn.RMSNorm(child.weight.shape, eps, dtype=dtype))
                elif type(child).__name__ == "Qwen3MoeTopKRouter":
                    setattr(parent, name, ExactRouter(child.weight, config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            value = 0.4 * noise if parameter.ndim > 1 else 1 + 0.2 * noise
            parameter.copy_(value.bfloat16())
        if config.model_type == "qwen3_moe" and config.chooses_by_token:
            choose_by_token(model)
    return model.eval()


def choose_by_token(model: PreTrainedModel) -> None:
    """Keep a router's logits far from where rounding would choose another expert.

    Each of the first states is an expert's logit, nearly alone: +-4 by the token's number in the
    embedding, and no layer adds to it.
    """
    num_experts, num_chosen = EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]
    choices = torch.tensor([*combinations(range(num_experts), num_chosen)])
    embedding = model.get_input_embeddings().weight
    embedding[:, :num_experts] = -4
    embedding.scatter_(1, choices[torch.arange(len(embedding)) % len(choices)], 4)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter[:num_experts] = 0
        elif "down_proj" in name:  # [H, F], or [E, H, F] of experts
            parameter[..., :num_experts, :] = 0
        elif name.endswith("gate.weight"):
            parameter.mul_(0.125)
            parameter[:, :num_experts] = 2 * torch.eye(num_experts)


def hf_hidden(model: PreTrainedModel, sequences: Sequence[Tensor]) -> Tensor:
    """Post-norm states [N, H] of sequences one by one."""
    return torch.cat(
        [model.base_model(s[None], use_cache=False).last_hidden_state[0] for s in sequences]
    )


def shard(
    sequences: Sequence[Tensor], layout: Layout, context_rank: int
) -> tuple[Tensor, Tensor, PackedSeqParams, Tensor]:
    """One context-parallel rank's ids [1, t], positions [1, t], borders, and rows [t].

    `rows` says which of the N tokens of the sequences, end to end, stands there; -1 is padding.
    """
    multiple, chunks = layout.sequence_multiple, 2 * layout.context
    ids, positions, rows, borders = [], [], [], [0]
    start = 0
    for sequence in sequences:
        length = -(-len(sequence) // multiple) * multiple
        place = torch.arange(length)
        is_real = place < len(sequence)
        if layout.context > 1:
            parts = place.chunk(chunks)
            own = torch.cat([parts[context_rank], parts[chunks - 1 - context_rank]])
        else:
            own = place
        padded = torch.cat([sequence, sequence.new_zeros(length - len(sequence))])
        ids.append(padded[own])
        positions.append(own)
        rows.append(torch.where(is_real, start + place, -1)[own])
        borders.append(borders[-1] + length)
        start += len(sequence)
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    longest = int(cu_seqlens.diff().max())
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    return torch.cat(ids)[None], torch.cat(positions)[None], params, torch.cat(rows)
