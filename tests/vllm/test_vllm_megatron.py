"""Megatron over four ranks trains a model that a vLLM server samples from, as users start both."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_samples import config_file, training_rows
from transformers import PreTrainedModel
from vllm_models import need_vllm
from vllm_servers import ROOT, ServerProcess, free_port

from flowrl.checkpoint import latest_checkpoint

need_vllm()
NUM_STEPS = 3


@pytest.mark.timeout(500)
def test_tp2_pp2_trains_with_a_server(
    shared_server: ServerProcess, served_model: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    """rollout.verify_weights holds the engine's log-probs against the policy's at every step."""
    pytest.importorskip("megatron.core")
    run_dir = tmp_path / "run"
    config = config_file(
        tmp_path / "config.yaml",
        served_model[0],
        run_dir,
        "rollout.engine=vllm",
        f"rollout.servers=[{shared_server.url}]",
        f"rollout.weight_dir={tmp_path}",
        "parallel.tensor_model_parallel_size=2",
        "parallel.pipeline_model_parallel_size=2",
        f"trainer.total_training_steps={NUM_STEPS}",
        "trainer.val_before_train=false",
        "actor.optim.lr=1e-2",  # so that the next step's weights say something else
        "actor.optim.lr_warmup_steps=0",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command += ["-m", "flowrl", "train", str(config)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    log = tmp_path / "train.log"
    with log.open("w") as output:
        ranks = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        assert ranks.wait(timeout=400) == 0, log.read_text()[-6000:]
    finally:
        if ranks.poll() is None:
            os.killpg(ranks.pid, signal.SIGKILL)
            ranks.wait()
    rows = training_rows(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["mismatch/logprob_abs_diff_max"] < 1e-4
        assert row["actor/grad_norm"] > 0
    label = json.loads(shared_server.get("/weight_info"))["weight_version"]
    assert label.endswith(f"-version-{NUM_STEPS}")
    checkpoint = latest_checkpoint(run_dir)
    assert checkpoint is not None and checkpoint.step == NUM_STEPS
    assert not list(tmp_path.glob("flowrl-weights-*"))  # removed at the end
