"""The dimensions of a model, and how many parameters of it each rank of a layout holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.plan.layout import PlannedLayout

MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelSizes:
    """A dense decoder with gated MLP, as its Hugging Face config.json describes it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    is_tied: bool  # one matrix is embedding and output weight

    @property
    def query_width(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of the keys, and of the values."""
        return self.num_key_value_heads * self.head_dim


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
    "tiny-sums": ModelSizes("llama", 16, 96, 216, 2, 4, 4, 32, True),
}


def read_sizes(path: str) -> ModelSizes:
    """The sizes of `model.path`: a folder with a config.json, that file, or a known name.

    Known names may have an owner in front and `-instruct` behind. Nothing is downloaded. Raises
    ValueError for an unknown name, an unreadable file and a model that is no dense Llama or Qwen.
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
    )


def _positive(file: Path, values: dict[str, Any], name: str, default: int | None) -> int:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{file}: {name} = {value!r}, but a positive integer is needed")
    return value


def layer_parameters(sizes: ModelSizes, tensor: int = 1) -> int:
    """Parameters of one layer on one of `tensor` ranks; the norms are on all of them."""
    hidden, query, key = sizes.hidden_size, sizes.query_width, sizes.key_width
    matrices = hidden * (2 * query + 2 * key + 3 * sizes.intermediate_size)
    bias = query + 2 * key if sizes.model_type == "qwen2" else 0
    norms = 2 * hidden + (2 * sizes.head_dim if sizes.model_type == "qwen3" else 0)
    return (matrices + bias) // tensor + norms


def vocab_rows(sizes: ModelSizes, tensor: int) -> int:
    """Rows of the embedding on each rank: equal shards, so the last one is padded."""
    return -(-sizes.vocab_size // tensor)


def stage_parameters(sizes: ModelSizes, layout: PlannedLayout, stage: int) -> int:
    """Parameters that one rank of a pipeline stage holds, padding of the vocabulary included.

    With several stages a tied output weight is a copy of the embedding, on the last stage.
    """
    is_last = stage == layout.pipeline - 1
    table = vocab_rows(sizes, layout.tensor) * sizes.hidden_size
    layers = sizes.num_hidden_layers // layout.pipeline
    num = layers * layer_parameters(sizes, layout.tensor)
    if stage == 0:
        num += table
    if is_last:
        num += sizes.hidden_size  # the final norm
        if not sizes.is_tied or layout.pipeline > 1:
            num += table
    return num


def model_parameters(sizes: ModelSizes) -> int:
    """Parameters of the whole model."""
    return stage_parameters(sizes, PlannedLayout(), 0)


def partition_parameters(hidden_size: int, num_layers: int) -> int:
    """Parameters of Z: linear layers, each but the last with a LayerNorm (flowrl.partition)."""
    inner = hidden_size * hidden_size + hidden_size + 2 * hidden_size
    return (num_layers - 1) * inner + hidden_size + 1
