"""The client of vLLM servers, against a small HTTP server that misbehaves."""

import asyncio
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import aiohttp
import pytest
import torch

from flowrl.config import load_config
from flowrl.rollout import Response, SamplingParams
from flowrl.rollout.dispatch import BadAnswer, Server, ServerLost
from flowrl.rollout.serve import server_command
from flowrl.rollout.vllm_client import Request, ServedModel, VllmClient
from flowrl.rollout.vllm_server import OTHER_FILES, allow_connections
from flowrl.rollout.weight_broadcast import HostCopy

LABEL = "run-1-version-7"
PARAMS = SamplingParams(n=2, max_tokens=3)


def answer(**changes: object) -> dict:
    """What vLLM answers to one request, with changes."""
    choice = {
        "index": 0,
        "token_ids": [5, 2],
        "logprobs": {
            "content": [{"token_id": 5, "logprob": -0.5}, {"token_id": 2, "logprob": -1.5}]
        },
        "finish_reason": "stop",
        "weight_versions": [{"version": LABEL, "start": 0, "end": 2}],
    }
    return {"choices": [{**choice, **changes}]}


class Handler(BaseHTTPRequestHandler):
    """Answers with what `respond` writes."""

    respond: Callable[[BaseHTTPRequestHandler, dict], None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).respond(self, json.loads(body))

    def log_message(self, format: str, *args: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    """Clients that hang up are expected."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, extra: int = 0) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) + extra))
    handler.end_headers()
    handler.wfile.write(body)


@contextmanager
def http_server(respond: Callable) -> Iterator[str]:
    handler = type("Responding", (Handler,), {"respond": staticmethod(respond)})
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ask(url: str, timeout_s: float = 5.0) -> list[Response]:
    """One prompt with two responses, of one server."""

    async def run() -> list[Response]:
        async with aiohttp.ClientSession() as session:
            model = ServedModel("", {}, 8)
            client = VllmClient(session, model, timeout_s, LABEL, 7, Path(LABEL))
            request = Request([3, 4], [11, 12], PARAMS, [2])
            return await client.generate(Server(url), request)

    return asyncio.run(run())


def test_request_and_answer_carry_tokens_seeds_and_ends() -> None:
    bodies: list[dict] = []

    def respond(handler: BaseHTTPRequestHandler, body: dict) -> None:
        bodies.append(body)
        seed = body["sampling_params"]["seed"]
        time.sleep(0.1 if seed == 11 else 0)  # the first ends last
        content = [{"token_id": seed, "logprob": -0.25}]
        spans = [{"version": LABEL, "start": 0, "end": 1}]
        changes = {"token_ids": [seed], "logprobs": {"content": content}}
        send(handler, json.dumps(answer(**changes, weight_versions=spans)).encode())

    with http_server(respond) as url:
        assert ask(url) == [Response([s], [-0.25], "stop", weight_version=7) for s in (11, 12)]
    assert [body["token_ids"] for body in bodies] == [[3, 4]] * 2
    sent = bodies[0]["sampling_params"]
    assert (sent["max_tokens"], sent["stop_token_ids"], sent["ignore_eos"]) == (3, [2], True)


TOO_LONG = {
    "token_ids": [5] * 4,
    "logprobs": {"content": [{"token_id": 5, "logprob": -1.0}] * 4},
    "weight_versions": [{"version": LABEL, "start": 0, "end": 4}],
}
BAD_ANSWERS: dict[str, tuple[object, str]] = {
    "no object": ([1], "`choices` is None"),
    "no choice": ({"choices": []}, r"`choices` is \[\]"),
    "two choices": ({"choices": answer()["choices"] * 2}, "`choices` is"),
    "no tokens": (answer(token_ids=None), "`token_ids` is None"),
    "empty": (answer(token_ids=[]), r"`token_ids` is \[\]"),
    "too long": (answer(**TOO_LONG), "not 1 to 3 tokens"),
    "tokens as text": (answer(token_ids=["5", "2"]), "`token_ids` is"),
    "aborted": (answer(finish_reason="abort"), "`finish_reason` is 'abort' after 2 tokens"),
    "no log-probs": (answer(logprobs=None), "`logprobs` is None"),
    "other tokens": (answer(token_ids=[5, 3]), "`logprobs` are not one number"),
    "fewer log-probs": (answer(logprobs={"content": []}), "`logprobs` are not one number"),
    "no JSON": (b"<html>", "is no JSON: .*html"),
    "NaN": (json.dumps(answer()).replace("-0.5", "NaN").encode(), "`logprobs` are not one number"),
    "nothing": (b"", "`choices` is None"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_bad_answer_names_the_field(name: str) -> None:
    content, problem = BAD_ANSWERS[name]
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with (
        http_server(lambda handler, _: send(handler, body)) as url,
        pytest.raises(BadAnswer, match=problem),
    ):
        ask(url)


@pytest.mark.parametrize(
    "spans",
    [
        [{"version": "default", "start": 0, "end": 2}],
        [{"version": LABEL, "start": 0, "end": 1}, {"version": "other", "start": 1, "end": 2}],
        [{"version": LABEL, "start": 0, "end": 1}],
        [],
        None,
    ],
    ids=["of a fresh server", "mixed", "partly", "empty", "none"],
)
def test_tokens_of_other_weights_are_never_used(spans: object) -> None:
    body = json.dumps(answer(weight_versions=spans)).encode()
    with (
        http_server(lambda handler, _: send(handler, body)) as url,
        pytest.raises(ServerLost, match=f"and not {LABEL}"),
    ):
        ask(url)


def test_truncated_and_endless_answers_and_error_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.dumps(answer()).encode()

    def truncated(handler: BaseHTTPRequestHandler, _: dict) -> None:
        send(handler, whole[:50], extra=len(whole) - 50)

    def endless(handler: BaseHTTPRequestHandler, _: dict) -> None:
        send(handler, b" " * 100_000)

    monkeypatch.setattr("flowrl.rollout.vllm_client.ANSWER_BYTES", 1000)
    cases = [
        (truncated, BadAnswer, "less than it announced"),
        (endless, BadAnswer, "more than 4072 bytes"),
        (lambda h, _: send(h, b"oops", 500), BadAnswer, "/generate answers 500: oops"),
        (lambda h, _: send(h, b"dead", 503), ServerLost, "answers 503: dead"),
        (lambda h, _: send(h, b"too long", 400), ValueError, "refuses a prompt: too long"),
    ]
    for respond, error, problem in cases:
        with http_server(respond) as url, pytest.raises(error, match=problem):
            ask(url)


def test_refused_port_silence_and_hanging_up_lose_the_server() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]  # bound, and nobody listens
        with pytest.raises(ServerLost, match="/generate: ClientConnectorError"):
            ask(f"http://127.0.0.1:{port}")
        listener.listen()  # connections are taken and never answered
        with pytest.raises(ServerLost, match="did not answer within 0.3 s"):
            ask(f"http://127.0.0.1:{port}", timeout_s=0.3)
    with (
        http_server(lambda handler, _: handler.connection.close()) as url,
        pytest.raises(ServerLost, match="/generate: ServerDisconnectedError|/generate: Client"),
    ):
        ask(url)


# What a start refuses, or makes possible


def describe(
    url: str, weights: Path | HostCopy = Path(LABEL), dtype: str | None = "float32"
) -> str:
    """What is wrong with a server's model."""

    async def run() -> str:
        async with aiohttp.ClientSession() as session:
            model = ServedModel("LlamaForCausalLM", {"a": torch.Size([2])}, 8, dtype)
            client = VllmClient(session, model, 5.0, LABEL, 7, weights)
            return await client.wrong_model(Server(url))

    return asyncio.run(run())


DESCRIBED = {
    "model": "M",
    "architecture": "LlamaForCausalLM",
    "shapes": {"a": [2]},
    "dtype": "float32",
    "max_model_len": 8,
    "logprobs_mode": "processed_logprobs",
    "weight_transfer": "disk",
}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"max_model_len": 7}, "admits 7 tokens a sequence, and prompt and response may have 8"),
        ({"logprobs_mode": "raw_logprobs"}, "reports raw_logprobs and not processed_logprobs"),
        ({"shapes": {"a": [2], "b": [1]}}, "weight b: M [1], the trained model absent"),
        ({"dtype": "bfloat16"}, "computes in bfloat16, not in float32; start it with"),
        ({"more": 1}, "has another flowrl"),
    ],
    ids=["sound", "too short", "raw log-probs", "other model", "other dtype", "other version"],
)
def test_description_of_a_server_is_compared(changes: dict, problem: str) -> None:
    results = json.dumps({"results": [{**DESCRIBED, **changes}]}).encode()
    with http_server(lambda handler, _: send(handler, results)) as url:
        assert problem in describe(url) and bool(problem) == bool(describe(url))


