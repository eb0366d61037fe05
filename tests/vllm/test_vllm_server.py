"""vLLM servers as the rollout engine: what they sample, and which weights they do it with."""

import asyncio
import json
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from pathlib import Path

import psutil
import pytest
import torch
from tiny_model import tiny_tokenizer
from training_samples import trained, training_rows
from transformers import PreTrainedModel
from vllm_models import (
    assert_exact,
    largest_error,
    need_vllm,
    random_weights,
    set_weights,
    write_model,
)
from vllm_servers import ServerProcess

from flowrl.policy.pretrained import load_model
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.dispatch import Server, ServerLost
from flowrl.rollout.published_folder import MANIFEST_FILE, WEIGHTS_FILE
from flowrl.rollout.transformers import TransformersEngine
from flowrl.rollout.vllm_server import VllmServerEngine
from flowrl.settings import RolloutConfig

need_vllm()
pytestmark = pytest.mark.timeout(400)

EOS = 2
PROMPTS = [[5, 6, 7, 8, 9, 10, 3], [4], [11, 12, 13], [4, 4]]
BOUND = 1e-3  # other kernels err by 1e-5 to 1e-4, other weights or prompts by tenths of a nat

Served = tuple[Path, PreTrainedModel]


def make_engine(model: Served, *urls: str, **settings: object) -> VllmServerEngine:
    values = {"servers": urls, "max_num_seqs": 64, "request_timeout_s": 240.0, **settings}
    return VllmServerEngine(
        str(model[0]),
        model[1],
        tiny_tokenizer(),
        RolloutConfig.model_validate({"engine": "vllm", **values}),
        max_model_len=256,
    )


@pytest.fixture(scope="module")
def engine(served_model: Served, shared_server: ServerProcess) -> Iterator[VllmServerEngine]:
    with closing(make_engine(served_model, shared_server.url)) as engine:
        yield engine


@pytest.fixture(autouse=True)
def first_weights(engine: VllmServerEngine, served_model: Served) -> Iterator[None]:
    """Every test starts from the served model's weights, at some version."""
    yield
    weights = random_weights(served_model[1], seed=0)
    set_weights(served_model[1], weights)
    engine.publish(weights.items(), engine.weight_version + 1)


def label_of(server: ServerProcess) -> str:
    return json.loads(server.get("/weight_info"))["weight_version"]


# What is sampled


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(n=4, max_tokens=12),
        SamplingParams(n=4, temperature=0.6, max_tokens=12),
        SamplingParams(n=4, temperature=1.7, top_k=5, max_tokens=12),
        SamplingParams(n=4, top_p=0.8, max_tokens=12),
        SamplingParams(temperature=0.0, max_tokens=12),
    ],
    ids=["plain", "cold", "top_k", "top_p", "greedy"],
)
def test_logprobs_are_those_of_the_distribution_sampled_from(
    engine: VllmServerEngine, served_model: Served, params: SamplingParams
) -> None:
    groups = engine.generate(PROMPTS, params, seed=3)
    assert [len(group) for group in groups] == [params.n] * len(PROMPTS)
    exact = deepcopy(served_model[1]).double()
    assert_exact(exact, served_model[1], PROMPTS, groups, params)
    for group in groups:
        for r in group:
            assert r.weight_version == engine.weight_version
            assert EOS not in r.token_ids[:-1] and len(r.logprobs) == len(r.token_ids)
            assert (r.token_ids[-1] == EOS) == (r.finish_reason == "stop")
            assert r.finish_reason == "stop" or len(r.token_ids) == 12


def test_greedy_and_stop_strings_are_the_transformers_engines(
    engine: VllmServerEngine, served_model: Served
) -> None:
    model = load_model(str(served_model[0]), torch.float32, torch.device("cpu"))
    other = TransformersEngine(model, tiny_tokenizer())
    words = tiny_tokenizer().convert_ids_to_tokens(list(range(3, 16)))
    for stop in ((), tuple(words[:2]), ("".join(words[4:6]),)):
        params = SamplingParams(temperature=0.0, max_tokens=20, stop=stop)
        for (one,), (two,) in zip(
            engine.generate(PROMPTS, params, 0), other.generate(PROMPTS, params, 0), strict=True
        ):
            assert (one.token_ids, one.finish_reason) == (two.token_ids, two.finish_reason)
            assert one.logprobs == pytest.approx(two.logprobs, abs=BOUND)


def test_stop_strings_end_a_response_and_stay_in_it(engine: VllmServerEngine) -> None:
    stop = ("1", "5")
    params = SamplingParams(n=16, max_tokens=10, stop=stop)
    endings = set()
    for group in engine.generate(PROMPTS, params, seed=0):
        for r in group:
            words = tiny_tokenizer().convert_ids_to_tokens(r.token_ids)
            assert not set(words[:-1]) & set(stop)
            is_stopped = words[-1] in stop or r.token_ids[-1] == EOS
            assert r.finish_reason == ("stop" if is_stopped else "length")
            endings.add(words[-1])
    assert {"1", "5"} <= endings


def test_seed_decides_whatever_is_sampled_together(
    engine: VllmServerEngine, served_model: Served, shared_server: ServerProcess
) -> None:
    params = SamplingParams(n=3, max_tokens=10)
    first = token_ids(engine.generate(PROMPTS, params, seed=1))
    assert token_ids(engine.generate(PROMPTS, params, seed=1)) == first
    assert token_ids(engine.generate(PROMPTS, params, seed=2)) != first
    assert len({tuple(ids) for ids in first[0]}) > 1
    with closing(make_engine(served_model, shared_server.url, max_num_seqs=3)) as one_at_a_time:
        assert token_ids(one_at_a_time.generate(PROMPTS, params, seed=1)) == first


def token_ids(groups: list[list[Response]]) -> list[list[list[int]]]:
    return [[r.token_ids for r in group] for group in groups]


def test_what_is_begun_goes_on_aside_and_is_what_generate_returns(engine: VllmServerEngine) -> None:
    params = SamplingParams(n=2, max_tokens=120)
    expected = token_ids(engine.generate(PROMPTS, params, seed=3))
    started_at = time.monotonic()
    wait = engine.begin(PROMPTS, params, seed=3)
    begun_s = time.monotonic() - started_at
    assert token_ids(wait()) == expected
    assert begun_s < 0.25 * (time.monotonic() - started_at)
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        engine.begin([[]], params, seed=3)
    assert token_ids(engine.generate(PROMPTS, params, seed=3)) == expected


def test_a_run_that_ends_gives_up_what_it_has_begun(
    served_model: Served, shared_server: ServerProcess
) -> None:
    engine = make_engine(served_model, shared_server.url)
    wait = engine.begin([PROMPTS[0]] * 64, SamplingParams(n=4, max_tokens=240), seed=0)
    started_at = time.monotonic()
    engine.close()
    assert time.monotonic() - started_at < 2
    with pytest.raises(asyncio.CancelledError):
        wait()


def test_a_run_trains_while_its_server_samples(
    served_model: Served, shared_server: ServerProcess, tmp_path: Path
) -> None:
    changes = (
        "rollout.engine=vllm",
        f"rollout.servers=[{shared_server.url}]",
        "rollout.max_staleness=7",
        "flow.old_logprobs=rollout",
        "trainer.total_training_steps=5",
        "trainer.val_before_train=false",
    )
    trained(served_model[0], tmp_path / "run", *changes)
    rows = training_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    staleness = [row["rollout/staleness_max"] for row in rows]
    assert staleness[0] == 0 and all(0 < s <= i for i, s in enumerate(staleness) if i)
    # The first step's tokens are of the weights that it trains; later ones moved under theirs.
    differences = [row["mismatch/logprob_abs_diff_max"] for row in rows]
    assert differences[0] < BOUND < max(differences)


def test_prompts_that_do_not_fit_are_refused(engine: VllmServerEngine) -> None:
    assert engine.generate([], SamplingParams(), seed=0) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        engine.generate([[3], []], SamplingParams(max_tokens=3), seed=0)
    with pytest.raises(ValueError, match="max_model_len = 256"):
        engine.generate([[3] * 200], SamplingParams(max_tokens=100), seed=0)
    with pytest.raises(ValueError, match=r"127.0.0.1:\d+ refuses a prompt: .*vocabulary"):
        engine.generate([[3], [16]], SamplingParams(max_tokens=3), seed=0)


# Whose weights


def test_publication_is_sampled_from_at_once_and_replaces_its_folder(
    engine: VllmServerEngine, served_model: Served, shared_server: ServerProcess
) -> None:
    model = served_model[1]
    params = SamplingParams(n=4, max_tokens=8)
    before = engine.generate(PROMPTS, params, seed=0)
    for version in (101, 102):
        weights = random_weights(model, seed=version)
        engine.publish(reversed(weights.items()), version)
        set_weights(model, weights)
        groups = engine.generate(PROMPTS, params, seed=0)
        assert {r.weight_version for group in groups for r in group} == {version}
        assert largest_error(model, PROMPTS, groups, params) < BOUND
        assert token_ids(groups) != token_ids(before)
        assert label_of(shared_server).endswith(f"-version-{version}")
        assert engine.run_folder is not None
        assert [path.name for path in engine.run_folder.iterdir()] == [label_of(shared_server)]


def test_tied_head_of_a_cpu_is_packed_anew(engine: VllmServerEngine, served_model: Served) -> None:
    """Only the embedding changes, which is the head as well."""
    model = served_model[1]
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights["model.embed_tokens.weight"].mul_(1.5)
    engine.publish(weights.items(), 103)
    set_weights(model, weights)
    params = SamplingParams(n=2, max_tokens=4)
    groups = engine.generate(PROMPTS, params, seed=0)
    assert_exact(deepcopy(model).double(), model, PROMPTS, groups, params)


