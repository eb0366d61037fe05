"""What every objective returns."""

from dataclasses import dataclass
from typing import Literal

import torch

# "sequences" or "tokens", counted over the whole optimiser step and all ranks, or a constant
Normalizer = Literal["sequences", "tokens"] | float


@dataclass(frozen=True)
class ObjectiveOutput:
    """A summed loss, what the caller divides it by, and per-sequence diagnostics.

    loss_sum: scalar with the gradient; never a mean, because a micro-batch does not know the count.
    diagnostics: name -> [B], detached; bool for flags, counts and values in float.
    """

    loss_sum: torch.Tensor
    normalizer: Normalizer
    diagnostics: dict[str, torch.Tensor]
