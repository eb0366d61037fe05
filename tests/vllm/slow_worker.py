"""vLLM's worker with a load that can be caught in the middle; vLLM imports it in the server.

The file that FLOWRL_TEST_LOADING names says what the next load does: nothing special, `slow` (half
a second after each of the later tensors) or `fail` (half-way). Half-way, a load touches the file
with the suffix .half.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory

from flowrl.rollout.published_folder import read_publication
from flowrl.rollout.vllm_reload import reload_weights
from flowrl.rollout.vllm_worker import Announcement, BroadcastEngine, PublishedWeights

HALF = 10  # of 20 tensors


class SlowlyPublished(PublishedWeights):
    def load_published(self, folder: str) -> None:
        reload_weights(self, hindered(read_publication(Path(folder))))


class SlowlyReceived(BroadcastEngine):
    def received(self, update_info: Announcement) -> Iterator[tuple[str, Tensor]]:
        return hindered(super().received(update_info))


WeightTransferEngineFactory.register_engine("slow", SlowlyReceived)


def hindered(weights: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    orders = Path(os.environ["FLOWRL_TEST_LOADING"])
    order = orders.read_text()
    for place, pair in enumerate(weights):
        if place == HALF:
            orders.with_suffix(".half").touch()
        if place >= HALF and order == "fail":
            raise RuntimeError("ordered to fail")
        if place >= HALF and order == "slow":
            time.sleep(0.5)
        yield pair
