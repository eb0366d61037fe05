"""Weights on their way to a vLLM server without a file: broadcast from the trainer's memory.

A group lives for one publication to one server: the trainer is rank 0, the server's workers are
the others. So a server that dies or hangs spoils no other's group, and there is none to repair.
Between GPUs the bytes travel by NCCL, between CPUs by gloo, and all else is the same. Weights lie
one after the other in buckets, since thousands of small tensors would cost a round each.
"""

# vLLM is an extra; the trainer needs it for NCCL alone.
# pyright: reportMissingImports=false

import math
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor
from torch.distributed import (
    BroadcastOptions,
    ProcessGroupGloo,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from flowrl.rollout.publication import checked

ENGINE_NAME = "flowrl"  # among vLLM's weight transfer engines
BUCKET_BYTES = 256 << 20  # a larger tensor has a bucket for itself

# What a thread hands to the caller that waits for it; the rest would look like a peer that hangs.
WORK_ERRORS = (
    RuntimeError,
    ValueError,
    OSError,
    AssertionError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
)

T = TypeVar("T")
Bucket = dict[str, list[int]]  # shapes by name, in the order of their bytes


# Buckets


def plan_buckets(shapes: Mapping[str, Sequence[int]], itemsize: int) -> list[Bucket]:
    """Spread weights over buckets, in their order."""
    buckets: list[Bucket] = []
    num_free = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * itemsize
        if num_bytes > num_free or not buckets:
            buckets.append({})
            num_free = BUCKET_BYTES
        buckets[-1][name] = list(shape)
        num_free -= num_bytes
    return buckets


def bucket_numel(bucket: Bucket) -> int:
    """Elements of a bucket, with what fills up its last 64-bit word."""
    return -(-sum(map(math.prod, bucket.values())) // 8) * 8


def unpack(flat: Tensor, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """The weights in a bucket's elements, flat: [bucket_numel(bucket)], as views."""
    start = 0
    for name, shape in bucket.items():
        end = start + math.prod(shape)
        yield name, flat[start:end].view(shape)
        start = end


def word_sum(flat: Tensor) -> int:
    """The sum of a bucket's 64-bit words modulo 2^64, which any one changed word changes.

    It runs at the speed of memory on either device: 6 GB/s on one core, where SHA-256 does 0.3.
    """
    return int(flat.view(torch.int64).sum())


class HostCopy:
    """The weights of the last publication in host memory, for servers that come back later.

    Args:
        shapes: names and shapes of the model's weights.
        dtype: what they are cast to.
        device: where they are sent from; pinned memory speeds up the way to a GPU.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shapes, self.dtype, self.device = shapes, dtype, device
        self.buckets = plan_buckets(shapes, dtype.itemsize)
        is_pinned = device.type == "cuda"
        self.data = [
            torch.zeros(bucket_numel(bucket), dtype=dtype, pin_memory=is_pinned)
            for bucket in self.buckets
        ]
        self.sums: list[int] = []
        self.is_whole = False

    def fill(self, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replace all weights, in whatever order they come.

        Raises ValueError for names or shapes that are not the model's. The copy is then of two
        publications, and `is_whole` is false until a later one succeeds.
        """
        self.is_whole = False
        views = {
            name: view
            for flat, bucket in zip(self.data, self.buckets, strict=True)
            for name, view in unpack(flat, bucket)
        }
        for name, weight in checked(named_weights, self.shapes):
            views[name].copy_(weight.detach())
        self.sums = [word_sum(flat) for flat in self.data]
        self.is_whole = True

    def announcement(self) -> dict[str, Any]:
        """What receivers must know, as JSON; the sums travel apart from what they vouch for."""
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "buckets": [
                {"shapes": bucket, "sum": number}
                for bucket, number in zip(self.buckets, self.sums, strict=True)
            ],
        }

    def send(self, group: "Group") -> None:
        """Broadcast all buckets."""
        for flat in self.data:
            group.broadcast(flat)


def received(
    group: "Group",
    dtype: str,
    buckets: Sequence[Mapping[str, Any]],
    device: torch.device,
    timeout_s: float,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the announced weights as rank 0 sends them, each bucket in memory of its own.

    Raises ValueError for a bucket whose sum is not the announced one, before any of it is yielded,
    and TimeoutError when one takes longer than timeout_s.
    """
    for place, bucket in enumerate(buckets):
        shapes = bucket["shapes"]
        flat = torch.empty(bucket_numel(shapes), dtype=getattr(torch, dtype), device=device)
        in_thread(lambda flat=flat: group.broadcast(flat)).result(timeout_s)
        if word_sum(flat) != bucket["sum"]:
            raise ValueError(f"bucket {place} of the weights, from {min(shapes)} on, came damaged")
        yield from unpack(flat, shapes)


# Groups


@dataclass(frozen=True)
class Group:
    """Rank 0 and those that receive from it.

    `broadcast` returns when the bytes of a bucket have left, or have come. It raises RuntimeError
    when a peer is gone, and, by gloo, when one hangs. `close` ends a broadcast that hangs by NCCL.
    """

    broadcast: Callable[[Tensor], None]
    close: Callable[[], None]


def in_thread(work: Callable[[], T]) -> "Future[T]":
    """Run `work` in a thread that its caller can give up; it does not hold up the process's exit.

    NCCL waits for ever for a peer that hangs, when a group forms and in every broadcast.
    """
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # from here on nobody's cancel() changes it

    def run() -> None:
        try:
            future.set_result(work())
        except WORK_ERRORS as error:
            future.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return future


def sending_device() -> torch.device:
    """Where this process sends weights from: its current GPU, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def meeting_place(device: torch.device, url: str) -> tuple[str, socket.socket | None]:
    """Where rank 0 can be met by the server at `url`, and what listens there.

    NCCL's unique id in hex, which NCCL listens for by itself; for gloo `address:port`.
    """
    if device.type == "cuda":
        from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

        return bytes(NCCLLibrary().ncclGetUniqueId()).hex(), None
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, but finds the way
        address = probe.getsockname()[0]
    listener = socket.create_server((address, 0))
    return f"{address}:{listener.getsockname()[1]}", listener


def join(
    device: torch.device,
    place: str,
    rank: int,
    size: int,
    timeout_s: float,
    listener: socket.socket | None = None,
) -> Group:
    """Meet the others at rank 0's meeting place; `listener` is rank 0's own.

    Raises RuntimeError when they do not come, under gloo within timeout_s.
    """
    if device.type == "cuda":
        return _join_nccl(device, place, rank, size)
    return _join_gloo(place, rank, size, timeout_s, listener)


def _join_nccl(device: torch.device, place: str, rank: int, size: int) -> Group:
    # By NCCL's id, and not by vLLM's store, which would have the workers unpickle what it holds.
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    # A stream of its own: a broadcast that hangs holds up nothing else on the GPU.
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        communicator = uid_init_process_group(bytes.fromhex(place), rank, size, device)
    if communicator.disabled:  # its broadcasts would do nothing, without a word
        raise RuntimeError("vLLM uses no NCCL here: unset VLLM_DISABLE_PYNCCL")

    def broadcast(flat: Tensor) -> None:
        if flat.is_cuda:  # earlier users of this memory may still be at work on other streams
            torch.cuda.synchronize(device)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            on_device = flat.to(device, non_blocking=True)
            communicator.broadcast(on_device.view(torch.uint8), src=0, stream=stream)
        stream.synchronize()

    return Group(broadcast, communicator.destroy)


def _join_gloo(
    place: str, rank: int, size: int, timeout_s: float, listener: socket.socket | None
) -> Group:
    host, _, port = place.rpartition(":")
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        host,
        int(port),
        size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    held: list[Any] = [ProcessGroupGloo(store, rank, size, timeout=timeout)]
    from_first = BroadcastOptions()
    from_first.rootRank = 0

    def broadcast(flat: Tensor) -> None:
        held[0].broadcast([flat.view(torch.uint8)], from_first).wait()

    # Nothing but the end of the last reference closes it; what hangs ends by its time limit.
    return Group(broadcast, held.clear)


def load_nccl() -> None:
    """Import vLLM's binding of NCCL. Raises ValueError where vLLM is not installed."""
    from flowrl.rollout.vllm_engine import undisturbed

    with undisturbed():
        try:
            import vllm.distributed.weight_transfer.nccl_common  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"rollout.weight_transfer = nccl needs vLLM on the trainer too ({error}): "
                "pip install 'flowrl[vllm]', or use rollout.weight_transfer=disk"
            ) from error
