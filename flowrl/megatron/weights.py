"""Weights by their HF names, in and out of any layout, one parameter at a time.

Megatron fuses the query, key and value projections group by group, and gate and up projection
shard by shard; it pads the vocabulary to equal shards. The experts of a layer are one tensor here,
as they are in a transformers model; its files may also name them one by one. Nothing is computed,
so a round trip gives the same bits.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from flowrl.megatron.experts import stacked_name
from flowrl.megatron.layout import expert_group, pipeline_group, tensor_group
from flowrl.megatron.model import FlowModel
from flowrl.megatron.model_config import head_dim

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_HF_WEIGHTS = ("partition.", "value_head.")  # Z and the critic's head, the same on all ranks
LAYERS = "decoder.layers."  # how Megatron names layers, numbered from 0 on every chunk


@dataclass(frozen=True)
class Entry:
    """How one Megatron parameter, or the experts of one layer, relate to HF tensors."""

    hf_names: tuple[str, ...]
    split: Callable[[Sequence[Tensor], int], Sequence[Tensor]]  # HF tensors -> one shard a rank
    merge: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # back
    # The ranks that have one shard each; None: all have the whole.
    group: Callable[[], dist.ProcessGroup] | None = tensor_group

    @property
    def is_stacked(self) -> bool:
        """Whether a shard is [n, ...], the n parameters of a rank's experts."""
        return self.group is expert_group


def _columns(name: str) -> Entry:
    """Output rows divided over the tensor-parallel ranks."""
    return Entry((name,), lambda hf, tp: hf[0].chunk(tp), lambda shards: [torch.cat([*shards])])


def _rows(name: str) -> Entry:
    """Input columns divided over the tensor-parallel ranks."""
    return Entry(
        (name,), lambda hf, tp: hf[0].chunk(tp, 1), lambda shards: [torch.cat([*shards], 1)]
    )


def _replicated(name: str) -> Entry:
    return Entry((name,), lambda hf, tp: [hf[0]] * tp, lambda shards: [shards[0]], None)


def _experts(name: str) -> Entry:
    """The experts of a layer [E, ...], divided over the expert-parallel ranks."""
    return Entry(
        (name,), lambda hf, ep: hf[0].chunk(ep), lambda shards: [torch.cat([*shards])], expert_group
    )


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


def _expert(stacked: Entry, index: int) -> Entry:
    """One expert of a layer as files may name it, whole."""
    prefix, kind = stacked.hf_names[0].rsplit(".", 1)
    if kind == "gate_up_proj":
        return replace(_gate_up(f"{prefix}.{index}"), group=None)
    return _replicated(f"{prefix}.{index}.{kind}.weight")


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
        "mlp.router.weight": _replicated(f"{mlp}.gate.weight"),
        "mlp.experts.linear_fc1.weight": _experts(f"{mlp}.experts.gate_up_proj"),
        "mlp.experts.linear_fc2.weight": _experts(f"{mlp}.experts.down_proj"),
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


def _held(chunk: FlowModel) -> dict[str, list[torch.nn.Parameter]]:
    """A chunk's parameters that HF has, by name with the layer's number in the whole model.

    A name stands for one parameter, or for this rank's experts of a layer.
    """
    offset = get_transformer_layer_offset(chunk.config, chunk.vp_stage)
    held: dict[str, list[torch.nn.Parameter]] = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith(LAYERS):
            layer, inner = name.removeprefix(LAYERS).split(".", 1)
            name = f"{LAYERS}{int(layer) + offset}.{stacked_name(inner) or inner}"
        if not name.startswith(NO_HF_WEIGHTS):
            held.setdefault(name, []).append(parameter)
    return held


def own_parameters(chunk: FlowModel) -> dict[str, torch.nn.Parameter]:
    """A chunk's parameters that HF has not: `partition.*` or `value_head.*`."""
    named = chunk.named_parameters()
    return {name: parameter for name, parameter in named if name.startswith(NO_HF_WEIGHTS)}


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
        for name in _held(chunk)
        for hf_name in _entry(name, chunk.hf_config).hf_names
    }


