"""Packed attention over zigzag shards equals plain attention, values and gradients."""

import math

import pytest
import torch
from harness import run_ranks
from hf_reference import hf_config, shard
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from flowrl.megatron.attention import PackedAttention, zigzag_rows
from flowrl.megatron.layout import Layout, context_group, initialize
from flowrl.megatron.model_config import transformer_config

HEADS, DIM = 4, 8
LENGTHS = [8, 24, 0, 16, 40]  # multiples of 2 * 4; each rank of four has chunks of 1 to 5 tokens


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of one sequence, written out: [L, heads, d] -> [L, heads * d]."""
    key, value = (x.repeat_interleave(HEADS // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(DIM)
    is_future = torch.ones(len(query), len(query), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(is_future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)


def inputs(num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key, value and the gradient of the output, [N, ...], of bfloat16 precision."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, DIM), (num_groups, DIM), (num_groups, DIM), (HEADS * DIM,)]
    n = sum(LENGTHS)
    return [torch.randn(n, *s, generator=generator).bfloat16().to(dtype) for s in shapes]


def plain_results(num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Output and the gradients of query, key and value."""
    *leaves, grad = inputs(num_groups, dtype)
    for leaf in leaves:
        leaf.requires_grad_()
    parts = [plain(*qkv) for qkv in zip(*(x.split(LENGTHS) for x in leaves), strict=True)]
    output = torch.cat(parts)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def packed_results(rank: int, cp: int, num_groups: int, dtype: torch.dtype) -> list[Tensor]:
    """This rank's rows, and what `plain_results` has there."""
    layout = Layout(context=cp)
    initialize(layout)
    attention = PackedAttention(
        config=transformer_config(hf_config("llama", head_dim=DIM), layout, dtype),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type=None,
        softmax_scale=None,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    sequences = [torch.zeros(n, dtype=torch.int64) for n in LENGTHS]
    _, _, packed, rows = shard(sequences, layout, context_group().rank())
    query, key, value, grad = (x[rows] for x in inputs(num_groups, dtype))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    output = attention(
        *leaves,
        None,
        attn_mask_type=AttnMaskType.causal,
        attention_bias=None,
        packed_seq_params=packed,
    )
    return [rows, output.detach(), *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("num_groups", [1, 4])
@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "floor"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_equals_plain_attention(dtype: torch.dtype, floor: float, cp: int, num_groups: int) -> None:
    results = run_ranks(cp, packed_results, cp, num_groups, dtype)
    rows = torch.cat([r[0] for r in results])
    assert torch.equal(rows.sort().values, torch.arange(sum(LENGTHS)))
    truths = plain_results(num_groups, torch.float64)
    same_dtype = plain_results(num_groups, dtype)
    for i, (truth, other) in enumerate(zip(truths, same_dtype, strict=True), start=1):
        value = torch.cat([r[i] for r in results]).double()
        bound = (other.double() - truth).norm() + floor * truth.norm()
        assert (value - truth[rows]).norm() <= bound, i


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_zigzag_rows_invert_the_shards(cp: int) -> None:
    """Rows gathered rank by rank, then put in `zigzag_rows` order, are the packed order."""
    lengths = [2 * cp, 6 * cp, 0, 2 * cp, 10 * cp]
    sequences = [torch.zeros(n, dtype=torch.int64) for n in lengths]
    shards = [shard(sequences, Layout(context=cp), rank) for rank in range(cp)]
    gathered = torch.cat([rows for _, _, _, rows in shards])
    cu_seqlens = shards[0][2].cu_seqlens_q
    if cp == 1:
        assert torch.equal(gathered, torch.arange(sum(lengths)))
        return
    assert torch.equal(gathered[zigzag_rows(cu_seqlens, cp)], torch.arange(sum(lengths)))
