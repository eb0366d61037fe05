"""Tiny checkpoints whose every part holds the same number, so that a mixture is seen."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from flowrl.checkpoint import Checkpoint, load_training_state, save_checkpoint

LATEST = "latest_checkpointed_iteration.txt"
TENSORS = "training_state.safetensors"


@cache
def stamped_model() -> LlamaForCausalLM:
    return tiny_model()


def save_model(
    run_dir: Path,
    step: int,
    model: LlamaForCausalLM,
    tensors: dict[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
    keep: int = 2,
) -> Path:
    """`save_checkpoint` with the tiny tokenizer."""
    return save_checkpoint(
        run_dir,
        step,
        model=model,
        tokenizer=tiny_tokenizer(),
        tensors=tensors or {},
        state=state or {},
        keep=keep,
    )


def save(run_dir: Path, step: int, stamp: int | None = None, keep: int = 2) -> Path:
    """Save a checkpoint whose weights, tensors and state all hold `stamp` (the step if unset)."""
    stamp = step if stamp is None else stamp
    model = stamped_model()
    model.lm_head.weight.data.fill_(stamp)
    tensors = {"master.w": torch.full((64, 8), float(stamp)), "step.w": torch.tensor(float(stamp))}
    return save_model(run_dir, step, model, tensors, {"step": step, "stamp": stamp}, keep)


def read_stamp(checkpoint: Checkpoint | None) -> int:
    """The stamp of a checkpoint, having asserted that every part of it holds the same one."""
    assert checkpoint is not None
    tensors, state = load_training_state(checkpoint)
    stamp = state["stamp"]
    assert state["step"] == checkpoint.step
    assert torch.equal(tensors["master.w"], torch.full((64, 8), float(stamp)))
    assert torch.equal(tensors["step.w"], torch.tensor(float(stamp)))
    head = load_file(checkpoint.hf / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, torch.full((16, 8), float(stamp)))
    return stamp


def entries(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a forked process that ends without running this process's exit handlers."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid
