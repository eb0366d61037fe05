"""The dimensions of a model, and how many parameters of it each rank of a layout holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.plan.layout import PlannedLayout

MODEL_TYPES = ("llama", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class ModelSizes:
    """A decoder with gated MLPs or experts, as its Hugging Face config.json describes it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    is_tied: bool  # one matrix is embedding and output weight
    num_experts: int = 0  # of a layer that has some
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    expert_layers: tuple[int, ...] = ()  # layers with experts in the MLP's place

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def mlp_width(self, layer: int) -> int:
        """Intermediate width that a token passes in the MLP or the experts of a layer."""
        if layer in self.expert_layers:
            return self.num_experts_per_tok * self.moe_intermediate_size
        return self.intermediate_size


KNOWN_MODELS = {
    "smollm2-135m": ModelSizes("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "smollm2-360m": ModelSizes("llama", 49152, 960, 2560, 32, 15, 5, 64, True),
    "smollm2-1.7b": ModelSizes("llama", 49152, 2048, 8192, 24, 32, 32, 64, True),
    "qwen2.5-0.5b": ModelSizes("qwen2", 151936, 896, 4864, 24, 14, 2, 64, True),
    "qwen2.5-1.5b": ModelSizes("qwen2", 151936, 1536, 8960, 28, 12, 2, 128, True),
    "qwen2.5-7b": ModelSizes("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "qwen2.5-32b": ModelSizes("qwen2", 152064, 5120, 27648, 64, 40, 8, 128, False),
    "deepseek-r1-distill-qwen-7b": ModelSizes("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "llama-3-8b": ModelSizes("llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "qwen3-30b-a3b": ModelSizes(
        "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128, False, 128, 8, 768, tuple(range(48))
    ),
    "tiny-sums": ModelSizes("llama", 16, 96, 216, 2, 4, 4, 32, True),
}


def read_sizes(path: str) -> ModelSizes:
    """The sizes of `model.path`: a folder with a config.json, that file, or a known name.

    Known names may have an owner in front and `-instruct` behind. Nothing is downloaded. Raises
    ValueError for an unknown name, an unreadable file and another model than Llama and Qwen.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "config.json"
    if file.is_file():
        return _read_config(file)
    name = path.removeprefix("builtin:").rsplit("/", 1)[-1].lower()
    name = name.removeprefix("meta-").removesuffix("-instruct")
    if name not in KNOWN_MODELS:
        raise ValueError(
            f"model.path = {path} is no folder with a config.json and none of the models that are "
            f"known by name ({', '.join(KNOWN_MODELS)}); name the folder, or its config.json"
        )
    return KNOWN_MODELS[name]


def _read_config(file: Path) -> ModelSizes:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no model configuration: {error}") from error
    if values.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{file}: model_type = {values.get('model_type')!r}, but the plan knows the layers of "
            f"{', '.join(MODEL_TYPES)} only"
        )
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise ValueError(f"{file}: {name} = true, which the Megatron policy does not represent")
    heads = _positive(file, values, "num_attention_heads", None)
    hidden_size = _positive(file, values, "hidden_size", None)
    return ModelSizes(
        model_type=values["model_type"],
        vocab_size=_positive(file, values, "vocab_size", None),
        hidden_size=hidden_size,
        intermediate_size=_positive(file, values, "intermediate_size", None),
        num_hidden_layers=_positive(file, values, "num_hidden_layers", None),
        num_attention_heads=heads,
        num_key_value_heads=_positive(file, values, "num_key_value_heads", heads),
        head_dim=_positive(file, values, "head_dim", hidden_size // heads),
        is_tied=bool(values.get("tie_word_embeddings", False)),
        **(_read_experts(file, values) if values["model_type"] == "qwen3_moe" else {}),
    )


def _read_experts(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a mixture of experts, whose number has two names."""
    name = "num_local_experts" if "num_local_experts" in values else "num_experts"
    step = _positive(file, values, "decoder_sparse_step", 1)
    num_layers = _positive(file, values, "num_hidden_layers", None)
    dense = values.get("mlp_only_layers") or []
    return {
        "num_experts": _positive(file, values, name, None),
        "num_experts_per_tok": _positive(file, values, "num_experts_per_tok", None),
        "moe_intermediate_size": _positive(file, values, "moe_intermediate_size", None),
        "expert_layers": tuple(
            layer for layer in range(num_layers) if (layer + 1) % step == 0 and layer not in dense
        ),
    }


def _positive(file: Path, values: dict[str, Any], name: str, default: int | None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {name} = {value!r}, but a positive integer is needed")
    return value


def layer_parameters(sizes: ModelSizes, layout: PlannedLayout, layer: int) -> int:
    """Parameters of one layer on one rank; norms and router are on all of them."""
    hidden, query, key = sizes.hidden_size, sizes.query_width, sizes.key_width
    matrices = hidden * (2 * query + 2 * key)
    whole = 2 * hidden
    if layer in sizes.expert_layers:
        whole += hidden * sizes.num_experts
    else:
        matrices += 3 * hidden * sizes.intermediate_size
    if sizes.model_type in ("qwen3", "qwen3_moe"):
        whole += 2 * sizes.head_dim
    if sizes.model_type == "qwen2":
        matrices += query + 2 * key  # biases
    return matrices // layout.tensor + whole + layer_expert_parameters(sizes, layout, layer)


def layer_expert_parameters(sizes: ModelSizes, layout: PlannedLayout, layer: int) -> int:
    """Those of them that belong to the experts of the rank."""
    if layer not in sizes.expert_layers:
        return 0
    return sizes.num_experts // layout.expert * sizes.expert_parameters


def stage_layers(sizes: ModelSizes, layout: PlannedLayout, stage: int) -> list[int]:
    """The layers of a pipeline stage, all its chunks."""
    size = sizes.num_hidden_layers // (layout.pipeline * layout.virtual_pipeline)
    starts = range(stage * size, sizes.num_hidden_layers, layout.pipeline * size)
    return [layer for start in starts for layer in range(start, start + size)]


def vocab_rows(sizes: ModelSizes, tensor: int) -> int:
    """Rows of the embedding on each rank: equal shards, so the last one is padded."""
    return -(-sizes.vocab_size // tensor)


def trunk_parameters(sizes: ModelSizes, layout: PlannedLayout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, without the output weight."""
    layers = stage_layers(sizes, layout, stage)
    num = sum(layer_parameters(sizes, layout, layer) for layer in layers)
    if stage == 0:
        num += vocab_rows(sizes, layout.tensor) * sizes.hidden_size
    if stage == layout.pipeline - 1:
        num += sizes.hidden_size  # the final norm
    return num


def stage_parameters(sizes: ModelSizes, layout: PlannedLayout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, padding of the vocabulary included.

    With several stages a tied output weight is a copy of the embedding, on the last stage.
    """
    num = trunk_parameters(sizes, layout, stage)
    if stage == layout.pipeline - 1 and (not sizes.is_tied or layout.pipeline > 1):
        num += vocab_rows(sizes, layout.tensor) * sizes.hidden_size
    return num


def stage_expert_parameters(sizes: ModelSizes, layout: PlannedLayout, stage: int) -> int:
    """Those of them that belong to experts."""
    layers = stage_layers(sizes, layout, stage)
    return sum(layer_expert_parameters(sizes, layout, layer) for layer in layers)


def model_parameters(sizes: ModelSizes) -> int:
    """Parameters of the whole model."""
    return stage_parameters(sizes, PlannedLayout(), 0)


def active_parameters(sizes: ModelSizes) -> int:
    """Parameters that one token uses: all but the experts that its router does not choose."""
    num_unused = sizes.num_experts - sizes.num_experts_per_tok
    return model_parameters(sizes) - len(sizes.expert_layers) * num_unused * sizes.expert_parameters


def partition_parameters(hidden_size: int, num_layers: int) -> int:
    """Parameters of Z: linear layers, each but the last with a LayerNorm (flowrl.partition)."""
    inner = hidden_size * hidden_size + hidden_size + 2 * hidden_size
    return (num_layers - 1) * inner + hidden_size + 1
