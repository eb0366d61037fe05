"""The judge against a small server of our own that speaks the OpenAI protocol, well and badly."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flowrl.evaluation.generations import Generation
from flowrl.evaluation.judge import SCORE, JudgeSettings, judge_all
from flowrl.evaluation.results import Answers
from flowrl.evaluation.tasks import EvalPrompt
from flowrl.tasks import Prompt


class Server(ThreadingHTTPServer):
    """Answers by the problem's text; `requests` holds what was asked."""

    requests: list[dict]
    keys: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        assert self.path == "/v1/chat/completions"
        text = body["messages"][0]["content"]
        num_before = sum(r["messages"][0]["content"] == text for r in self.server.requests) - 1
        if "problem:busy" in text and num_before < 2:
            self.reply(503, b"try later")
        elif "problem:late" in text:
            time.sleep(1.0)
            self.reply(200, b"{}")
        elif "problem:drip-head" in text:
            self.drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        elif "problem:drip-body" in text:
            self.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        elif "problem:endless" in text:
            self.drip(b"HTTP/1.1 200 OK\r\n\r\n", part=b" " * (1 << 18))
        elif "problem:refused" in text:
            self.reply(401, b"no key")
        elif "problem:garbage" in text:
            self.reply(200, b"<html>")
        elif "problem:silent" in text:
            self.say("They differ.")
        else:
            self.say("Score: 9 is no score. Two approaches.\n**Score: 4**")

    def say(self, content: str) -> None:
        self.reply(200, json.dumps({"choices": [{"message": {"content": content}}]}).encode())

    def reply(self, status: int, body: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except BrokenPipeError:  # the judge did not wait
            pass

    def drip(self, start: bytes, part: bytes = b" ") -> None:
        """Never end; no wait between two parts is long."""
        with suppress(ConnectionError):  # the judge hangs up
            self.wfile.write(start)
            while True:
                self.wfile.write(part)
                time.sleep(0.02)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests, server.keys = [], []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judge_of(server: Server, **changes: object) -> JudgeSettings:
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    values = {"timeout_s": 10.0, "retry_wait_s": 0.01, "num_workers": 1, **changes}
    return JudgeSettings(url, "judge-1", **values)  # pyright: ignore[reportArgumentType]


def answers_of(name: str, num_samples: int = 2) -> Answers:
    prompt = Prompt("test", [{"role": "user", "content": f"problem:{name}"}], "")
    samples = [
        Generation("task", name, "sample", i, "", "", f"{i} " + 1000 * "long ", "stop", 1, 0, 0, "")
        for i in range(num_samples)
    ]
    return Answers(EvalPrompt("task", name, ("auto",), prompt), samples)


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "judge.jsonl").read_text().splitlines()]


def test_judge_sees_whole_responses_and_its_answers_are_kept(
    server: Server, tmp_path: Path
) -> None:
    answers = [answers_of("a"), answers_of("b"), answers_of("alone", num_samples=1)]
    expected = {("task", "a"): 4.0, ("task", "b"): 4.0}
    assert judge_all(tmp_path, answers, judge_of(server, key="secret")) == expected
    assert server.keys == ["Bearer secret"] * 2
    for request, name in zip(server.requests, "ab", strict=True):
        assert (request["model"], request["temperature"]) == ("judge-1", 0)
        text = request["messages"][0]["content"]
        assert f"Problem:\nproblem:{name}\n" in text
        assert all(f"Response {i + 1}:\n{i} " + 1000 * "long " in text for i in range(2))
    rows = rows_of(tmp_path)
    assert [row["prompt_id"] for row in rows] == ["a", "b"]
    assert "Two approaches" in rows[0]["answer"] and "secret" not in json.dumps(rows)
    # Judged prompts are not asked again, by this judge.
    (tmp_path / "judge.jsonl").open("a").write('{"torn')
    assert judge_all(tmp_path, [*answers, answers_of("c")], judge_of(server)) == {
        **expected,
        ("task", "c"): 4.0,
    }
    assert len(server.requests) == 3 and server.keys[-1] is None
    assert len(rows_of(tmp_path)) == 3


def test_other_responses_are_judged_anew(server: Server, tmp_path: Path) -> None:
    first, other = answers_of("a"), answers_of("a")
    judge_all(tmp_path, [first], judge_of(server))
    other.samples[1] = replace(other.samples[1], response="another")
    for answers, num_requests in ((first, 1), (other, 2), (other, 2), (first, 2)):
        assert judge_all(tmp_path, [answers], judge_of(server)) == {("task", "a"): 4.0}
        assert len(server.requests) == num_requests
    rows = rows_of(tmp_path)
    assert len({row["request_hash"] for row in rows}) == 2
    # A row that does not say of which responses it is counts for none.
    del rows[0]["request_hash"]
    (tmp_path / "judge.jsonl").write_text(json.dumps(rows[0]) + "\n")
    judge_all(tmp_path, [first], judge_of(server))
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ("Score: 4.", ["4"]),
        ("Score: <4>", ["4"]),
        ("**Score:** [4]", ["4"]),
        ("**Score**: (4)", ["4"]),
        ("Score: 4/5", ["4"]),
        ("Score: 2, no, score = 3", ["2", "3"]),
        ("Score: 4.5", []),
        ("Score: 45", []),
        ("Score: 9", []),
        ("Score: <1 to 5>", []),
        ("Score: 1-5", []),
    ],
)
def test_score_of_an_answer(answer: str, scores: list[str]) -> None:
    assert SCORE.findall(answer) == scores


def test_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    assert judge_all(tmp_path, [answers_of("busy")], judge_of(server)) == {("task", "busy"): 4.0}
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("name", "num_requests", "failure"),
    [
        ("refused", 1, "HTTP 401: no key"),
        ("garbage", 3, "unreadable reply"),
        ("silent", 1, "no line 'Score"),
        ("late", 3, "no whole answer within 0.2 s"),
        ("endless", 3, "unreadable reply"),
    ],
)
def test_failure_is_kept_and_scores_nothing(
    server: Server, tmp_path: Path, name: str, num_requests: int, failure: str
) -> None:
    settings = judge_of(server, num_retries=2, timeout_s=0.2 if name == "late" else 10.0)
    assert judge_all(tmp_path, [answers_of(name)], settings) == {}
    assert len(server.requests) == num_requests
    (row,) = rows_of(tmp_path)
    assert row["score"] is None and failure in row["failure"]


@pytest.mark.parametrize("name", ["drip-head", "drip-body"])
def test_dripping_server_is_left_in_time(server: Server, tmp_path: Path, name: str) -> None:
    started_at = time.monotonic()
    settings = judge_of(server, num_retries=1, timeout_s=0.5)
    assert judge_all(tmp_path, [answers_of(name)], settings) == {}
    assert 1.0 <= time.monotonic() - started_at < 10
    assert len(server.requests) == 2
    assert rows_of(tmp_path)[0]["failure"] == "no whole answer within 0.5 s"


def test_absent_server_is_a_failure(server: Server, tmp_path: Path) -> None:
    settings = JudgeSettings("http://127.0.0.1:1/v1", "m", num_retries=1, retry_wait_s=0.01)
    assert judge_all(tmp_path, [answers_of("a")], settings) == {}
    assert "Cannot connect to host 127.0.0.1:1" in rows_of(tmp_path)[0]["failure"]
    with pytest.raises(ValueError, match="--judge-url is 'localhost'"):
        JudgeSettings("localhost", "m")
