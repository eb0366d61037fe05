"""`flowrl serve`: a vLLM server with what a run needs of it, from the run's own configuration."""

import json
import os
import sys
from collections.abc import Sequence

import torch

from flowrl.config import cache_dir, kept_environment
from flowrl.device import with_resolved_dtype
from flowrl.policy.pretrained import resolve_model_path
from flowrl.rollout.requests import config_overrides, enable_chunked_prefill
from flowrl.rollout.weight_broadcast import ENGINE_NAME
from flowrl.settings import Config

EXTENSION = "flowrl.rollout.vllm_worker.PublishedWeights"
# Its endpoints for weights, which ask for no password: hence the default of 127.0.0.1.
FORCED = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
# On a CPU vLLM compiles one line of its sampler, at the first response, for most of a minute; and
# the default cache is a share of all memory (here GiB).
CPU_DEFAULTS = {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


def server_command(
    config: Config, path: str, host: str, port: int, vllm_arguments: Sequence[str], is_cpu: bool
) -> list[str]:
    """The command line of a server for runs with this configuration; vllm_arguments come last."""
    rollout, data = config.rollout, config.data
    max_model_len = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    # By its module: the `vllm` command of the package vllm-cpu asks for the version of `vllm`.
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    command += ["--model", path, "--host", host, "--port", str(port)]
    command += ["--dtype", config.model.dtype, "--max-model-len", str(max_model_len)]
    command += ["--max-num-seqs", str(rollout.max_num_seqs)]
    command += ["--tensor-parallel-size", str(rollout.tensor_model_parallel_size)]
    command += ["--gpu-memory-utilization", str(rollout.gpu_memory_utilization)]
    command += ["--generation-config", "vllm"]  # the model's own defaults would change sampling
    command += ["--logprobs-mode", "processed_logprobs"]
    command += ["--hf-overrides", json.dumps(config_overrides(is_cpu))]
    command += ["--enable-scale-out", "--worker-extension-cls", EXTENSION]
    command += ["--disable-uvicorn-access-log"]  # a line per response
    if rollout.weight_transfer == "nccl":
        command += ["--weight-transfer-config", json.dumps({"backend": ENGINE_NAME})]
    if not enable_chunked_prefill(is_cpu):
        command.append("--no-enable-chunked-prefill")
    if not rollout.enable_prefix_caching:
        command.append("--no-enable-prefix-caching")
    if rollout.enforce_eager or is_cpu:
        command.append("--enforce-eager")
    if config.model.trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *vllm_arguments]


def serve(config: Config, host: str, port: int, vllm_arguments: Sequence[str]) -> None:
    """Become the server; returns only by OSError."""
    config = with_resolved_dtype(config)
    path = resolve_model_path(config.model.path, cache_dir())
    is_cpu = not torch.cuda.is_available()
    command = server_command(config, path, host, port, vllm_arguments, is_cpu)
    print(" ".join(command), flush=True)
    with kept_environment(FORCED, CPU_DEFAULTS if is_cpu else {}):
        os.execv(command[0], command)
