"""Weights by their HF names, in and out of any layout, one parameter at a time.

Megatron fuses the query, key and value projections group by group, and gate and up projection
shard by shard; it pads the vocabulary to equal shards. Nothing is computed, so a round trip
gives the same bits.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from flowrl.megatron.layout import pipeline_group, tensor_group
from flowrl.megatron.model import FlowModel
from flowrl.megatron.model_config import head_dim

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = "decoder.layers."  # how Megatron names layers, numbered from 0 on every chunk


@dataclass(frozen=True)
class Entry:
    """How one Megatron parameter relates to HF tensors."""

    hf_names: tuple[str, ...]
    split: Callable[[Sequence[Tensor], int], Sequence[Tensor]]  # HF tensors -> one shard a tp rank
    merge: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # back
    is_sharded: bool = True


def _columns(name: str) -> Entry:
    """Output rows divided over the tensor-parallel ranks."""
    return Entry((name,), lambda hf, tp: hf[0].chunk(tp), lambda shards: [torch.cat([*shards])])


def _rows(name: str) -> Entry:
    """Input columns divided over the tensor-parallel ranks."""
    return Entry(
        (name,), lambda hf, tp: hf[0].chunk(tp, 1), lambda shards: [torch.cat([*shards], 1)]
    )


def _replicated(name: str) -> Entry:
    return Entry((name,), lambda hf, tp: [hf[0]] * tp, lambda shards: [shards[0]], False)


def _vocabulary(name: str, num_tokens: int) -> Entry:
    """Rows of the vocabulary, zeros added so that all ranks have equally many."""

    def split(hf: Sequence[Tensor], tp: int) -> Sequence[Tensor]:
        padding = -num_tokens % tp
        return torch.nn.functional.pad(hf[0], (0, 0, 0, padding)).chunk(tp)

    return Entry((name,), split, lambda shards: [torch.cat([*shards])[:num_tokens]])


def _qkv(prefix: str, suffix: str, hf_config: PretrainedConfig) -> Entry:
    """Query, key and value of one group of heads after the other, weight or bias."""
    groups, dim = hf_config.num_key_value_heads, head_dim(hf_config)
    sizes = [hf_config.num_attention_heads // groups * dim, dim, dim]

    def split(hf: Sequence[Tensor], tp: int) -> Sequence[Tensor]:
        parts = [x.unflatten(0, (groups, size)) for x, size in zip(hf, sizes, strict=True)]
        return torch.cat(parts, 1).flatten(0, 1).chunk(tp)

    def merge(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        fused = torch.cat([*shards]).unflatten(0, (groups, sum(sizes)))
        return [x.flatten(0, 1) for x in fused.split(sizes, 1)]

    return Entry(tuple(f"{prefix}.{x}_proj.{suffix}" for x in "qkv"), split, merge)


def _gate_up(prefix: str) -> Entry:
    """Gate and up projection; every shard holds its part of both."""

    def split(hf: Sequence[Tensor], tp: int) -> Sequence[Tensor]:
        gate, up = (x.chunk(tp) for x in hf)
        return [torch.cat(pair) for pair in zip(gate, up, strict=True)]

    def merge(shards: Sequence[Tensor]) -> Sequence[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]

    return Entry((f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"), split, merge)


def _layer_entry(inner: str, layer: int, hf_config: PretrainedConfig) -> Entry:
    prefix = f"model.layers.{layer}"
    attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
    input_norm = _replicated(f"{prefix}.input_layernorm.weight")
    mlp_norm = _replicated(f"{prefix}.post_attention_layernorm.weight")
    return {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.weight": _qkv(attention, "weight", hf_config),
        "self_attention.linear_qkv.bias": _qkv(attention, "bias", hf_config),
        "self_attention.q_layernorm.weight": _replicated(f"{attention}.q_norm.weight"),
        "self_attention.k_layernorm.weight": _replicated(f"{attention}.k_norm.weight"),
        "self_attention.linear_proj.weight": _rows(f"{attention}.o_proj.weight"),
        "pre_mlp_layernorm.weight": mlp_norm,
        "mlp.linear_fc1.weight": _gate_up(mlp),
        "mlp.linear_fc2.weight": _rows(f"{mlp}.down_proj.weight"),
        # Transformer Engine's layers hold the norms in the projections that follow them.
        "self_attention.linear_qkv.layer_norm_weight": input_norm,
        "mlp.linear_fc1.layer_norm_weight": mlp_norm,
    }[inner]


def _entry(name: str, hf_config: PretrainedConfig) -> Entry:
    """The entry of a Megatron parameter, by its name with the layer's number in the whole model."""
    if name.startswith(LAYERS):
        layer, inner = name.removeprefix(LAYERS).split(".", 1)
        return _layer_entry(inner, int(layer), hf_config)
    output = EMBEDDING if hf_config.tie_word_embeddings else HEAD
    return {
        "embedding.word_embeddings.weight": _vocabulary(EMBEDDING, hf_config.vocab_size),
        "output_layer.weight": _vocabulary(output, hf_config.vocab_size),
        "decoder.final_layernorm.weight": _replicated("model.norm.weight"),
    }[name]


