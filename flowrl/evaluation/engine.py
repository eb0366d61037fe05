"""The model of an evaluation: where it lies, its fingerprint, and who generates with it."""

import hashlib
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from flowrl.checkpoint import HF_FOLDER, STEP_NAME, latest_checkpoint
from flowrl.config import cache_dir
from flowrl.device import resolve_device
from flowrl.evaluation.settings import EvalSettings
from flowrl.policy.pretrained import load_model, resolve_model_path
from flowrl.rollout import RolloutEngine
from flowrl.rollout.transformers import TransformersEngine
from flowrl.settings import RolloutConfig

WEIGHT_SUFFIXES = (".safetensors", ".bin")
# What decides beside the weights which text is generated: the model's form, how a prompt becomes
# tokens, and where a response ends.
TEXT_FILES = (
    *("config.json", "generation_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "tiktoken.model"),
)
READ_BYTES = 1 << 24
VLLM_MEMORY = 0.9  # share of the GPU, which nothing else uses here


@dataclass(frozen=True)
class Servers:
    """vLLM servers that generate, all with the evaluated model's weights.

    weight_dir: folder for the weights that they and this process see, a temporary one if None.
    timeout_s: limit of one try of a response, and of how long no server may be usable.
    """

    urls: tuple[str, ...]
    weight_dir: Path | None = None
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"--servers has {url!r}: give http://host:port,http://...")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"--server-timeout is {self.timeout_s}: give a number of seconds")


def find_model(source: str) -> Path:
    """The HF folder of a run directory, a checkpoint, a folder, a built-in or a hub name.

    Raises ValueError for a run directory without a checkpoint and a folder without a model, OSError
    when the hub cannot be reached.
    """
    folder = Path(source)
    if STEP_NAME.fullmatch(folder.name) and (folder / HF_FOLDER).is_dir():
        return folder / HF_FOLDER
    if folder.is_dir():
        checkpoint = latest_checkpoint(folder)
        if checkpoint is not None:
            return checkpoint.hf
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{source} is no model: neither an HF folder (no config.json), nor a checkpoint, "
                "nor a run directory with one"
            )
        return folder
    if source.startswith("builtin:"):
        return Path(resolve_model_path(source, cache_dir()))
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ValueError(f"{source} is no folder; give one, builtin:<name> or a hub name org/model")
    return Path(snapshot_download(source))


def fingerprint(folder: Path) -> str:
    """16 hex digits of the names and contents of a model's weights, configuration and tokenizer."""
    files = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    texts = [path for name in TEXT_FILES if (path := folder / name).is_file()]
    digest = hashlib.sha256()
    for path in [*texts, *files]:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16]


def context_length(folder: Path) -> int | None:
    """Tokens that the model's config.json allows, None if it does not say."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("max_position_embeddings")


def build_engine(
    settings: EvalSettings,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    device: str,
    max_model_len: int,
    servers: Servers | None = None,
) -> RolloutEngine:
    """The engine that settings.engine names, with the model loaded; vLLM in here or on servers.

    max_model_len: tokens of the longest prompt and response. Raises ValueError if vLLM is asked for
    and not installed, or if a server has another model or dtype, and RuntimeError if a server does
    not answer.
    """
    if servers is not None:
        return _server_engine(settings, folder, tokenizer, max_model_len, servers)
    if settings.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                "--engine vllm needs vLLM: pip install vllm with an NVIDIA GPU, make vllm without "
                "one; or use --engine transformers"
            )
        from flowrl.rollout.vllm_engine import VllmEngine  # an import of many seconds

        rollout = RolloutConfig(  # pyright: ignore[reportCallIssue]
            engine="vllm", max_num_seqs=settings.max_num_seqs, gpu_memory_utilization=VLLM_MEMORY
        )
        return VllmEngine(
            str(folder), tokenizer, rollout, dtype=settings.dtype, max_model_len=max_model_len
        )
    model = load_model(str(folder), getattr(torch, settings.dtype), resolve_device(device))
    return TransformersEngine(model, tokenizer, settings.max_num_seqs)


def _server_engine(
    settings: EvalSettings,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_model_len: int,
    servers: Servers,
) -> RolloutEngine:
    from flowrl.rollout.vllm_server import VllmServerEngine

    rollout = RolloutConfig(  # pyright: ignore[reportCallIssue]
        engine="vllm",
        servers=list(servers.urls),
        max_num_seqs=-(-settings.max_num_seqs // len(servers.urls)),  # the batch is shared
        request_timeout_s=servers.timeout_s,
        weight_dir=None if servers.weight_dir is None else str(servers.weight_dir.resolve()),
    )
    model = load_model(str(folder), getattr(torch, settings.dtype), torch.device("cpu"))
    return VllmServerEngine(
        str(folder), model, tokenizer, rollout, max_model_len=max_model_len, needs_dtype=True
    )
