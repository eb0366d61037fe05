"""What the workers of a vLLM server need to take weights that a trainer has published.

    vllm serve MODEL --worker-extension-cls flowrl.rollout.vllm_worker.PublishedWeights

vLLM mixes the class into its own worker, and the trainer calls these methods through the server's
/collective_rpc. Arguments and results are JSON: a folder's name travels, never an object.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from flowrl.rollout.publication import expected_weights
from flowrl.rollout.published_folder import check_publication, read_publication
from flowrl.rollout.vllm_reload import reload_weights


class PublishedWeights:
    """Methods of every worker of a server."""

    model_config: Any  # vLLM's worker has these three
    parallel_config: Any
    rank: int
    published_shapes: dict[str, list[int]] | None = None

    def describe_published_model(self) -> dict[str, Any]:
        """What a trainer compares with its own model before it sends weights."""
        return {
            "model": self.model_config.model,
            "architecture": self.model_config.hf_config.architectures[0],
            "shapes": self.expected_shapes(),
            "max_model_len": self.model_config.max_model_len,
            "logprobs_mode": self.model_config.logprobs_mode,
        }

    def expected_shapes(self) -> dict[str, list[int]]:
        """HF names and shapes of the served model's weights."""
        if self.published_shapes is None:  # once, for the model does not change
            expected = expected_weights(
                self.model_config.hf_config, self.model_config.trust_remote_code
            )
            self.published_shapes = {name: list(shape) for name, shape in expected.items()}
        return self.published_shapes

    def check_published(self, folder: str) -> str:
        """What keeps this worker from loading a publication, "" if nothing; changes no weight."""
        num_workers = self.parallel_config.world_size
        part = self.rank % num_workers  # workers share the checksums
        try:
            check_publication(Path(folder), self.expected_shapes(), part, num_workers)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def load_published(self, folder: str) -> None:
        """Load a checked publication; a failure leaves weights that must not be sampled from."""
        reload_weights(self, read_publication(Path(folder)))
