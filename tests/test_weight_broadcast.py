"""Weights that are broadcast: in buckets, from a copy in memory, to peers that may die or hang."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from flowrl.rollout import weight_broadcast
from flowrl.rollout.weight_broadcast import (
    Group,
    HostCopy,
    bucket_numel,
    in_thread,
    join,
    meeting_place,
    plan_buckets,
    received,
    unpack,
    word_sum,
)

CPU = torch.device("cpu")
URL = "http://127.0.0.1:9"


def some_weights() -> dict[str, Tensor]:
    shapes = {"a": (3, 5), "b": (7,), "c": (2, 2, 2), "d": (), "e": (40, 9), "f": (1,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def make_copy(weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> HostCopy:
    return HostCopy({name: weight.shape for name, weight in weights.items()}, dtype, CPU)


# Buckets


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (1 << 20, [["a", "b", "c", "d", "e", "f"]]),
        (4 * 22, [["a", "b"], ["c", "d"], ["e"], ["f"]]),  # e alone is larger
        (1, [["a"], ["b"], ["c"], ["d"], ["e"], ["f"]]),
    ],
    ids=["one", "filled", "single"],
)
def test_buckets_hold_every_weight_once_in_order_within_the_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, names: list[list[str]]
) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", limit)
    shapes = {name: weight.shape for name, weight in some_weights().items()}
    buckets = plan_buckets(shapes, itemsize=4)
    assert [list(bucket) for bucket in buckets] == names
    assert {n: s for bucket in buckets for n, s in bucket.items()} == {
        name: list(shape) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [1 << 20, 100], ids=["one bucket", "several"])
def test_copy_holds_the_cast_weights_whatever_their_order(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: int
) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", limit)
    copy = make_copy(some_weights(), dtype)
    for _ in range(2):
        weights = some_weights()
        copy.fill(reversed(weights.items()))
        found = {}
        for flat, bucket in zip(copy.data, copy.announcement()["buckets"], strict=True):
            assert len(flat) == bucket_numel(bucket["shapes"])
            assert flat.nbytes % 8 == 0 and word_sum(flat) == bucket["sum"]
            found.update(unpack(flat, bucket["shapes"]))
        assert list(found) == list(weights)
        assert all(torch.equal(found[name], weights[name].to(dtype)) for name in weights)


def test_wrong_weights_leave_the_copy_unusable_until_right_ones_come() -> None:
    weights = some_weights()
    copy = make_copy(weights)
    assert not copy.is_whole
    copy.fill(weights.items())
    assert copy.is_whole
    for wrong in ({**weights, "x": weights["a"]}, {**weights, "f": torch.zeros(2)}, {}):
        with pytest.raises(ValueError, match="published"):
            copy.fill(wrong.items())
        assert not copy.is_whole
    copy.fill(weights.items())
    assert copy.is_whole


def test_sum_sees_every_flipped_bit() -> None:
    flat = torch.randn(16)
    expected = word_sum(flat)
    for place in range(64 * 8):
        flat.view(torch.uint8)[place // 8] ^= 1 << place % 8
        assert word_sum(flat) != expected
        flat.view(torch.uint8)[place // 8] ^= 1 << place % 8
    assert word_sum(flat) == expected


# Groups


@contextmanager
def group_of(size: int, timeout_s: float = 20.0) -> Iterator[list[Group]]:
    """A group whose ranks are threads of this process."""
    place, listener = meeting_place(CPU, URL)
    assert place.startswith("127.0.0.1:")

    def member(rank: int) -> Future[Group]:
        mine = listener if rank == 0 else None
        return in_thread(lambda: join(CPU, place, rank, size, timeout_s, mine))

    groups = [future.result(timeout_s) for future in [member(rank) for rank in range(size)]]
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


def receive(group: Group, copy: HostCopy) -> "Future[dict[str, Tensor]]":
    values = copy.announcement()
    return in_thread(lambda: dict(received(group, values["dtype"], values["buckets"], CPU, 20.0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_worker_receives_every_bit(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", 100)
    weights = some_weights()
    copy = make_copy(weights, dtype)
    with group_of(3) as (trainer, *workers):
        for _ in range(2):  # a group can be used again
            weights = some_weights()
            copy.fill(weights.items())
            futures = [receive(worker, copy) for worker in workers]
            copy.send(trainer)
            for future in futures:
                found = future.result(20)
                assert list(found) == list(weights)
                assert all(torch.equal(found[name], weights[name].to(dtype)) for name in weights)


def test_damaged_bucket_is_not_yielded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", 100)
    weights = some_weights()
    copy = make_copy(weights)
    copy.fill(weights.items())
    values = copy.announcement()
    copy.data[1][0] += 1e-3  # after its sum was taken
    with group_of(2) as (trainer, worker):
        sending = in_thread(lambda: copy.send(trainer))
        stream = received(worker, values["dtype"], values["buckets"], CPU, 20.0)
        names = []
        with pytest.raises(ValueError, match="bucket 1 of the weights, from c on, came damaged"):
            for name, _ in stream:
                names.append(name)
        assert names == ["a", "b"]
        for flat in copy.data[2:]:
            worker.broadcast(flat.clone())
        sending.result(20)


PEER = """
import os, signal, sys, torch
from flowrl.rollout.weight_broadcast import join
print("ready", flush=True)
group = join(torch.device("cpu"), sys.argv[1], 1, 2, 60.0)
group.broadcast(torch.empty(1 << 20))
os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_peer_that_dies_or_hangs_between_two_buckets_ends_the_broadcast(
    monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", 4 << 20)
    # 128 MiB, more than fits into the sockets.
    weights = {f"w{i}": torch.zeros(1 << 20) for i in range(32)}
    copy = make_copy(weights)
    copy.fill(weights.items())
    place, listener = meeting_place(CPU, URL)
    command = [sys.executable, "-c", PEER, place, number]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as peer:
        try:
            assert peer.stdout is not None and peer.stdout.readline() == b"ready\n"
            group = join(CPU, place, 0, 2, 5.0, listener)
            started_at = time.monotonic()
            with pytest.raises(RuntimeError, match="gloo"):
                copy.send(group)
            assert time.monotonic() - started_at < 15
        finally:
            peer.kill()


def test_nobody_who_comes_ends_the_wait_for_a_group() -> None:
    place, listener = meeting_place(CPU, URL)
    started_at = time.monotonic()
    with pytest.raises(RuntimeError, match="1/2 clients joined"):
        join(CPU, place, 0, 2, 1.0, listener)
    assert time.monotonic() - started_at < 10


def test_thread_gives_results_and_errors_and_never_holds_up_the_exit() -> None:
    assert in_thread(lambda: 3).result(5) == 3
    with pytest.raises(RuntimeError, match="lost"):
        in_thread(lost).result(5)
    is_over = threading.Event()
    hung = in_thread(is_over.wait)
    assert not hung.cancel()  # or its end would be an error
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "weights"]
    assert thread.daemon
    is_over.set()
    assert hung.result(5)


def lost() -> None:
    raise RuntimeError("lost")
