"""Weights that vLLM servers receive over the network, by gloo here, and what breaks in between.

rollout.weight_transfer = nccl runs this very code; on GPUs another library carries the bytes.
"""

import inspect
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tiny_model import tiny_tokenizer
from training_samples import trained, training_rows
from transformers import PreTrainedModel
from vllm_models import assert_exact, largest_error, need_vllm, random_weights, set_weights
from vllm_servers import ServerProcess

from flowrl.rollout import SamplingParams, vllm_client, weight_broadcast
from flowrl.rollout.dispatch import Server, ServerLost
from flowrl.rollout.vllm_client import HALF_LOADED
from flowrl.rollout.vllm_server import VllmServerEngine
from flowrl.rollout.weight_broadcast import HostCopy
from flowrl.settings import RolloutConfig

need_vllm()
pytestmark = pytest.mark.timeout(500)

PROMPTS = [[5, 6, 7, 8, 9, 10, 3], [4], [11, 12, 13], [4, 4]]
PARAMS = SamplingParams(n=4, max_tokens=8)
BOUND = 1e-3  # other kernels err by 1e-5 to 1e-4, other weights by tenths of a nat
OVER_NETWORK = ("rollout.engine=vllm", "rollout.weight_transfer=nccl")
SLOW = ("--worker-extension-cls", "slow_worker.SlowlyPublished")
SLOW += ("--weight-transfer-config", '{"backend": "slow"}')

Served = tuple[Path, PreTrainedModel]


class Receiver(ServerProcess):
    """A server that takes weights over the network, as slowly as a file says."""

    orders: Path

    def begin(self) -> None:
        settings = ("rollout.weight_transfer=nccl", f"rollout.servers=[{self.url}]")
        self.start(*SLOW, settings=settings)

    def order(self, order: str) -> None:
        self.half.unlink(missing_ok=True)
        self.orders.write_text(order)

    @property
    def half(self) -> Path:
        return self.orders.with_suffix(".half")

    def label(self) -> str:
        return json.loads(self.get("/weight_info"))["weight_version"]


@pytest.fixture(scope="module")
def receiver(served_model: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    folder = tmp_path_factory.mktemp("receiver")
    orders = folder / "orders"
    server = Receiver(served_model[0], folder / "server.log", FLOWRL_TEST_LOADING=str(orders))
    server.orders = orders
    server.order("")
    try:
        server.begin()
        server.wait()
        yield server
    finally:
        server.close()


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_broadcast, "BUCKET_BYTES", 100_000)  # 14 for 20 tensors


def make_engine(model: Served, url: str, weight_transfer: str = "nccl") -> VllmServerEngine:
    values = {"servers": [url], "weight_transfer": weight_transfer, "max_num_seqs": 64}
    return VllmServerEngine(
        str(model[0]),
        model[1],
        tiny_tokenizer(),
        RolloutConfig.model_validate({"engine": "vllm", "request_timeout_s": 120.0, **values}),
        max_model_len=256,
    )


def check(engine: VllmServerEngine, model: PreTrainedModel, version: int) -> None:
    """What is sampled is of these weights, to the precision of float32."""
    groups = engine.generate(PROMPTS, PARAMS, seed=version)
    assert {r.weight_version for group in groups for r in group} == {version}
    assert_exact(deepcopy(model).double(), model, PROMPTS, groups, PARAMS)


def test_publications_are_received_whole_and_sampled_from_at_once(
    receiver: Receiver, served_model: Served
) -> None:
    model = served_model[1]
    with closing(make_engine(served_model, receiver.url)) as engine:
        assert isinstance(engine.weights, HostCopy) and len(engine.weights.buckets) > 5
        assert engine.run_folder is None
        check(engine, model, 0)
        for version in (1, 2):
            weights = random_weights(model, seed=version)
            before = engine.generate(PROMPTS, PARAMS, seed=version)
            set_weights(model, weights)
            assert largest_error(model, PROMPTS, before, PARAMS) > 100 * BOUND  # not published yet
            engine.publish(reversed(weights.items()), version)
            assert receiver.label() == engine.label
            check(engine, model, version)
        # Only the embedding changes, which is the head as well.
        weights["model.embed_tokens.weight"].mul_(1.5)
        set_weights(model, weights)
        engine.publish(weights.items(), 3)
        check(engine, model, 3)
    set_weights(model, random_weights(model, seed=4))
    with closing(make_engine(served_model, receiver.url, "disk")) as engine:
        check(engine, model, 0)


