"""What the workers of a vLLM server need to take weights that a trainer has published.

    vllm serve MODEL --worker-extension-cls flowrl.rollout.vllm_worker.PublishedWeights

vLLM mixes the class into its own worker, and the trainer calls these methods through the server's
/collective_rpc. Arguments and results are JSON: names and shapes travel, never an object. With
--weight-transfer-config '{"backend": "flowrl"}' weights are also received over the network.
"""

# vLLM is an extra.
# pyright: reportMissingImports=false

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload.inplace import reload_weights as vllm_reload_weights

from flowrl.rollout.publication import expected_weights
from flowrl.rollout.published_folder import check_publication, difference, read_publication
from flowrl.rollout.vllm_reload import reload_weights, whole_reload
from flowrl.rollout.weight_broadcast import (
    ENGINE_NAME,
    Group,
    backend_of,
    in_thread,
    join,
    received,
)


class PublishedWeights:
    """Methods of every worker of a server."""

    model_config: Any  # vLLM's worker has these five
    parallel_config: Any
    weight_transfer_engine: Any
    device: Any
    rank: int
    published_shapes: dict[str, list[int]] | None = None

    def describe_published_model(self) -> dict[str, Any]:
        """What a trainer compares with its own model before it sends weights."""
        is_receiver = isinstance(self.weight_transfer_engine, BroadcastEngine)
        return {
            "model": self.model_config.model,
            "architecture": self.model_config.hf_config.architectures[0],
            "shapes": self.expected_shapes(),
            "dtype": str(self.model_config.dtype).removeprefix("torch."),
            "max_model_len": self.model_config.max_model_len,
            "logprobs_mode": self.model_config.logprobs_mode,
            "weight_transfer": backend_of(self.device) if is_receiver else "disk",
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

    def check_announced(self, announcement: dict[str, Any]) -> str:
        """What keeps this worker from receiving these weights, "" if nothing."""
        shapes = {
            name: shape
            for bucket in announcement["buckets"]
            for name, shape in bucket["shapes"].items()
        }
        return difference(shapes, self.expected_shapes(), "announced", "own")


@dataclass
class Meeting(WeightTransferInitInfo):
    """Where and with how many the trainer waits; see weight_broadcast.join."""

    place: str
    size: int
    timeout_s: float


@dataclass
class Announcement(WeightTransferUpdateInfo):
    """What the trainer is about to send; see weight_broadcast.HostCopy.announcement."""

    dtype: str
    buckets: list[dict[str, Any]]


class BroadcastEngine(WeightTransferEngine[Meeting, Announcement]):
    """Receives a publication in vLLM's worker and loads it; a failure leaves mixed weights.

    All of it happens in one `update_weights`, so that one reload sees all weights; what precedes
    and follows it has nothing to do.
    """

    init_info_cls = Meeting
    update_info_cls = Announcement
    supports_draft_weight_update = False
    group: Group | None = None
    timeout_s: float

    def init_transfer_engine(self, init_info: Meeting) -> None:
        self.shutdown()  # of a trainer that is gone, or of a publication that failed
        parallel, device, meeting = self.parallel_config, self.device, init_info
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        joining = in_thread(
            lambda: join(device, meeting.place, rank, meeting.size, meeting.timeout_s)
        )
        self.group, self.timeout_s = joining.result(meeting.timeout_s), meeting.timeout_s

    def start_weight_update(self) -> None:
        pass

    def receive_weights(self, update_info: Announcement) -> None:
        try:
            with whole_reload(self.model, self.model_config):
                vllm_reload_weights(
                    self.vllm_config,
                    self.model,
                    weights_iterator=self.received(update_info),
                    weights_path=None,
                    is_checkpoint_format=True,
                )
        except TimeoutError as error:
            self.shutdown()  # what hangs would keep the GPU
            raise RuntimeError(f"nothing came for {self.timeout_s:g} s") from error

    def received(self, update_info: Announcement) -> Iterator[tuple[str, Tensor]]:
        if self.group is None:
            raise RuntimeError("no trainer has formed a group: init_weight_transfer_engine first")
        dtype, buckets = update_info.dtype, update_info.buckets
        return received(self.group, dtype, buckets, self.device, self.timeout_s)

    def finish_weight_update(self) -> None:
        pass

    def shutdown(self) -> None:
        group, self.group = self.group, None
        if group is not None:
            group.close()


WeightTransferEngineFactory.register_engine(ENGINE_NAME, BroadcastEngine)
