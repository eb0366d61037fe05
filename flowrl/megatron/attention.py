"""Causal attention over packed sequences, with context parallelism by gathering keys and values.

Context parallelism deals the tokens of every sequence in zigzag: of 2 * cp equal chunks, rank r
holds chunks r and 2 * cp - 1 - r, one early and one late, so that causal work is balanced. Queries
stay where they are; keys and values are all-gathered, and their gradients are reduce-scattered.
"""

import importlib.util

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

HAS_FLASH_ATTENTION = importlib.util.find_spec("flash_attn") is not None


class PackedAttention(MegatronModule):
    """Megatron's core attention for packed sequences, without Transformer Engine."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None,
        softmax_scale: float | None,
        pg_collection: ProcessGroupCollection,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.kv_channels is not None
        self.context_group = pg_collection.cp
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None,
        packed_seq_params: PackedSeqParams,
    ) -> Tensor:
        """Rotated query [t, heads, d], key and value [t, groups, d] -> [t, heads * d].

        t counts this context-parallel rank's tokens; `cu_seqlens_q_padded` counts all ranks'.
        """
        assert attention_mask is None and attention_bias is None
        cu_seqlens, longest = packed_seq_params.cu_seqlens_q_padded, packed_seq_params.max_seqlen_q
        assert cu_seqlens is not None and longest is not None
        cp = self.context_group.size()
        is_half = query.dtype in (torch.bfloat16, torch.float16)
        if HAS_FLASH_ATTENTION and query.is_cuda and is_half and cp == 1:
            return _flash(query, key, value, cu_seqlens, longest, self.scale).flatten(1)
        if cp > 1:
            both = gather_from_sequence_parallel_region(
                torch.cat([key, value], -1), group=self.context_group
            )
            key, value = both[zigzag_rows(cu_seqlens, cp)].chunk(2, -1)
        return _chunked(
            query, key, value, cu_seqlens.tolist(), self.context_group.rank(), cp, self.scale
        ).flatten(1)


def zigzag_rows(cu_seqlens: Tensor, cp: int) -> Tensor:
    """Where each token stands after an all-gather of the zigzag shards, [N] int64.

    cu_seqlens: [B + 1], every length a multiple of 2 * cp. Chunk k of a sequence lies on rank
    min(k, 2 cp - 1 - k), in the first half of its share for k < cp and in the second otherwise.
    """
    cu_seqlens = cu_seqlens.long()
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    num_tokens = int(cu_seqlens[-1])
    sequence = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    position = torch.arange(num_tokens, device=lengths.device) - starts[sequence]
    size = (lengths // (2 * cp))[sequence]
    chunk = position // size
    is_late = chunk >= cp
    rank = torch.where(is_late, 2 * cp - 1 - chunk, chunk)
    offset = position - chunk * size + torch.where(is_late, size, 0)
    return rank * (num_tokens // cp) + starts[sequence] // cp + offset


def _chunked(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], rank: int, cp: int, scale: float
) -> Tensor:
    """Each chunk of queries against the keys up to its end: [t, heads, d].

    Keys and values are those of the whole sequences, in order.
    """
    outputs = []
    for start, end in zip(borders, borders[1:], strict=False):
        if cp == 1:
            chunks = [(start, start, end)]
        else:
            size = (end - start) // (2 * cp)
            early, late = start + rank * size, start + (2 * cp - 1 - rank) * size
            local = start // cp
            chunks = [(local, early, early + size), (local + size, late, late + size)]
        for first_row, first, last in chunks:
            outputs.append(
                _causal(
                    query[first_row : first_row + last - first],
                    key[start:last],
                    value[start:last],
                    scale,
                )
            )
    return torch.cat(outputs)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The last len(query) of len(key) positions attend to what lies before them."""
    num_queries, num_keys = len(query), len(key)
    mask = None
    if num_queries != num_keys:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )[0].transpose(0, 1)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
    )
