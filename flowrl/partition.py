"""The partition network: log Z(x) from the pooled hidden states of the prompt.

Z-net of FlowRL (arXiv 2509.15207, section 3): mean of the last layer's prompt states -> MLP ->
scalar. Layer by layer as released: [Linear -> GELU (erf) -> LayerNorm -> Dropout] x (n - 1) ->
Linear, PyTorch's default initialisation.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from flowrl.batch import PackedBatch
from flowrl.kernels.segment_mean import segment_mean

Pooling = Literal["all", "without_last"]


class PartitionNetwork(nn.Module):
    """log Z(x): pooled prompt states [B, H] float32 -> [B] float32."""

    def __init__(self, hidden_size: int, num_layers: int = 3, dropout: float = 0.0):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(num_layers - 1):
            layers += [
                nn.Linear(hidden_size, hidden_size),
                nn.GELU(),
                nn.LayerNorm(hidden_size),
                nn.Dropout(dropout),
            ]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden_size, 1))

    def forward(self, pooled: Tensor) -> Tensor:
        return self.layers(pooled).squeeze(-1)


def pooling_mask(batch: PackedBatch, pooling: Pooling) -> Tensor:
    """Which tokens are averaged, [N] bool.

    The paper averages all prompt tokens (`all`); the released code leaves out the last one
    (`without_last`), which is the whole prompt of a one-token prompt: that one pools to zero.
    """
    if pooling == "all":
        return batch.prompt_mask
    mask = batch.prompt_mask.clone()
    mask[batch.last_prompt_token] = False
    return mask


def pool_prompt_states(
    hidden: Tensor, batch: PackedBatch, pooling: Pooling, detach: bool
) -> Tensor:
    """Mean of the prompt's post-norm hidden states: trunk rows [U, H] -> [B, H] float32.

    `detach` stops Z's gradient here; the released code lets it flow into the trunk.
    """
    if detach:
        hidden = hidden.detach()
    return segment_mean(hidden[batch.trunk_rows], batch.cu_seqlens, pooling_mask(batch, pooling))


def build_partition(
    hidden_size: int, num_layers: int, dropout: float, seed: int
) -> PartitionNetwork:
    """Create Z with weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PartitionNetwork(hidden_size, num_layers, dropout)
