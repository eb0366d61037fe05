"""The policy in one process: trunk, head, partition network and optimiser on one device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.batch import Sample, micro_batches, response_values
from flowrl.interface import MicroBatchResult, Objective, normalizer_count
from flowrl.partition import PartitionNetwork, Pooling, pool_prompt_states
from flowrl.policy.forward import forward_tokens, output_weight, token_logprobs
from flowrl.policy.optimizer import MasterAdamW


@dataclass
class TorchPolicy:
    """A trainable policy; `partition` is None when log Z needs no network."""

    model: PreTrainedModel
    partition: PartitionNetwork | None
    optimizer: MasterAdamW
    temperature: float
    max_tokens: int  # strict cap of a micro-batch
    pooling: Pooling
    detach_z: bool
    drop_mass: float
    memory_budget: int = 0  # bytes that the head may keep of a micro-batch
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def logprobs(
        self, samples: Sequence[Sample], model: PreTrainedModel | None = None
    ) -> list[Tensor]:
        """Response log-probs [|y|] per sample, without gradient; `model` may be the reference."""
        model = self.model if model is None else model
        model.eval()  # dropout would make these the log-probs of no policy
        results: list[Tensor] = [torch.empty(0)] * len(samples)
        for members, batch in micro_batches(samples, self.max_tokens, self.device):
            values = response_values(batch, token_logprobs(model, batch, self.temperature))
            for i, value in zip(members, values, strict=True):
                results[i] = value
        return results

    def accumulate_gradients(
        self, samples: Sequence[Sample], objective: Objective
    ) -> list[MicroBatchResult]:
        """Add the gradient of the objective over one mini-batch, micro-batch by micro-batch.

        Each micro-batch contributes its loss_sum over the count of the whole mini-batch (sequences,
        response tokens or a constant), so the result does not depend on the packing.
        """
        self.model.train()
        results = []
        for _, batch in micro_batches(samples, self.max_tokens, self.device):
            outputs = forward_tokens(
                self.model,
                batch,
                self.temperature,
                with_entropy=True,
                drop_mass=self.drop_mass,
                memory_budget=self.memory_budget,
                weight_grad=self.optimizer.main_grads[output_weight(self.model)],
            )
            log_z = None
            if self.partition is not None:
                log_z = self.partition(
                    pool_prompt_states(outputs.hidden, batch, self.pooling, self.detach_z)
                )
            output = objective(batch, outputs, log_z)
            (output.loss_sum / normalizer_count(output.normalizer, samples)).backward()
            results.append(
                MicroBatchResult(
                    batch=batch,
                    output=output,
                    log_z=None if log_z is None else log_z.detach(),
                    logprobs=outputs.logprobs.detach(),
                    entropy=outputs.entropy.detach(),
                    dropped_mass=outputs.dropped_mass,
                )
            )
        return results

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights a rollout engine samples from, by HF name."""
        for name, parameter in self.model.named_parameters():
            yield name, parameter.detach()
