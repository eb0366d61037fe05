"""Servers that are killed, stopped or half-way loaded while a run uses them."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny_model import tiny_tokenizer
from training_samples import trained, training_rows
from transformers import PreTrainedModel
from vllm_models import largest_error, need_vllm, random_weights, set_weights
from vllm_servers import ServerProcess, free_port

from flowrl.rollout import SamplingParams, vllm_client
from flowrl.rollout.vllm_client import HALF_LOADED
from flowrl.rollout.vllm_server import VllmServerEngine
from flowrl.settings import RolloutConfig

need_vllm()
pytestmark = pytest.mark.timeout(500)

PROMPTS = [[3 + place % 13, 3 + place // 13] for place in range(32)]
LONG = SamplingParams(n=2, max_tokens=200)  # seconds, when nothing ends a response
SHORT = SamplingParams(n=2, max_tokens=16)
BOUND = 1e-3  # other kernels err by 1e-5 to 1e-4, other weights by tenths of a nat

Served = tuple[Path, PreTrainedModel]


@dataclass
class Victim:
    """A server to maltreat."""

    server: ServerProcess
    orders: Path  # to its next load

    @property
    def half(self) -> Path:
        return self.orders.with_suffix(".half")

    def start(self) -> None:
        self.server.start("--worker-extension-cls", "slow_worker.SlowlyPublished")


@pytest.fixture(scope="module")
def victim(served_model: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("victim")
    orders = folder / "orders"
    orders.write_text("")
    server = ServerProcess(served_model[0], folder / "server.log", FLOWRL_TEST_LOADING=str(orders))
    victim = Victim(server, orders)
    try:
        victim.start()
        server.wait()
        yield victim
    finally:
        server.close()


def make_engine(model: Served, *urls: str, request_timeout_s: float = 240.0) -> VllmServerEngine:
    """An engine whose responses never end by themselves."""
    values = {"servers": urls, "max_num_seqs": 64, "request_timeout_s": request_timeout_s}
    engine = VllmServerEngine(
        str(model[0]),
        model[1],
        tiny_tokenizer(),
        RolloutConfig.model_validate({"engine": "vllm", **values}),
        max_model_len=256,
    )
    engine.end_ids = []
    return engine


def started(function: Callable, *arguments: object) -> Future:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def wait_until(is_true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def label_of(server: ServerProcess) -> str:
    return json.loads(server.get("/weight_info"))["weight_version"]


def generate_whole(
    model: PreTrainedModel, engine: VllmServerEngine, params: SamplingParams, seed: int
) -> list[list[list[int]]]:
    """Token ids, after a look at each response: in its place, of the last published weights."""
    groups = engine.generate(PROMPTS, params, seed)
    assert [len(group) for group in groups] == [params.n] * len(PROMPTS)
    assert {len(r.token_ids) for group in groups for r in group} == {params.max_tokens}
    assert {r.weight_version for group in groups for r in group} == {engine.weight_version}
    assert largest_error(model, PROMPTS, groups, params) < BOUND
    return [[r.token_ids for r in group] for group in groups]


def generate_until_live(engine: VllmServerEngine, place: int) -> None:
    wait_until(
        lambda: (
            bool(engine.generate([[3]], SamplingParams(max_tokens=8), 0))
            and engine.servers[place].is_live
        ),
        120,
    )


def test_server_killed_in_a_request_and_started_again_gives_the_same_responses(
    victim: Victim, served_model: Served
) -> None:
    model = served_model[1]
    with closing(make_engine(served_model, victim.server.url)) as engine:
        set_weights(model, random_weights(model, seed=1))  # not those that it starts with
        engine.publish(model.named_parameters(), 1)
        expected = generate_whole(model, engine, LONG, 5)
        future = started(generate_whole, model, engine, LONG, 5)
        wait_until(lambda: engine.servers[0].num_outstanding > 0, 60)
        time.sleep(0.3)  # into the decoding
        victim.server.signal(signal.SIGKILL)
        victim.start()
        assert future.result(timeout=300) == expected


def test_server_that_hangs_in_a_request_is_left_out_until_it_answers_again(
    victim: Victim,
    shared_server: ServerProcess,
    served_model: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_client, "WATCH_EVERY_S", 0.5)
    monkeypatch.setattr(vllm_client, "HEALTH_TIMEOUT_S", 5.0)
    model = served_model[1]
    with closing(make_engine(served_model, shared_server.url, victim.server.url)) as engine:
        future = started(generate_whole, model, engine, LONG, 6)
        wait_until(lambda: engine.servers[1].num_outstanding > 0, 60)
        time.sleep(0.3)
        victim.server.signal(signal.SIGSTOP)
        started_at = time.monotonic()
        try:
            future.result(timeout=120)
            assert time.monotonic() - started_at < 60
            assert not engine.servers[1].is_live
            assert engine.servers[1].problem == "/health did not answer within 5 s"
            # Weights that it misses while it hangs; then it wakes up with the older ones.
            weights = random_weights(model, seed=2)
            set_weights(model, weights)
            engine.publish(weights.items(), 2)
        finally:
            victim.server.signal(signal.SIGCONT)
        generate_whole(model, engine, SHORT, 7)
        generate_until_live(engine, 1)
        assert label_of(victim.server) == label_of(shared_server) == engine.label
        generate_whole(model, engine, SHORT, 8)


def test_load_that_fails_half_way_is_never_sampled_from_and_is_repaired(
    victim: Victim, shared_server: ServerProcess, served_model: Served
) -> None:
    model = served_model[1]
    with closing(make_engine(served_model, shared_server.url, victim.server.url)) as engine:
        victim.orders.write_text("fail")
        weights = random_weights(model, seed=3)
        set_weights(model, weights)
        engine.publish(weights.items(), 3)
        assert [server.is_live for server in engine.servers] == [True, False]
        assert "ordered to fail" in engine.servers[1].problem
        assert label_of(victim.server) == HALF_LOADED
        assert json.loads(victim.server.get("/is_paused")) == {"is_paused": True}
        generate_whole(model, engine, SHORT, 0)
        assert label_of(victim.server) == HALF_LOADED
        victim.orders.write_text("")
        generate_until_live(engine, 1)
        del engine.servers[0]
        generate_whole(model, engine, SHORT, 0)


def test_training_goes_on_when_a_server_is_killed_in_a_publication(
    victim: Victim, shared_server: ServerProcess, served_model: Served, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    victim.half.unlink(missing_ok=True)

    def kill_half_way() -> None:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists(), 120)
        wait_until(lambda: len(training_rows(run_dir)) >= 1, 120)
        victim.half.unlink(missing_ok=True)
        victim.orders.write_text("slow")
        wait_until(victim.half.exists, 120)
        victim.server.signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_half_way)
    killer.start()
    urls = f"[{shared_server.url},{victim.server.url}]"
    changes = ("rollout.engine=vllm", f"rollout.servers={urls}", "trainer.total_training_steps=6")
    run = trained(served_model[0], run_dir, *changes, "trainer.val_before_train=false")
    killer.join()
    assert victim.server.process is not None and victim.server.process.poll() is not None
    rows = training_rows(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["mismatch/logprob_abs_diff_max"] < BOUND for row in rows)
    engine = run.engine
    assert isinstance(engine, VllmServerEngine)
    assert [server.is_live for server in engine.servers] == [True, False]
    assert label_of(shared_server).endswith("-version-6")
    assert engine.run_folder is not None and not engine.run_folder.exists()


def test_run_without_any_server_stops_naming_each_in_bounded_time(
    shared_server: ServerProcess, served_model: Served
) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    for urls in ([closed], [shared_server.url, closed]):  # at the start all of them must answer
        started_at = time.monotonic()
        with pytest.raises(RuntimeError, match=f"{closed} did not answer within 3 s: .*connect to"):
            make_engine(served_model, *urls, request_timeout_s=3.0)
        assert time.monotonic() - started_at < 30
    with closing(make_engine(served_model, shared_server.url, request_timeout_s=5.0)) as engine:
        engine.servers[0].url = closed  # as when it has died
        started_at = time.monotonic()
        with pytest.raises(RuntimeError, match=f"{closed}: /.*connect to"):
            engine.generate(PROMPTS, LONG, 0)
        with pytest.raises(RuntimeError, match=f"{closed}: /.*connect to"):
            engine.publish(served_model[1].named_parameters(), 1)
        assert time.monotonic() - started_at < 30
