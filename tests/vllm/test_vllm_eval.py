"""`flowrl eval` with vLLM servers: whose weights they sample from, and what their death leaves."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_model import tiny_tokenizer
from training_samples import cli, refused
from transformers import PreTrainedModel
from vllm_models import largest_error, need_vllm, random_weights, set_weights, write_model
from vllm_servers import ServerProcess

from flowrl.evaluation.engine import Servers, build_engine, fingerprint
from flowrl.evaluation.generations import (
    Generation,
    generate,
    plan_batches,
    read_generations,
)
from flowrl.evaluation.settings import EvalSettings
from flowrl.evaluation.tasks import load_task
from flowrl.rollout import SamplingParams
from flowrl.rollout.vllm_server import VllmServerEngine

need_vllm()
pytestmark = pytest.mark.timeout(500)

NUM_TOKENS = 200  # of every response, when nothing ends one: seconds
BOUND = 1e-3  # other kernels err by 1e-5 to 1e-4 a token, other weights by tenths of a nat

Model = tuple[Path, PreTrainedModel]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of the servers' form with weights that they do not have."""
    folder = tmp_path_factory.mktemp("evaluated") / "model"
    model = write_model(folder)
    set_weights(model, random_weights(model, seed=5))
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def victim(
    served_model: Model, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    server = ServerProcess(served_model[0], tmp_path_factory.mktemp("victim") / "server.log")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.close()


def evaluation(folder: Path, output: Path, *options: str | Path) -> dict:
    """The generations of `flowrl eval` on the held-out sums, by their keys."""
    common = ("--tasks", "sums", "--n", "4", "--greedy", "--max-tokens", "12")
    small = ("--max-num-seqs", "8", "--dtype", "float32", "--device", "cpu", "--num-workers", "1")
    code, _, err = cli("eval", folder, *common, *small, *options, "--output", output)
    assert code == 0, err
    return {g.key: g for g in read_generations(output / "generations.jsonl")}


def test_servers_generate_with_the_evaluated_model(
    evaluated: Model, served_model: Model, shared_server: ServerProcess, tmp_path: Path
) -> None:
    own = evaluation(evaluated[0], tmp_path / "own")
    others = evaluation(served_model[0], tmp_path / "others")
    urls = ("--engine", "vllm", "--servers", shared_server.url)
    weight_dir = tmp_path / "weights"
    found = evaluation(evaluated[0], tmp_path / "out", *urls, "--weight-dir", weight_dir)
    assert found.keys() == own.keys() and list(weight_dir.iterdir()) == []
    greedy = [key for key in own if key[2] == "greedy"]
    assert len(greedy) == 4
    for key in greedy:
        one, two = own[key], found[key]
        assert (one.response, one.num_tokens, one.finish_reason) == (
            *(two.response, two.num_tokens, two.finish_reason),
        )
        assert one.logprob_sum == pytest.approx(two.logprob_sum, abs=BOUND * one.num_tokens)
    assert [own[key].response for key in greedy] != [others[key].response for key in greedy]
    # A second evaluation with the same servers takes its own weights there.
    again = evaluation(served_model[0], tmp_path / "again", *urls)
    assert [again[key].response for key in greedy] == [others[key].response for key in greedy]


def settings_of(model: Model) -> EvalSettings:
    return EvalSettings(
        model=str(model[0]),
        fingerprint=fingerprint(model[0]),
        tasks=("sums",),
        data=None,
        n=16,
        temperature=1.0,
        top_p=1.0,
        max_tokens=NUM_TOKENS,
        seed=0,
        greedy=False,
        limit=None,
        template=None,
        chat_template=False,
        engine="vllm",
        dtype="float32",
        max_num_seqs=32,
    )


def endless_engine(model: Model, servers: Servers) -> VllmServerEngine:
    """The engine of an evaluation, but nothing ends its responses."""
    engine = build_engine(settings_of(model), model[0], tiny_tokenizer(), "cpu", 256, servers)
    assert isinstance(engine, VllmServerEngine)
    engine.end_ids = []
    return engine


def generations(
    model: Model, path: Path, build: Callable[[], VllmServerEngine]
) -> list[Generation]:
    """Generate what the file lacks; all of it, without log-probs, which depend on the batch."""
    settings = settings_of(model)
    batches = plan_batches([load_task("sums", settings)], settings)
    assert [(len(batch.prompts), batch.params.n) for batch in batches] == [(2, 16), (2, 16)]
    generate(path, batches, lambda _: build(), tiny_tokenizer(), settings, 256)
    return bare(read_generations(path))


def bare(generations: list[Generation]) -> list[Generation]:
    return [replace(g, logprob_sum=0.0) for g in generations]


def test_both_sampling_and_greedy_logprobs_are_the_models(
    evaluated: Model, shared_server: ServerProcess
) -> None:
    prompts = [[5, 6, 14], [4, 14], [11, 12, 13, 14]]
    settings, servers = settings_of(evaluated), Servers((shared_server.url,))
    with closing(
        build_engine(settings, evaluated[0], tiny_tokenizer(), "cpu", 256, servers)
    ) as engine:
        for params in (
            SamplingParams(n=8, temperature=0.6, top_p=0.95, max_tokens=12),
            SamplingParams(temperature=0.0, max_tokens=12),
        ):
            groups = engine.generate(prompts, params, seed=3)
            assert [len(group) for group in groups] == [params.n] * 3
            assert largest_error(evaluated[1], prompts, groups, params) < BOUND


@pytest.fixture(scope="module")
def whole(
    evaluated: Model, shared_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory
) -> list[Generation]:
    """What an evaluation gives that nothing disturbs."""
    path, servers = tmp_path_factory.mktemp("whole") / "file", Servers((shared_server.url,))
    made = generations(evaluated, path, lambda: endless_engine(evaluated, servers))
    assert len(made) == 64 and {g.num_tokens for g in made} == {NUM_TOKENS}
    return made


def generations_with_a_kill(
    model: Model, path: Path, servers: Servers, victim: ServerProcess
) -> Future[list[Generation]]:
    """Generate; kill the victim in the second batch, when the first one is on file."""
    place = servers.urls.index(victim.url)
    with ThreadPoolExecutor(1) as pool, closing(endless_engine(model, servers)) as engine:
        future = pool.submit(generations, model, path, lambda: engine)
        deadline = time.monotonic() + 120
        while not (
            path.exists()
            and len(read_generations(path)) == 32
            and engine.servers[place].num_outstanding > 0
        ):
            assert time.monotonic() < deadline and not future.done()
            time.sleep(0.01)
        time.sleep(0.2)  # into the decoding
        victim.signal(signal.SIGKILL)
        future.exception(timeout=300)
    return future


def test_work_of_a_killed_server_is_done_by_the_other(
    evaluated: Model,
    shared_server: ServerProcess,
    victim: ServerProcess,
    whole: list[Generation],
    tmp_path: Path,
) -> None:
    servers = Servers((shared_server.url, victim.url))
    future = generations_with_a_kill(evaluated, tmp_path / "file", servers, victim)
    assert future.result() == whole


def test_without_any_server_whole_batches_are_kept_and_others_go_on(
    evaluated: Model,
    shared_server: ServerProcess,
    victim: ServerProcess,
    whole: list[Generation],
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    alone = Servers((victim.url,), timeout_s=20.0)
    with pytest.raises(RuntimeError, match=rf"{victim.url}: /.*connect to"):
        generations_with_a_kill(evaluated, path, alone, victim).result()
    kept = path.read_bytes()
    assert bare(read_generations(path)) == whole[:32]
    other = Servers((shared_server.url,))
    assert generations(evaluated, path, lambda: endless_engine(evaluated, other)) == whole
    assert path.read_bytes().startswith(kept)


def test_server_in_another_dtype_is_refused(
    evaluated: Model, shared_server: ServerProcess, tmp_path: Path
) -> None:
    served = ("--tasks", "sums", "--engine", "vllm", "--servers", shared_server.url)
    small = ("--max-tokens", "12", "--num-workers", "1", "--output", tmp_path / "out")
    message = refused("eval", evaluated[0], *served, *small, "--dtype", "bfloat16")
    assert f"{shared_server.url} computes in float32, not in bfloat16" in message
    assert "or ask for float32" in message