def test_training_takes_servers_of_any_dtype() -> None:
    results = json.dumps({"results": [{**DESCRIBED, "dtype": "bfloat16"}]}).encode()
    with http_server(lambda handler, _: send(handler, results)) as url:
        assert describe(url, dtype=None) == ""


@pytest.mark.parametrize("transfer", ["disk", "gloo", "nccl"])
def test_server_must_receive_as_the_trainer_sends_or_read_files(transfer: str) -> None:
    results = json.dumps({"results": [{**DESCRIBED, "weight_transfer": transfer}]}).encode()
    weights = HostCopy({"a": torch.Size([2])}, torch.float32, torch.device("cpu"))
    with http_server(lambda handler, _: send(handler, results)) as url:
        assert describe(url) == ""
        problem = describe(url, weights)
    expected = f"takes weights by {transfer}, and the trainer sends them by gloo; start it with"
    assert problem == "" if transfer == "gloo" else problem.startswith(expected)


@pytest.mark.parametrize("status", [404, 500])
def test_server_that_takes_no_weights_is_refused(status: int) -> None:
    with http_server(lambda handler, _: send(handler, b"what?", status)) as url:
        problem = describe(url)
    assert f"/collective_rpc answers {status}: what?" in problem and "flowrl serve" in problem


def test_limit_of_open_files_is_raised_to_what_is_needed_or_refused() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
        allow_connections(100)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024
        allow_connections(2000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (2000 + OTHER_FILES, before[1])
        with pytest.raises(ValueError, match="up to 1000000000 connections"):
            allow_connections(10**9)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_serve_passes_the_runs_settings_on() -> None:
    overrides = ["model.path=M", "data.task=sums", "rollout.engine=vllm", "model.dtype=bfloat16"]
    overrides += ["rollout.servers=[http://x:1]", "rollout.tensor_model_parallel_size=4"]
    overrides += ["rollout.enable_prefix_caching=false", "data.max_prompt_length=100"]
    config = load_config(None, [*overrides, "data.max_response_length=28"])
    command = server_command(config, "/m", "0.0.0.0", 81, ["--seed", "5"], is_cpu=False)
    pairs = dict(zip(command, command[1:], strict=False))
    assert pairs["--model"] == "/m" and pairs["--port"] == "81" and pairs["--dtype"] == "bfloat16"
    assert pairs["--max-model-len"] == "128" and pairs["--tensor-parallel-size"] == "4"
    assert pairs["--logprobs-mode"] == "processed_logprobs"
    assert pairs["--hf-overrides"] == '{"head_dtype": "float32"}'
    assert "--no-enable-prefix-caching" in command and "--enforce-eager" not in command
    assert command[-2:] == ["--seed", "5"]
    on_cpu = server_command(config, "/m", "h", 1, [], is_cpu=True)
    assert "--enforce-eager" in on_cpu and "{}" in on_cpu
    assert "--no-enable-chunked-prefill" in on_cpu
    assert "--no-enable-chunked-prefill" not in command
    assert "--weight-transfer-config" not in command
    over_network = load_config(None, [*overrides, "rollout.weight_transfer=nccl"])
    command = server_command(over_network, "/m", "h", 1, [], is_cpu=True)
    place = command.index("--weight-transfer-config")
    assert command[place + 1] == '{"backend": "flowrl"}'