def _parameters(chunk: FlowModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """A chunk's parameters by name with the layer's number in the whole model, Z excepted."""
    offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
    for name, parameter in chunk.named_parameters():
        if name.startswith(LAYERS):
            layer, inner = name.removeprefix(LAYERS).split(".", 1)
            yield f"{LAYERS}{int(layer) + offset}.{inner}", parameter
        elif not name.startswith("partition."):
            yield name, parameter


def _read_folder(folder: Path, is_needed: Callable[[str], bool]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an HF folder; only the needed ones are read from disk."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    elif single.exists():
        files = [single.name]
    else:
        raise ValueError(f"{folder} holds neither {single.name} nor {index.name}")
    for file in files:
        with safe_open(folder / file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no dict
                if is_needed(name):
                    yield name, tensors.get_tensor(name)


def hf_names(chunks: Sequence[FlowModel]) -> set[str]:
    """HF names of the tensors that this rank holds something of."""
    return {
        hf_name
        for chunk in chunks
        for name, _ in _parameters(chunk)
        for hf_name in _entry(name, chunk.hf_config).hf_names
    }


@torch.no_grad()
def load_hf_weights(
    chunks: Sequence[FlowModel],
    source: Path | str | Iterable[tuple[str, Tensor]],
    write: Callable[[torch.nn.Parameter, Tensor], object] = torch.Tensor.copy_,
) -> None:
    """Fill all chunks from an HF folder of safetensors or from (HF name, full tensor) pairs.

    Every rank reads on its own and keeps its shards; a tensor of another dtype is rounded to the
    parameter's. `write` says what becomes of a parameter's shard. Raises ValueError for missing
    weights and wrong shapes.
    """
    tp, tp_rank = tensor_group().size(), tensor_group().rank()
    waiting: dict[str, list[int]] = {}  # HF name -> the entries that want it
    entries = [
        (parameter, _entry(name, chunk.hf_config))
        for chunk in chunks
        for name, parameter in _parameters(chunk)
    ]
    for i, (_, entry) in enumerate(entries):
        for name in entry.hf_names:
            waiting.setdefault(name, []).append(i)
    if isinstance(source, Path | str):
        source = _read_folder(Path(source), waiting.__contains__)
    collected: dict[int, dict[str, Tensor]] = {}
    for name, tensor in source:
        for i in waiting.pop(name, ()):
            parameter, entry = entries[i]
            parts = collected.setdefault(i, {})
            parts[name] = tensor
            if len(parts) == len(entry.hf_names):
                shard = entry.split([parts[n] for n in entry.hf_names], tp)[tp_rank]
                if shard.shape != parameter.shape:
                    raise ValueError(
                        f"{' and '.join(entry.hf_names)} give a shard of shape "
                        f"{tuple(shard.shape)}, but the model's config asks for "
                        f"{tuple(parameter.shape)}"
                    )
                write(parameter, shard)
                del collected[i]
    if waiting:
        raise ValueError(
            f"the source lacks {len(waiting)} weights of the model, first {min(waiting)}"
        )


@dataclass(frozen=True)
class _Location:
    """Where a parameter lives, as every rank of the pipeline knows it."""

    name: str
    stage: int  # pipeline rank
    shape: torch.Size  # of one shard
    dtype: torch.dtype


def _locate(
    chunks: Sequence[FlowModel], read: Callable[[torch.nn.Parameter], Tensor]
) -> list[_Location]:
    """All parameters of the model in HF's order; collective over the pipeline.

    Chunk by chunk and, within, stage by stage is the order of the layers.
    """
    stage = pipeline_group().rank()
    own = []
    for chunk in chunks:
        values = [(name, read(parameter)) for name, parameter in _parameters(chunk)]
        own.append([_Location(name, stage, x.shape, x.dtype) for name, x in values])
    group = pipeline_group()
    everyone: list[list[list[_Location]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, own, group=group)
    return [
        location
        for index in range(len(chunks))
        for stages in everyone
        for location in stages[index]
    ]


def _along_pipeline(shard: Tensor | None, place: _Location, only_rank_0: bool) -> Tensor | None:
    """Bring a shard from its stage to all stages or to the first one."""
    group = pipeline_group()
    if group.size() == 1 or (only_rank_0 and place.stage == 0):
        return shard
    is_receiver = group.rank() == 0 if only_rank_0 else shard is None
    if shard is None and not is_receiver:
        return None
    if shard is None:
        device = torch.cuda.current_device()  # the CPU where there is no GPU, see cpu.py
        shard = torch.empty(place.shape, dtype=place.dtype, device=device)
    if not only_rank_0:
        dist.broadcast(shard, group=group, group_src=place.stage)
    elif is_receiver:
        dist.recv(shard, group=group, group_src=place.stage)
    else:
        dist.send(shard, group=group, group_dst=0)
    return shard


def _across_tensor_ranks(shard: Tensor, only_rank_0: bool) -> list[Tensor] | None:
    """Bring the shards of all tensor-parallel ranks to all of them or to the first one."""
    group = tensor_group()
    if group.size() == 1:
        return [shard]
    is_receiver = not only_rank_0 or group.rank() == 0
    shards = [torch.empty_like(shard) for _ in range(group.size())] if is_receiver else None
    if only_rank_0:
        dist.gather(shard, shards, group=group, group_dst=0)
    else:
        assert shards is not None
        dist.all_gather(shards, shard, group=group)
    return shards


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[FlowModel],
    *,
    only_rank_0: bool = False,
    read: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HF name, full tensor) in the order of the layers, one parameter in memory at a time.

    Collective: all ranks must exhaust the iterator. With `only_rank_0` the others are given
    nothing, and only the first replica of the model takes part. `read` chooses what is exported in
    a parameter's place and shape, such as its gradient. Tied weights appear once, under the
    embedding's name; Z does not appear.
    """
    hf_config = chunks[0].hf_config
    own = {name: parameter for chunk in chunks for name, parameter in _parameters(chunk)}
    places = _locate(chunks, read)
    if only_rank_0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) > 0:
        return
    stage = pipeline_group().rank()
    for place in places:
        if place.name == "output_layer.weight" and hf_config.tie_word_embeddings:
            continue  # the last stage's copy of the embedding
        entry = _entry(place.name, hf_config)
        own_shard = read(own[place.name]).contiguous() if place.stage == stage else None
        shard = _along_pipeline(own_shard, place, only_rank_0)
        if shard is None or (only_rank_0 and stage > 0):
            continue
        shards = _across_tensor_ranks(shard, only_rank_0) if entry.is_sharded else [shard]
        if shards is not None and not (only_rank_0 and dist.get_rank() > 0):
            yield from zip(entry.hf_names, entry.merge(shards), strict=True)