@pytest.mark.parametrize("fault", ["byte", "shape", "name", "half a file", "no folder"])
def test_damaged_publication_leaves_the_server_as_it_was(
    engine: VllmServerEngine, served_model: Served, shared_server: ServerProcess, fault: str
) -> None:
    label, params = label_of(shared_server), SamplingParams(n=2, max_tokens=6)
    before = engine.generate(PROMPTS, params, seed=0)
    assert isinstance(engine.weights, Path)
    weights, manifest = engine.weights / WEIGHTS_FILE, engine.weights / MANIFEST_FILE
    whole = weights.read_bytes(), manifest.read_text()
    name = "model.layers.1.mlp.up_proj.weight"
    shape = list(dict(served_model[1].named_parameters())[name].shape)
    if fault == "byte":
        weights.write_bytes(whole[0][:-100] + bytes([whole[0][-100] ^ 1]) + whole[0][-99:])
    elif fault == "half a file":
        weights.write_bytes(whole[0][: len(whole[0]) // 2])
    elif fault == "no folder":
        weights.unlink()
        manifest.unlink()
    else:
        values = json.loads(whole[1])
        entry = values["weights"].pop(name)
        if fault == "shape":
            values["weights"][name] = {**entry, "shape": shape[::-1]}
        manifest.write_text(json.dumps(values))
    with pytest.raises(ServerLost) as error:
        engine._run(lambda client: client.publish(Server(shared_server.url)))
    weights.write_bytes(whole[0])
    manifest.write_text(whole[1])
    problem = str(error.value)
    expected = {
        "byte": "another checksum",
        "shape": f"weight {name}: published {shape[::-1]}, own {shape}",
        "name": f"weight {name}: published absent, own {shape}",
        "half a file": "SafetensorError",
        "no folder": "FileNotFoundError",
    }
    assert problem.startswith(f"does not take {engine.weights}: ") and expected[fault] in problem
    assert label_of(shared_server) == label
    assert engine.generate(PROMPTS, params, seed=0) == before


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_weights_of_another_model_are_refused_before_any_server_hears_of_them(
    engine: VllmServerEngine, served_model: Served, shared_server: ServerProcess, fault: str
) -> None:
    assert engine.run_folder is not None
    label, folders = label_of(shared_server), list(engine.run_folder.iterdir())
    weights: dict[str, torch.Tensor] = dict(served_model[1].named_parameters())
    last = list(weights)[-1]
    if fault == "unknown":
        weights["nobody"] = torch.zeros(1)
    elif fault == "missing":
        del weights[last]
    else:
        weights[last] = torch.zeros(3)
    with pytest.raises(ValueError, match="nobody" if fault == "unknown" else last):
        engine.publish(weights.items(), 9)
    assert label_of(shared_server) == label and list(engine.run_folder.iterdir()) == folders
    assert engine.generate([[5]], SamplingParams(max_tokens=2), seed=0)


def test_two_runs_on_one_server_never_take_each_others_responses(
    engine: VllmServerEngine, served_model: Served, shared_server: ServerProcess
) -> None:
    model, params = served_model[1], SamplingParams(n=2, max_tokens=6)
    first = engine.generate(PROMPTS, params, seed=0)
    with closing(make_engine(served_model, shared_server.url)) as other:
        weights = random_weights(model, seed=5)
        other.publish(weights.items(), engine.weight_version)  # the same version, other weights
        assert engine.generate(PROMPTS, params, seed=0) == first
        set_weights(model, weights)
        groups = other.generate(PROMPTS, params, seed=0)
        assert largest_error(model, PROMPTS, groups, params) < BOUND


@pytest.mark.parametrize("kind", ["vocabulary", "architecture", "names"])
def test_server_with_another_model_is_refused_with_both_named(
    shared_server: ServerProcess, served_model: Served, tmp_path: Path, kind: str
) -> None:
    model = {
        "vocabulary": lambda: write_model(tmp_path, vocab_size=32),
        "architecture": lambda: write_model(tmp_path, "qwen2"),
        "names": lambda: write_model(tmp_path, tied=False),
    }[kind]()
    width = model.config.hidden_size
    parts = {
        "vocabulary": [f"[16, {width}], the trained model [32, {width}]"],
        "architecture": ["a LlamaForCausalLM, not a Qwen2ForCausalLM"],
        "names": ["weight lm_head.weight", f"absent, the trained model [16, {width}]"],
    }
    with pytest.raises(ValueError) as error:
        make_engine((tmp_path, model), shared_server.url)
    for part in [shared_server.url, str(served_model[0]), *parts[kind]]:
        assert part in str(error.value)


# Many at once


@contextmanager
def slow_line(port: int) -> Iterator[int]:
    """A port that leads to another one and lets 2 kB through every 20 ms, per connection."""
    ports: queue.Queue[int] = queue.Queue()
    loop = asyncio.new_event_loop()
    is_over = asyncio.Event()

    async def copy(reader, writer, delay_s: float) -> None:
        while part := await reader.read(2048):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(delay_s)
        writer.close()

    async def connect(reader, writer) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        ways = copy(reader, far_writer, 0), copy(far_reader, writer, 0.02)
        await asyncio.gather(*ways, return_exceptions=True)

    async def listen() -> None:
        listener = await asyncio.start_server(connect, "127.0.0.1", 0, limit=4096, backlog=1024)
        ports.put(listener.sockets[0].getsockname()[1])
        await is_over.wait()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # cancels what is left
            runner.run(listen())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ports.get(timeout=10)
    finally:
        loop.call_soon_threadsafe(is_over.set)
        thread.join()


def test_512_requests_at_once_are_all_answered_in_order_over_a_slow_line(
    served_model: Served, shared_server: ServerProcess
) -> None:
    prompts = [[3 + place % 13, 3 + place // 13 % 13, 3 + place // 169] for place in range(512)]
    params = SamplingParams(max_tokens=40, temperature=1.0)
    assert shared_server.process is not None
    server = psutil.Process(shared_server.process.pid)
    with (
        slow_line(shared_server.port) as port,
        closing(make_engine(served_model, f"http://127.0.0.1:{port}", max_num_seqs=256)) as engine,
    ):
        engine.generate(prompts[:8], params, seed=0)
        before = [psutil.Process().memory_info().rss, server.memory_info().rss]
        groups = engine.generate(prompts, params, seed=7)
        after = [psutil.Process().memory_info().rss, server.memory_info().rss]
    assert len(groups) == 512 and all(len(group) == 1 for group in groups)
    # A response in the wrong place would have log-probs given another prompt.
    assert largest_error(served_model[1], prompts, groups, params) < BOUND
    growth = [(b - a) / 2**20 for a, b in zip(before, after, strict=True)]
    print(f"MiB more: trainer {growth[0]:.0f}, server {growth[1]:.0f}")
    assert max(growth) < 100
