"""Causal attention over packed sequences, registered with transformers as `flowrl_packed`.

Everything outside attention runs on the U rows of the trunk, so neither padding nor repeated
prompts cost anything there. Inside, every sequence reads its rows, shared prompt included, and
sequences of similar length are padded to a common length: pads sit to the right of every real
token, so the causal mask alone hides them.
"""

import importlib.util
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from flowrl.batch import PackedBatch

NAME = "flowrl_packed"
HAS_FLASH_ATTENTION = importlib.util.find_spec("flash_attn") is not None


@dataclass(frozen=True)
class Bucket:
    """Sequences padded to one length L."""

    rows: Tensor  # [b, L] int64, the trunk row of every token; pads point at row 0
    writes: Tensor  # [b, L] bool, the one token of each row whose output is kept


@dataclass(frozen=True)
class AttentionPlan:
    """Which rows attend to which, worked out once for all layers."""

    batch: PackedBatch
    longest: int
    uses_flash: bool  # flash-attn takes the ragged batch as it is, in half precision on a GPU
    buckets: list[Bucket]  # empty with flash-attn


def plan_attention(batch: PackedBatch, dtype: torch.dtype) -> AttentionPlan:
    """Group sequences whose lengths share a power of two, so padding at most doubles the work."""
    starts, lengths = batch.cu_seqlens[:-1].long(), batch.cu_seqlens.diff().long()
    groups: dict[int, list[int]] = {}
    for i, length in enumerate(lengths.tolist()):
        groups.setdefault((length - 1).bit_length(), []).append(i)
    longest = int(lengths.max())
    if HAS_FLASH_ATTENTION and starts.is_cuda and dtype in (torch.bfloat16, torch.float16):
        return AttentionPlan(batch, longest, True, [])
    buckets = []
    for _, members in sorted(groups.items()):
        chosen = torch.tensor(members, device=starts.device)
        offset = torch.arange(int(lengths[chosen].max()), device=starts.device)
        is_real = offset < lengths[chosen, None]
        token = torch.where(is_real, starts[chosen, None] + offset, 0)
        rows = torch.where(is_real, batch.trunk_rows[token], 0)
        buckets.append(Bucket(rows, is_real & batch.owns_row[token]))
    return AttentionPlan(batch, longest, False, buckets)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,  # transformers hands every model's keywords to every attention function
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: query [1, heads, U, d] -> output [1, U, heads, d]."""
    if sliding_window is not None and plan.longest > sliding_window:
        raise ValueError(
            f"a sequence of {plan.longest} tokens exceeds the model's sliding window of "
            f"{sliding_window}, which packed attention lacks; shorten the length limits"
        )
    if softcap is not None or s_aux is not None:
        raise ValueError("packed attention has no soft cap and no sinks, which the model asks for")
    states = [x[0].transpose(0, 1) for x in (query, key, value)]  # [U, heads, d]
    if plan.uses_flash:
        return _flash(states, plan, scaling, dropout)[None], None
    output = torch.zeros(
        (query.shape[2], *states[0].shape[1:-1], states[2].shape[-1]),
        dtype=query.dtype,
        device=query.device,
    )
    for bucket in plan.buckets:
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


def _flash(
    states: list[Tensor], plan: AttentionPlan, scaling: float | None, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    batch = plan.batch
    q, k, v = (x[batch.trunk_rows] for x in states)  # [N, heads, d]
    context = flash_attn_varlen_func(
        q,
        k,
        v,
        batch.cu_seqlens,
        batch.cu_seqlens,
        plan.longest,
        plan.longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
    )
    return context[batch.owns_row]  # rows are numbered in the order of the tokens that own them


AttentionInterface.register(NAME, packed_attention)
