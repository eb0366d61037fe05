"""Runs a function on several ranks of a gloo group, in processes forked from the test's own.

Importing Megatron-core takes ten seconds or more; a fork costs milliseconds.
"""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama
import transformers.models.qwen2.modeling_qwen2
import transformers.models.qwen3.modeling_qwen3
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

with warnings.catch_warnings():  # Megatron warns of every optional package that is absent
    warnings.simplefilter("ignore")
    import megatron.core.distributed
    import megatron.core.models.gpt.gpt_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401

EXTRA_S = 5.0  # for a hung rank to write its stack before it is killed


def _report(folder: Path, rank: int) -> Path:
    return folder / f"report_{rank}.txt"


def _work(
    rank: int,
    world_size: int,
    folder: Path,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)  # the parent's OpenMP threads did not survive the fork
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of the machine's name
    torch.manual_seed(0)
    sys.stderr = _report(folder, rank).open("w")  # where multiprocessing prints a traceback
    faulthandler.dump_traceback_later(timeout_s, file=sys.stderr)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    torch.save(function(rank, *args), folder / f"result_{rank}")
    dist.barrier()  # a rank that leaves first breaks connections that others still use


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call `function(rank, *args)` on every rank and return the results in rank order.

    The default process group exists when the function starts; model-parallel groups do not. Results
    travel through torch.save. When a rank fails or the time is up, all ranks are killed and an
    AssertionError carries what each had to say.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        ranks = [
            context.Process(
                target=_work, args=(rank, world_size, folder, timeout_s, function, args)
            )
            for rank in range(world_size)
        ]
        try:
            for rank, process in enumerate(ranks):
                _report(folder, rank).touch()
                process.start()
            deadline = time.monotonic() + timeout_s + EXTRA_S
            while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        reports = [
            f"--- rank {rank}, exit code {process.exitcode}\n{_report(folder, rank).read_text()}"
            for rank, process in enumerate(ranks)
            if process.exitcode != 0
        ]
        assert not reports, "\n".join(reports)
        return [
            torch.load(folder / f"result_{rank}", weights_only=False) for rank in range(world_size)
        ]