def test_wrong_weights_leave_the_server_as_it_was(receiver: Receiver, served_model: Served) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with closing(make_engine(served_model, receiver.url)) as engine:
        before, label = engine.generate(PROMPTS, PARAMS, seed=0), receiver.label()
        weights: dict[str, torch.Tensor] = dict(served_model[1].named_parameters())
        shape = list(weights[name].shape)
        with pytest.raises(ValueError, match=name):
            engine.publish({**weights, name: torch.zeros(3)}.items(), 1)
        copy = engine.weights
        assert isinstance(copy, HostCopy)

        def refusal() -> str:
            with pytest.raises(ServerLost) as error:
                engine._run(lambda client: client.publish(Server(receiver.url)))
            assert receiver.label() == label
            assert json.loads(receiver.get("/is_paused")) == {"is_paused": False}
            return str(error.value)

        # The trainer's copy is half overwritten, so nobody is sent it.
        assert refusal() == "must wait: the trainer's weights are of two publications"
        copy.is_whole = True
        place = next(i for i, bucket in enumerate(copy.buckets) if name in bucket)
        for changed, problem in ((shape[::-1], f"announced {shape[::-1]}"), (None, "absent")):
            bucket = {**copy.buckets[place], name: changed}
            if changed is None:
                del bucket[name]
            copy.buckets[place] = bucket
            expected = f"does not take {engine.label}: weight {name}: announced"
            assert refusal().startswith(expected) and problem in refusal()
        assert engine.generate(PROMPTS, PARAMS, seed=0) == before


@pytest.mark.parametrize("fault", ["damaged", "fail"])
def test_broadcast_that_goes_wrong_is_not_sampled_from_and_is_repaired(
    receiver: Receiver, served_model: Served, fault: str
) -> None:
    model = served_model[1]
    with closing(make_engine(served_model, receiver.url)) as engine:
        weights = random_weights(model, seed=5)
        set_weights(model, weights)
        copy = engine.weights
        assert isinstance(copy, HostCopy)
        if fault == "fail":
            receiver.order("fail")
        copy.fill(weights.items())
        if fault == "damaged":
            copy.data[-1][0] += 1e-3  # after its sum was taken
        engine.servers[0].is_live = False
        with pytest.raises(ServerLost) as error:
            engine._run(lambda client: client.publish(engine.servers[0]))
        problem = "came damaged" if fault == "damaged" else "ordered to fail"
        assert problem in str(error.value)
        assert receiver.label() == HALF_LOADED
        assert json.loads(receiver.get("/is_paused")) == {"is_paused": True}
        receiver.order("")
        weights = random_weights(model, seed=6)  # nothing of the others may be left
        set_weights(model, weights)
        engine.publish(weights.items(), 6)
        check(engine, model, 6)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_server_that_hangs_or_dies_in_a_broadcast_is_left_in_bounded_time_and_repaired(
    receiver: Receiver,
    served_model: Served,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_client, "HEALTH_TIMEOUT_S", 3.0)
    model = served_model[1]
    with closing(make_engine(served_model, receiver.url)) as engine:
        weights = random_weights(model, seed=7)
        set_weights(model, weights)
        receiver.order("slow")

        def strike() -> None:
            while not receiver.half.exists():
                time.sleep(0.01)
            receiver.signal(number)

        striker = threading.Thread(target=strike)
        striker.start()
        engine.settings = engine.settings.model_copy(update={"request_timeout_s": 6.0})
        started_at = time.monotonic()
        with pytest.raises(RuntimeError, match="no rollout server was usable") as error:
            engine.publish(weights.items(), 8)
        assert time.monotonic() - started_at < 40
        assert receiver.url in str(error.value)
        striker.join()
        receiver.order("")
        if number == signal.SIGSTOP:
            receiver.signal(signal.SIGCONT)
        else:
            receiver.begin()
        engine.settings = engine.settings.model_copy(update={"request_timeout_s": 240.0})
        # It comes back in the middle of sampling, and is sent the trainer's copy.
        check(engine, model, 8)
        assert receiver.label() == engine.label


def test_training_run_over_the_network(
    receiver: Receiver, served_model: Served, tmp_path: Path
) -> None:
    changes = (*OVER_NETWORK, f"rollout.servers=[{receiver.url}]", "trainer.val_before_train=false")
    run_dir = tmp_path / "run"
    trained(served_model[0], run_dir, *changes, "trainer.total_training_steps=3")
    rows = training_rows(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["mismatch/logprob_abs_diff_max"] < 1e-4
        assert row["actor/grad_norm"] > 0
    assert receiver.label().endswith("-version-3")


def test_nccl_is_called_as_vllm_declares_it() -> None:
    """The one part that no CPU runs: its names and parameters are there."""
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.device_communicators.pynccl_wrapper import (
        NCCL_UNIQUE_ID_BYTES,
        NCCLLibrary,
        ncclUniqueId,
    )
    from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

    inspect.signature(uid_init_process_group).bind(b"", 0, 2, torch.device("cuda:0"))
    inspect.signature(PyNcclCommunicator.broadcast).bind(None, torch.zeros(1), src=0, stream=None)
    inspect.signature(PyNcclCommunicator.destroy).bind(None)
    inspect.signature(NCCLLibrary.ncclGetUniqueId).bind(None)
    unique_id = ncclUniqueId()
    unique_id.internal[0], unique_id.internal[127] = -1, 7
    assert bytes(unique_id) == b"\xff" + bytes(126) + b"\x07"
    assert len(bytes.fromhex(bytes(unique_id).hex())) == NCCL_UNIQUE_ID_BYTES
