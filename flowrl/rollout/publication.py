"""What a publication of weights must carry, checked before and while an engine takes it.

An engine that samples from half of an update trains on a policy that never existed, so names and
shapes are held against the model's own, and bytes against their checksums.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig


def expected_weights(
    hf_config: PretrainedConfig, trust_remote_code: bool = False
) -> dict[str, torch.Size]:
    """HF names and shapes that a policy publishes for this model, which is not made.

    Tied weights stand once, under the name of the first, as in `Policy.named_weights`.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def checked(
    named_weights: Iterable[tuple[str, Tensor]], expected: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Pass weights on as they come, in any order, each after it was found to be the model's.

    Raises ValueError for a name that the model has not, or that came before, for another shape,
    and, when the stream ends, for names that never came.
    """
    missing = dict(expected)
    for name, weight in named_weights:
        if name not in missing:
            problem = "came twice" if name in expected else "is not one of the model's"
            raise ValueError(f"published weight {name} {problem}; publish each of its weights once")
        shape = missing.pop(name)
        if weight.shape != shape:
            raise ValueError(
                f"published weight {name} has shape {list(weight.shape)}, the engine's model "
                f"{list(shape)}; engine and policy must be loaded from the same model.path"
            )
        yield name, weight
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(expected)} weights were not published, first "
            f"{min(missing)}; publish all of them"
        )


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checksum(named_weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over all names, dtypes, shapes and bytes, the same in whatever order they come.

    One tensor at a time is in memory.
    """
    lines = sorted(f"{name} {tensor_checksum(weight)}" for name, weight in named_weights)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
