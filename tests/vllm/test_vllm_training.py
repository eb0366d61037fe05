"""Training with vLLM in the process: what it leaves alone, how drift stops it, how it resumes."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_samples import config_file, refused, settings, trained, training_rows, untimed_rows
from vllm_models import need_vllm, vllm_engine

import flowrl.rollout.vllm_engine
from flowrl.batch import Sample, pack
from flowrl.config import load_config
from flowrl.policy.forward import forward_tokens
from flowrl.policy.pretrained import load_model
from flowrl.rollout import SamplingParams
from flowrl.rollout.requests import config_overrides
from flowrl.run import start, verify_engine

need_vllm()
pytestmark = pytest.mark.timeout(300)

VLLM = ("rollout.engine=vllm", "rollout.max_num_seqs=32")
RELOADED = (*VLLM, "trainer.val_before_train=false", "trainer.test_freq=1")


def process_state() -> dict[str, object]:
    """What a library may change for everyone in its process."""
    return {
        "environment": dict(os.environ),
        "threads": (torch.set_num_threads, torch.get_num_threads()),
        "cores": os.sched_getaffinity(0),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": np.random.get_state()[1].tolist(),
        "python generator": random.getstate(),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "hook": sys.excepthook,
        "gradients": torch.is_grad_enabled(),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "children": multiprocessing.active_children(),
    }


def changed(state: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in process_state().items() if value != state[name]}


def test_the_engine_leaves_the_process_and_the_policy_alone(tiny_sums: Path) -> None:
    policy = load_model(str(tiny_sums), torch.float32, torch.device("cpu"))
    batch = pack([Sample([1, 7, 11], [5, 10, 1, 2, 13], [0.0] * 5, 0)] * 3)

    def bits() -> torch.Tensor:
        policy.zero_grad()
        logprobs = forward_tokens(policy, batch, 1.0).logprobs
        logprobs.sum().backward()
        gradients = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
        return torch.cat([logprobs.detach(), *gradients])

    expected, state = bits(), process_state()
    with vllm_engine(tiny_sums) as engine:
        assert changed(state) == {}
        assert torch.equal(bits(), expected)
        engine.generate([[1, 7, 11]], SamplingParams(n=8, max_tokens=8), seed=0)
        engine.publish(((n, p.detach()) for n, p in policy.named_parameters()), 1)
        engine.generate([[1, 7, 11]], SamplingParams(n=8, max_tokens=8), seed=0)
        assert changed(state) == {}
        assert torch.equal(bits(), expected)
    assert changed(state) == {}
    assert torch.equal(bits(), expected)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("dtype", "mean"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_run_samples_from_its_policy_at_every_step(
    tiny_sums: Path, tmp_path: Path, dtype: str, mean: float
) -> None:
    changes = (*VLLM, f"model.dtype={dtype}", "trainer.total_training_steps=4")
    trained(tiny_sums, tmp_path, *changes)
    rows = training_rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row["mismatch/logprob_abs_diff_mean"] <= mean
        assert row["actor/skipped_updates"] == 0
    assert rows[-1]["actor/grad_norm"] > 0


def test_a_resumed_run_repeats_one_that_was_not_stopped(tiny_sums: Path, tmp_path: Path) -> None:
    trained(tiny_sums, tmp_path / "straight", *RELOADED, "trainer.total_training_steps=4")
    trained(tiny_sums, tmp_path / "run", *RELOADED, "trainer.total_training_steps=2")
    trained(tiny_sums, tmp_path / "run", *RELOADED, "trainer.total_training_steps=4")
    assert untimed_rows(tmp_path / "run") == untimed_rows(tmp_path / "straight")


def test_drift_is_detected(tiny_sums: Path, tmp_path: Path) -> None:
    config = load_config(None, settings(tiny_sums, tmp_path, *VLLM))
    message = r"step 1: the rollout engine does not sample from the policy.*rollout.verify_weights"
    with start(config) as run:
        old = {name: weight.clone() for name, weight in run.policy.named_weights()}
        with torch.no_grad():
            for _, weight in run.policy.named_weights():
                weight.add_(0.02 * torch.randn_like(weight))
        with pytest.raises(RuntimeError, match=message):  # nothing was published
            verify_engine(config, run.parts, run.train_prompts, 1)
        new = dict(run.policy.named_weights())
        for name in old:  # one tensor was not
            run.engine.publish({**new, name: old[name]}.items(), 1)
            with pytest.raises(RuntimeError, match=message):
                verify_engine(config, run.parts, run.train_prompts, 1)
        run.publish(version=1)


def test_what_vllm_cannot_do_is_refused(tiny_sums: Path, tmp_path: Path) -> None:
    def message(*changes: str) -> str:
        return refused(
            "train", config_file(tmp_path / "run.yaml", tiny_sums, tmp_path, *VLLM, *changes)
        )

    assert "rollout.free_cache_engine = true: vLLM frees no memory on a CPU" in message(
        "rollout.free_cache_engine=true"
    )
    assert "max_model_len = 300 (rollout.max_model_len, or data.max_prompt_length" in message(
        "rollout.max_model_len=300"
    )
    assert not torch.distributed.is_initialized()


def test_without_vllm_the_error_names_the_remedy(
    tiny_sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python takes for not installed
    message = refused("train", config_file(tmp_path / "run.yaml", tiny_sums, tmp_path, *VLLM))
    assert "rollout.engine = vllm needs vLLM" in message and "make vllm" in message


@pytest.mark.parametrize("is_cpu", [True, False])
def test_head_of_a_bfloat16_model_rounds_no_logits_on_a_gpu(
    tiny_sums: Path, is_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs to one prompt differ as the logits do, rounded ones by multiples of 2^-10."""
    overrides = config_overrides(is_cpu)
    monkeypatch.setattr(flowrl.rollout.vllm_engine, "config_overrides", lambda is_cpu: overrides)
    params = SamplingParams(n=64, temperature=1.0, max_tokens=1)
    with vllm_engine(tiny_sums, dtype="bfloat16") as engine:
        (responses,) = engine.generate([[1, 7, 11]], params, seed=3)
    logprobs = torch.tensor(sorted({response.logprobs[0] for response in responses}))
    steps = (logprobs.double() - logprobs[-1].double()) * 2**10
    assert len(logprobs) >= 4
    assert (float((steps - steps.round()).abs().max()) < 0.05) is is_cpu
