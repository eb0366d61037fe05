"""The head by every implementation that can be compared: ours, PyTorch's and other libraries'.

A variant takes hidden [T, H], weight [V, H] and target [T] and returns the log-probs [T], or, where
its library offers a scalar loss only, their sum. Rivals run with the settings that their authors
made the default, in the dtype of the inputs.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from flowrl.kernels.linear_logprob import linear_logprob, live_implementation

Run = Callable[[Tensor, Tensor, Tensor], Tensor]

MATERIALISED = "torch"


@dataclass(frozen=True)
class Variant:
    """`load` imports what the variant needs and returns the function to run."""

    load: Callable[[], Run]
    module: str = "torch"  # that must be installed
    package: str = ""  # its name for pip
    needs_cuda: bool = False
    is_per_token: bool = True  # False: only the sum of the log-probs
    drop_mass: float = 0.0
    implementation: str | None = None  # of `linear_logprob`; None for rivals


def materialised(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logprobs = F.linear(hidden, weight).log_softmax(dim=1)
    return logprobs.gather(1, target[:, None]).squeeze(1)


def _load_materialised() -> Run:
    return materialised


def _load_compiled() -> Run:
    return torch.compile(materialised, dynamic=False)


def _load_torch_chunked() -> Run:
    options = torch.nn.LinearCrossEntropyOptions()

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)

    return run


def _load_cce(implementation: str) -> Run:
    from cut_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, target, reduction="none", impl=implementation)

    return run


def _load_liger_scaled() -> Run:
    from liger_kernel.ops import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target)

    return run


def _load_liger_fused() -> Run:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -liger_fused_linear_cross_entropy(hidden, weight, target, reduction="none")

    return run


def _load_quack() -> Run:
    from quack.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        chunked_linear_cross_entropy,
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -chunked_linear_cross_entropy(hidden, weight, target, reduction="sum")

    return run


def _load_verl() -> Run:
    from verl.utils.kernel.linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        linear_cross_entropy,
    )

    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, 1.0, "none")[0]

    return run


RIVALS = {
    MATERIALISED: Variant(_load_materialised),
    "torch.compile": Variant(_load_compiled),
    "torch chunked": Variant(_load_torch_chunked),
    "cce": Variant(
        partial(_load_cce, "cce"), "cut_cross_entropy", "cut-cross-entropy", needs_cuda=True
    ),
    "cce torch_compile": Variant(
        partial(_load_cce, "torch_compile"), "cut_cross_entropy", "cut-cross-entropy"
    ),
    # CuTe on Hopper, elsewhere its chunks of 512 rows in PyTorch.
    "liger scaled": Variant(_load_liger_scaled, "liger_kernel", "liger-kernel"),
    "liger fused": Variant(_load_liger_fused, "liger_kernel", "liger-kernel", needs_cuda=True),
    "quack": Variant(_load_quack, "quack", "quack-kernels", needs_cuda=True, is_per_token=False),
    "verl": Variant(_load_verl, "verl", "verl", needs_cuda=True),
}


def own_run(implementation: str, drop_mass: float = 0.0, memory_budget: int = 0) -> Run:
    def run(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_logprob(
            hidden,
            weight,
            target,
            drop_mass=drop_mass,
            memory_budget=memory_budget,
            implementation=implementation,
        )[0]

    return run


def all_variants(device_type: str, drop_masses: Sequence[float]) -> dict[str, Variant]:
    """Name -> variant; PyTorch's materialised logits, the measure of all others, come first."""
    live = live_implementation(device_type)
    own = {}
    for name in dict.fromkeys((live, "reference")):
        own[name] = Variant(lambda name=name: own_run(name), implementation=name)
    if live != "reference":
        # Enough for a copy of any logits: the forward keeps it and the backward recomputes nothing.
        own[f"{live} kept"] = Variant(
            lambda: own_run(live, memory_budget=2**62), implementation=live
        )
    for drop_mass in drop_masses:
        own[f"{live} drop {drop_mass:.1e}"] = Variant(
            lambda drop_mass=drop_mass: own_run(live, drop_mass),
            drop_mass=drop_mass,
            implementation=live,
        )
    return {MATERIALISED: RIVALS[MATERIALISED]} | own | RIVALS


def missing(variant: Variant, device_type: str) -> str | None:
    """Why a variant cannot run here, as far as one can tell without running it."""
    if importlib.util.find_spec(variant.module) is None:
        return f"not installed: pip install {variant.package}"
    if variant.needs_cuda and device_type != "cuda":
        return "needs CUDA"
    if variant is RIVALS["torch chunked"] and "LinearCrossEntropyOptions" not in dir(torch.nn):
        return f"needs torch >= 2.13, this is {torch.__version__}"
    return None
