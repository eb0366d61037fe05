"""The Slurm scripts with rollout servers, and stand-ins for the commands that they call."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SLURM = ROOT / "examples" / "slurm"


def write_commands(folder: Path, commands: dict[str, str]) -> None:
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("variables", "setting"),
    [
        ({"WEIGHT_DIR": "/shared"}, "rollout.weight_dir=/shared"),
        ({"WEIGHT_TRANSFER": "nccl"}, "rollout.weight_transfer=nccl"),
    ],
    ids=["folder", "network"],
)
def test_job_divides_its_nodes_between_servers_and_trainers(
    tmp_path: Path, variables: dict[str, str], setting: str
) -> None:
    calls, ended = tmp_path / "calls", tmp_path / "ended"
    write_commands(
        tmp_path,
        {
            "scontrol": "printf '%s\\n' a b c d e",
            # The servers' step goes on until it is told to end.
            "srun": 'echo "$NUM_NODES $RDZV_ENDPOINT $@" >> "$CALLS"\n'
            'case "$*" in *serve.sh*) trap \'touch "$ENDED"; exit\' TERM\n'
            "while true; do sleep 0.05; done;; esac\n"
            'while [ "$(wc -l < "$CALLS")" -lt 2 ]; do sleep 0.05; done',
        },
    )
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "ENDED": str(ended),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "5",
        "SLURM_JOB_NODELIST": "[a-e]",
        "SLURM_GPUS_ON_NODE": "4",
        "ROLLOUT_NODES": "2",
        "GPUS_PER_SERVER": "2",
        **variables,
    }
    command = ["bash", SLURM / "flowrl.sbatch", "config.yaml", "flow.beta=5"]
    assert subprocess.run(command, env=environment, timeout=30).returncode == 0
    assert ended.exists()
    trainers, servers = sorted(calls.read_text().splitlines(), key=lambda line: "serve.sh" in line)
    settings = (
        "config.yaml flow.beta=5 rollout.engine=vllm "
        "rollout.servers=[http://a:8000,http://a:8001,http://b:8000,http://b:8001] "
        f"{setting} rollout.tensor_model_parallel_size=2 "
        "rollout.gpu_memory_utilization=0.9"
    )
    step = "--nodes=2 --nodelist=a,b --ntasks-per-node=1 examples/slurm/serve.sh"
    assert servers == f"3 c:23456 {step} {settings}"
    step = "--kill-on-bad-exit=1 --nodes=3 --nodelist=c,d,e --ntasks-per-node=1"
    assert trainers == f"3 c:23456 {step} examples/slurm/node.sh {settings}"


def test_servers_of_a_node_share_its_gpus_start_again_and_end_with_the_job(
    tmp_path: Path,
) -> None:
    calls, pids = tmp_path / "calls", tmp_path / "pids"
    # The first server of the second port is killed, and leaves an engine behind.
    write_commands(
        tmp_path,
        {
            "flowrl": 'echo "$CUDA_VISIBLE_DEVICES $@" >> "$CALLS"\n'
            'sleep 60 & echo "$!" >> "$PIDS"\n'
            'if [ "${@: -1}" = 7001 ] && mkdir "$CALLS.once"; then kill -9 $$; fi\n'
            "wait"
        },
    )
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "PIDS": str(pids),
        "GPUS_PER_NODE": "4",
        "GPUS_PER_SERVER": "2",
        "FIRST_PORT": "7000",
        "RESTART_AFTER_S": "0.1",
    }
    node = subprocess.Popen(
        ["bash", SLURM / "serve.sh", "config.yaml", "flow.beta=5"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 3)
        serve = "serve config.yaml flow.beta=5 --host 0.0.0.0 --port"
        assert sorted(calls.read_text().splitlines()) == [
            f"0,1 {serve} 7000",
            f"2,3 {serve} 7001",
            f"2,3 {serve} 7001",
        ]
        engines = [int(pid) for pid in pids.read_text().split()]
        wait_until(lambda: sum(map(is_running, engines)) == 2)
        node.send_signal(signal.SIGUSR1)  # for trainers
        time.sleep(0.2)
        assert node.poll() is None
    finally:
        node.send_signal(signal.SIGTERM)
        node.wait(timeout=20)
    wait_until(lambda: not any(map(is_running, engines)))


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False
