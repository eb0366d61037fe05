"""Causal attention over packed sequences, registered with transformers as `flowrl_packed`.

Everything outside attention runs on the U rows of the trunk, so neither padding nor repeated
prompts cost anything there. Inside, every sequence reads its rows, shared prompt included, and
sequences of similar length are padded to a common length: pads sit to the right of every real
token, so the causal mask alone hides them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from flowrl.batch import PackedBatch

NAME = "flowrl_packed"


@dataclass(frozen=True)
class Bucket:
    """Sequences padded to one length L."""

    rows: Tensor  # [b, L] int64, the trunk row of every token; pads point at row 0
    writes: Tensor  # [b, L] bool, the one token of each row whose output is kept


def plan_buckets(batch: PackedBatch) -> list[Bucket]:
    """Group sequences whose lengths share a power of two, so padding at most doubles the work."""
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths.tolist()):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    buckets = []
    for _, members in sorted(groups.items()):
        chosen = torch.tensor(members, device=starts.device)
        offset = torch.arange(int(lengths[chosen].max()), device=starts.device)
        is_real = offset < lengths[chosen, None]
        token = torch.where(is_real, starts[chosen, None] + offset, 0)
        rows = torch.where(is_real, batch.trunk_rows[token], 0)
        buckets.append(Bucket(rows, is_real & batch.owns_row[token]))
    return buckets


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    buckets: list[Bucket],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,  # transformers hands every model's keywords to every attention function
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, heads, U, d] -> output [1, U, heads, d]."""
    num_rows = query.shape[2]
    if sliding_window is not None and any(b.rows.shape[1] > sliding_window for b in buckets):
        raise ValueError(f"packed attention has no sliding window (model asks {sliding_window})")
    states = [x[0].transpose(0, 1) for x in (query, key, value)]  # [U, heads, d]
    output = torch.zeros(
        (num_rows, *states[0].shape[1:-1], states[2].shape[-1]),
        dtype=query.dtype,
        device=query.device,
    )
    for bucket in buckets:
        q, k, v = (x[bucket.rows].transpose(1, 2) for x in states)  # [b, heads, L, d]
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        writes = bucket.writes
        output = output.index_put((bucket.rows[writes],), context.transpose(1, 2)[writes])
    return output[None], None


AttentionInterface.register(NAME, packed_attention)
