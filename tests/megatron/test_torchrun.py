"""Two torchrun agents as two nodes have them, and the Slurm script around them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_samples import config_file, training_rows

from flowrl.checkpoint import latest_checkpoint

ROOT = Path(__file__).parents[2]
NODE = ROOT / "examples" / "slurm" / "node.sh"
BATCH = ROOT / "examples" / "slurm" / "flowrl.sbatch"
BINARIES = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until(is_true, seconds: float, nodes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline and all(node.poll() is None for node in nodes)
        time.sleep(0.2)


@pytest.mark.timeout(300)
def test_two_nodes_train_until_the_scheduler_asks_them_to_stop(
    tiny_sums: Path, tmp_path: Path
) -> None:
    """A fork-free start of four Python processes: slow, so all of it is one test."""
    run_dir = tmp_path / "run"
    config = config_file(
        tmp_path / "config.yaml",
        tiny_sums,
        run_dir,
        "trainer.total_training_steps=100000",
        "trainer.val_before_train=false",
        "rollout.n=2",
    )
    environment = {
        **os.environ,
        "PATH": f"{BINARIES}:{os.environ['PATH']}",
        "NUM_NODES": "2",
        "RANKS_PER_NODE": "1",
        "RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
        "RDZV_ID": "test",
        "NODE_ADDRESS": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    logs = [tmp_path / f"node{index}.log" for index in range(2)]
    nodes = []
    try:
        for log in logs:
            command = [NODE, config, "parallel.pipeline_model_parallel_size=2"]
            with log.open("w") as output:
                nodes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        metrics = run_dir / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(training_rows(run_dir)) >= 2, 240, nodes)
        nodes[1].send_signal(signal.SIGUSR1)  # one node is enough
        codes = [node.wait(timeout=60) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGTERM)
                node.wait(timeout=60)
    report = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], report
    rows, checkpoint = training_rows(run_dir), latest_checkpoint(run_dir)
    assert checkpoint is not None
    assert [row["step"] for row in rows] == list(range(1, checkpoint.step + 1))
    assert 2 <= checkpoint.step < 100000


SLURM = {
    "scontrol": 'case "$1" in show) echo one; echo two;; *) echo "$@" >> "$CALLS";; esac',
    "scancel": 'echo "$@" >> "$CALLS"; touch "$STOPPED"',
    # Waits for the signal where the test sends one, then ends as the test wants.
    "srun": 'echo "$RDZV_ENDPOINT $RDZV_ID $SRUN_CPUS_PER_TASK $@" >> "$CALLS"\n'
    'if [ -n "$IS_LONG" ]; then while ! [ -e "$STOPPED" ]; do sleep 0.05; done; fi\n'
    "exit $STATUS",
}


@pytest.mark.parametrize(
    ("status", "restarts", "is_long", "is_requeued"),
    [(0, 0, False, False), (1, 7, False, True), (1, 8, False, False), (0, 99, True, True)],
    ids=["finished", "failed", "failed too often", "time is up"],
)
def test_slurm_job_goes_back_into_the_queue_when_it_should(
    tmp_path: Path, status: int, restarts: int, is_long: bool, is_requeued: bool
) -> None:
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "STOPPED": str(tmp_path / "stopped"),
        "IS_LONG": "yes" if is_long else "",
        "STATUS": str(status),
        "SLURM_SUBMIT_DIR": str(tmp_path),  # without a .venv, whose binaries would come first
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "[one,two]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "48",  # of sbatch --cpus-per-task; srun looks at its own alone
    }
    job = subprocess.Popen(["bash", BATCH, "config.yaml", "flow.beta=5"], env=environment)
    if is_long:
        while not calls.exists():
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == status
    started, *others = calls.read_text().splitlines()
    assert started.startswith(f"one:23456 123456-{restarts} 48 ")
    assert started.endswith("examples/slurm/node.sh config.yaml flow.beta=5")
    stop = ["--signal=USR1 123456"] if is_long else []
    assert others == stop + (["requeue 123456"] if is_requeued else [])