@dataclass(frozen=True)
class _Target:
    """Parameters of this rank that HF tensors fill."""

    entry: Entry
    parameters: list[torch.nn.Parameter]

    def shards(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """What each parameter is given."""
        group = self.entry.group
        rank, size = (0, 1) if group is None else (group().rank(), group().size())
        shard = self.entry.split(tensors, size)[rank]
        return shard.unbind() if self.entry.is_stacked else [shard]


def _targets(chunk: FlowModel) -> Iterator[_Target]:
    """Experts are filled by the tensor of their layer, or each by its own."""
    for name, parameters in _held(chunk).items():
        entry = _entry(name, chunk.hf_config)
        yield _Target(entry, parameters)
        if entry.is_stacked:
            first = expert_group().rank() * len(parameters)
            for index, parameter in enumerate(parameters, first):
                yield _Target(_expert(entry, index), [parameter])


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
    targets = [target for chunk in chunks for target in _targets(chunk)]
    unfilled = {parameter for target in targets for parameter in target.parameters}
    waiting: dict[str, list[int]] = {}  # HF name -> the targets that want it
    for i, target in enumerate(targets):
        for name in target.entry.hf_names:
            waiting.setdefault(name, []).append(i)
    if isinstance(source, Path | str):
        source = _read_folder(Path(source), waiting.__contains__)
    collected: dict[int, dict[str, Tensor]] = {}
    for name, tensor in source:
        for i in waiting.pop(name, ()):
            target, parts = targets[i], collected.setdefault(i, {})
            names = target.entry.hf_names
            parts[name] = tensor
            if len(parts) == len(names):
                shards = target.shards([parts[n] for n in names])
                given = [tuple(shard.shape) for shard in shards]
                wanted = [tuple(parameter.shape) for parameter in target.parameters]
                if given != wanted:
                    raise ValueError(
                        f"{' and '.join(names)} give {len(given)} shard(s) of shape {given[0]}, "
                        f"but the model's config asks for {len(wanted)} of {wanted[0]}"
                    )
                for parameter, shard in zip(target.parameters, shards, strict=True):
                    write(parameter, shard)
                    unfilled.remove(parameter)
                del collected[i]
    if unfilled:
        missing = {
            name
            for target in targets
            if not target.entry.is_stacked and unfilled.intersection(target.parameters)
            for name in target.entry.hf_names
            if name in waiting
        }
        raise ValueError(
            f"the source lacks {len(missing)} weights of the model, first {min(missing)}"
        )


@dataclass(frozen=True)
class _Location:
    """Where a parameter lives, as every rank of the pipeline knows it."""

    name: str
    stage: int  # pipeline rank
    shape: torch.Size  # of one shard
    dtype: torch.dtype


def _locate(chunks: Sequence[FlowModel], dtype: torch.dtype | None) -> list[_Location]:
    """All parameters of the model in HF's order; collective over the pipeline.

    Chunk by chunk and, within, stage by stage is the order of the layers.
    """
    group = pipeline_group()

    def location(name: str, parameters: list[torch.nn.Parameter], chunk: FlowModel) -> _Location:
        first = parameters[0]
        is_stacked = _entry(name, chunk.hf_config).is_stacked
        shape = [len(parameters), *first.shape] if is_stacked else first.shape
        return _Location(name, group.rank(), torch.Size(shape), dtype or first.dtype)

    own = [
        [location(name, parameters, chunk) for name, parameters in _held(chunk).items()]
        for chunk in chunks
    ]
    everyone: list[list[list[_Location]]] = [[] for _ in range(group.size())]
    dist.all_gather_object(everyone, own, group=group)
    return [
        location
        for index in range(len(chunks))
        for stages in everyone
        for location in stages[index]
    ]


def _along_pipeline(shard: Tensor | None, place: _Location) -> Tensor:
    """Bring a shard from its stage to all stages."""
    group = pipeline_group()
    if shard is None:
        device = torch.cuda.current_device()  # the CPU where there is no GPU, see cpu.py
        shard = torch.empty(place.shape, dtype=place.dtype, device=device)
    if group.size() > 1:
        dist.broadcast(shard, group=group, group_src=place.stage)
    return shard


def _across_ranks(shard: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Bring the shards of all ranks of a group to all of them."""
    if group.size() == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard, group=group)
    return shards


@torch.no_grad()
def export_hf_weights(
    chunks: Sequence[FlowModel],
    *,
    read: Callable[[torch.nn.Parameter], Tensor] = torch.Tensor.detach,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (HF name, full tensor) in the order of the layers, one parameter in memory at a time.

    The experts of a layer are one tensor [E, ...], as in a transformers model.

    Collective: all ranks must exhaust the iterator, and all are given everything. `read` chooses
    what is exported in a parameter's place and shape, such as its gradient, and is called once a
    parameter; `dtype` is that of what it returns, None the parameter's own. Tied weights appear
    once, under the embedding's name; Z does not appear. Raises ValueError where `read` returns
    another dtype.
    """
    hf_config = chunks[0].hf_config
    own = {name: parameters for chunk in chunks for name, parameters in _held(chunk).items()}
    places = _locate(chunks, dtype)
    stage = pipeline_group().rank()
    for place in places:
        if place.name == "output_layer.weight" and hf_config.tie_word_embeddings:
            continue  # the last stage's copy of the embedding
        entry = _entry(place.name, hf_config)
        own_shard = None
        if place.stage == stage:
            values = [read(parameter) for parameter in own[place.name]]
            own_shard = torch.stack(values) if entry.is_stacked else values[0].contiguous()
            if own_shard.dtype != place.dtype:  # the other stages would receive other bits
                raise ValueError(
                    f"read returns {own_shard.dtype} for {place.name}, expected is {place.dtype}: "
                    f"give dtype={own_shard.dtype}"
                )
        shards = [_along_pipeline(own_shard, place)]
        if entry.group is not None:
            shards = _across_ranks(shards[0], entry.group())
        yield from zip(entry.hf_names, entry.merge(shards), strict=True)
