"""Real vLLM servers for tests, started as a user starts them: by `flowrl serve`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[2]
START_S = 240.0  # 20 to 30 s on two idle cores
# One process fewer than by default, and so a quicker start.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
IN_ONE_PROCESS = ("--distributed-executor-backend", "uni")
SETTINGS = (
    "data.task=sums",
    "data.max_prompt_length=56",
    "data.max_response_length=200",
    "actor.ppo_max_token_len_per_gpu=256",
    "model.dtype=float32",
    "rollout.engine=vllm",
    "rollout.max_num_seqs=64",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ServerProcess:
    """`flowrl serve` in a process group of its own, which can be killed and started again."""

    def __init__(self, model: Path, log: Path, **environment: str) -> None:
        self.model, self.log, self.environment = model, log, environment
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *vllm_arguments: str, settings: tuple[str, ...] = ()) -> None:
        """Start without waiting."""
        config = self.log.with_suffix(".yaml")
        config.write_text(f"model: {{path: {self.model}}}\n", encoding="utf-8")
        command = [sys.executable, "-m", "flowrl", "serve", str(config), *SETTINGS, *settings]
        command += ["--port", str(self.port), "--", *IN_ONE_PROCESS, *vllm_arguments]
        environment = {
            **os.environ,
            **ONE_PROCESS,
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            **self.environment,
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it is healthy."""
        assert self.process is not None
        deadline = time.monotonic() + START_S
        while not self.is_healthy():
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            return self.get("/health") == b""
        except (urllib.error.URLError, OSError):
            return False

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return answer.read()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and all that it started."""
        assert self.process is not None
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
