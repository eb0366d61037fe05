"""PPO's critic: the trunk of a language model with a value head, in one process."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flowrl.batch import PackedBatch, Sample, micro_batches, response_values
from flowrl.interface import ValueObjective, normalizer_count
from flowrl.policy.forward import trunk_states
from flowrl.policy.optimizer import MasterAdamW


@dataclass
class TorchCritic:
    """V(s) of the state in which a token is chosen. `model`'s own head is not used."""

    model: PreTrainedModel
    head: nn.Linear  # [1, H] float32
    optimizer: MasterAdamW
    max_tokens: int  # strict cap of a micro-batch
    device: torch.device

    def _values(self, batch: PackedBatch) -> Tensor:
        hidden = trunk_states(self.model, batch)
        response = batch.response_mask.nonzero()[:, 0]  # never 0: a sequence starts with its prompt
        states = hidden[batch.trunk_rows[response - 1]]
        values = self.head(states.to(self.head.weight.dtype))[:, 0]
        return values.new_zeros(len(batch.input_ids)).index_put((response,), values)

    @torch.no_grad()
    def set_values(self, samples: Sequence[Sample]) -> None:
        """Give every sample the values of its tokens, [|y|]."""
        self.model.eval()
        for members, batch in micro_batches(samples, self.max_tokens, self.device):
            values = response_values(batch, self._values(batch))
            for i, value in zip(members, values, strict=True):
                samples[i].values = value

    def accumulate_gradients(self, samples: Sequence[Sample], objective: ValueObjective) -> float:
        """Add the gradient of the objective over one mini-batch and return its loss."""
        self.model.train()
        total = 0.0
        for _, batch in micro_batches(samples, self.max_tokens, self.device):
            output = objective(batch, self._values(batch))
            loss = output.loss_sum / normalizer_count(output.normalizer, samples)
            loss.backward()
            total += float(loss.detach())
        return total


def build_value_head(hidden_size: int, seed: int) -> nn.Linear:
    """A value head whose weights depend on `seed` alone: small, so that values start near 0."""
    head = nn.Linear(hidden_size, 1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head.weight.normal_(0, 1 / (hidden_size + 1))
        head.bias.zero_()
    return head
