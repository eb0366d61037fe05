"""Ranks that die, hang or fail: the job ends soon, names rank, step and cause, and can go on."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import _report, _work, run_ranks
from parallel_cases import Case, Spread, build_policy, make_objective, make_samples
from parts_samples import KeepingEngine, build_parts, save_step, train_steps
from torch import Tensor
from training_samples import settings, untimed_rows

from flowrl import train as training
from flowrl.checkpoint import latest_checkpoint
from flowrl.config import load_config
from flowrl.main_rank import MainRankEngine, is_main_rank, on_main_rank
from flowrl.megatron.layout import Layout
from flowrl.megatron.watchdog import Watchdog

PP2 = Spread(2, Layout(pipeline=2))


@dataclass
class Ended:
    """How a rank ended."""

    exit_code: int | None  # None: it did not
    seconds: float | None
    report: str  # its standard error


def ended_ranks(
    num_ranks: int,
    function: Callable[..., Any],
    *args: Any,
    num_left: int = 0,
    within_s: float = 60.0,
) -> list[Ended]:
    """Start ranks as run_ranks does, but wait for the others too until at most `num_left` run.

    Collectives time out after ten times `within_s`, so nothing here ends because of them.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        arguments = (num_ranks, folder, 10 * within_s, function, args)
        ranks = [context.Process(target=_work, args=(r, *arguments)) for r in range(num_ranks)]
        started = time.monotonic()
        seconds: list[float | None] = [None] * num_ranks
        try:
            for process in ranks:
                process.start()
            while seconds.count(None) > num_left and time.monotonic() - started < within_s:
                for rank, process in enumerate(ranks):
                    if seconds[rank] is None and process.exitcode is not None:
                        seconds[rank] = time.monotonic() - started
                time.sleep(0.01)
        finally:
            codes = [process.exitcode for process in ranks]
            for process in ranks:
                process.kill()
                process.join()
        return [
            Ended(code, seconds[rank], _report(folder, rank).read_text())
            for rank, code in enumerate(codes)
        ]


def log_to_report() -> None:
    """As the command does, on standard error."""
    logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr, force=True)


def loop(rank: int, timeout_s: float, act: Callable[[int, int], None], num_steps: int) -> int:
    """Steps of work on every rank and a sum over ranks; `act(rank, step)` comes in between."""
    log_to_report()
    with Watchdog(timeout_s) as watchdog:
        finished = [0]
        watchdog.num_steps = lambda: finished[0]
        for step in range(1, num_steps + 1):
            act(rank, step)
            dist.all_reduce(torch.ones(1))
            finished[0] = step
    return finished[0]


def at(victim: int, step: int, action: Callable[[], None]) -> Callable[[int, int], None]:
    def act(rank: int, now: int) -> None:
        time.sleep(0.05)
        if (rank, now) == (victim, step):
            time.sleep(0.4)  # the others arrive, and a sign of life says where it is
            action()

    return act


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise KeyError("no such reward")


@pytest.mark.parametrize("victim", [0, 1], ids=["first", "other"])
def test_a_rank_that_hangs_is_named(victim: int) -> None:
    ended = ended_ranks(3, loop, 3.0, at(victim, 2, stop), 4, num_left=1)
    assert ended[victim].exit_code is None
    for rank in {0, 1, 2} - {victim}:
        assert ended[rank].exit_code == 1, ended[rank].report
        # Half of 3 s until it counts as silent, and what a loaded machine adds.
        assert ended[rank].seconds is not None and ended[rank].seconds < 20
        assert f"rank {rank} ends, since rank {victim} is silent for 1." in ended[rank].report
        assert "last seen at step 2 in" in ended[rank].report


def test_a_rank_that_is_killed_is_named() -> None:
    ended = ended_ranks(3, loop, 6.0, at(1, 3, die), 4)
    assert ended[1].exit_code == -signal.SIGKILL
    assert ended[0].exit_code == ended[2].exit_code == 1
    # Gloo tells the others at once; whichever is first asks who is missing.
    reports = ended[0].report + ended[2].report
    assert "failed in step 3: RuntimeError" in reports
    assert reports.count("rank 1 is silent, last seen at step ") == 1
    assert "rank 0 is silent" not in reports and "rank 2 is silent" not in reports


def test_an_error_of_one_rank_ends_all() -> None:
    ended = ended_ranks(3, loop, 600.0, at(2, 2, fail), 4)
    assert [rank.exit_code for rank in ended] == [1, 1, 1]
    cause = "rank 2 failed in step 2: KeyError: 'no such reward'"
    assert cause in ended[2].report
    for rank in (0, 1):
        assert f"rank {rank} ends, since {cause}" in ended[rank].report
    for other in (0, 1):  # those that wait are told with the place where they wait
        assert f"rank {other} is alive, at step 2 in" in ended[2].report


def patient(rank: int) -> int:
    """The main rank computes for longer than any silence may last."""
    with Watchdog(1.0):
        return on_main_rank(lambda: time.sleep(2.5) or 7)


def test_waiting_for_a_rank_that_works_is_no_failure() -> None:
    assert run_ranks(3, patient) == [7, 7, 7]


def alone(rank: int) -> int:
    with Watchdog(0.4):
        time.sleep(0.6)
    return rank


def test_one_rank_watches_nobody() -> None:
    assert run_ranks(1, alone) == [0]


def losing(
    rank: int, tensors: Iterable[tuple[str, Tensor]], num_whole: int
) -> Iterator[tuple[str, Tensor]]:
    """What the first rank gathers breaks off after some tensors; the others wait for the next."""
    for number, tensor in enumerate(tensors):
        if rank == 0 and number == num_whole:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        yield tensor


def publish_what_is_lost(rank: int) -> None:
    log_to_report()

    def gathering() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            value = torch.ones(1)
            dist.all_reduce(value)
            yield name, value

    with Watchdog(600.0):
        engine = MainRankEngine(KeepingEngine() if is_main_rank() else None)
        engine.publish(losing(rank, gathering(), 1), version=1)


def save_what_is_lost(rank: int, run_dir: Path) -> None:
    log_to_report()
    parts = build_parts(Case(), PP2, timeout_s=600.0)
    weights = parts.policy.named_weights
    parts.policy.named_weights = lambda: losing(rank, weights(), 3)
    try:
        save_step(parts, run_dir, 1)
    finally:
        parts.close()


def assert_all_ended_by_the_lost_gathering(ended: list[Ended]) -> None:
    """Long before the 600 s after which a collective gives up."""
    assert [rank.exit_code for rank in ended] == [1, 1], ended
    cause = (
        "rank 0 failed in step 1: GatherError: rank 0 failed while all ranks gathered tensors: "
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert cause in ended[0].report
    assert f"rank 1 ends, since {cause}" in ended[1].report


def test_a_gathering_that_fails_on_the_main_rank_alone_ends_all() -> None:
    assert_all_ended_by_the_lost_gathering(ended_ranks(2, publish_what_is_lost))


def test_a_gathering_for_a_checkpoint_that_fails_on_the_main_rank_alone_ends_all(
    tmp_path: Path,
) -> None:
    assert_all_ended_by_the_lost_gathering(ended_ranks(2, save_what_is_lost, tmp_path))
    assert latest_checkpoint(tmp_path) is None


def poisoned(rank: int, name: str, is_weight: bool) -> list[str]:
    """What the rank logs about a step in which one value is NaN."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("flowrl.megatron.optimizer").addHandler(handler)
    case = Case()
    policy = build_policy(case, PP2)
    parameters = dict(policy.chunks[0].module.named_parameters())
    if is_weight and name in parameters:
        parameters[name].data.view(-1)[0] = torch.nan
    policy.accumulate_gradients(make_samples(case.num_samples), make_objective(case))
    if not is_weight and name in parameters:
        parameters[name].main_grad.view(-1)[0] = torch.nan
    grad_norm, is_applied = policy.optimizer.step(4)
    assert grad_norm != grad_norm and not is_applied
    return [record.getMessage() for record in records]


def test_nan_in_a_gradient_is_traced_to_rank_and_parameter() -> None:
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    first, last = run_ranks(2, poisoned, name, False)
    for rank, messages in enumerate((first, last)):  # both stages have a layer of this name
        (message,) = messages
        assert f"rank {rank}, step 5: the gradient norm is nan" in message
        assert "here 1 of" in message and f"last in forward order {name}; " in message
        assert message.endswith("weights: all finite")


def test_nan_in_a_weight_is_traced_to_its_rank() -> None:
    first, last = run_ranks(2, poisoned, "embedding.word_embeddings.weight", True)
    assert first[0].endswith("weights: embedding.word_embeddings.weight")
    assert last[0].endswith("weights: all finite")  # but its gradients are not


def killed_in_save(rank: int, run_dir: Path, num_opens: int) -> None:
    """Save step 1, train on, and die while step 2 is being written."""
    log_to_report()
    case = Case()
    parts = build_parts(case, PP2)
    train_steps(parts.policy, case, 0, 1)
    save_step(parts, run_dir, 1)
    train_steps(parts.policy, case, 1, 2)
    if rank == 0:
        opened = []

        def hook(event: str, args: tuple) -> None:
            if event == "open" and ".tmp-" in str(args[0]) and args[2] & os.O_ACCMODE:
                opened.append(args[0])
                if len(opened) == num_opens:
                    die()

        sys.addaudithook(hook)
    save_step(parts, run_dir, 2)
    parts.close()


@pytest.mark.parametrize("num_opens", [1, 4], ids=["at the start", "among the tensors"])
def test_killed_in_a_save_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, num_opens: int
) -> None:
    ended = ended_ranks(2, killed_in_save, tmp_path, num_opens)
    assert ended[0].exit_code == -signal.SIGKILL, ended[0].report
    assert ended[1].exit_code == 1, ended[1].report
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 1
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


def train_on_ranks(rank: int, overrides: list[str], last_step: int | None) -> None:
    """The whole loop; rank 1 dies in the step after `last_step`."""
    log_to_report()
    make_samples_of_step = training.make_samples
    steps = []

    def make_samples_or_die(*args: Any) -> list:
        steps.append(1)
        if rank == 1 and len(steps) - 1 == last_step:
            die()
        return make_samples_of_step(*args)

    training.make_samples = make_samples_or_die
    training.train(load_config(None, overrides))


def test_a_killed_run_continues_as_if_nothing_had_happened(tiny_sums: Path, tmp_path: Path) -> None:
    changes = (
        "actor.strategy=megatron",
        "parallel.pipeline_model_parallel_size=2",
        "trainer.total_training_steps=3",
        "trainer.save_freq=1",
        "trainer.val_before_train=false",
        "data.val_max_samples=2",
        "rollout.n=2",
    )
    straight = settings(tiny_sums, tmp_path / "straight", *changes)
    killed = settings(tiny_sums, tmp_path / "killed", *changes)
    run_ranks(2, train_on_ranks, straight, None)
    first, second = ended_ranks(2, train_on_ranks, killed, 2)
    assert second.exit_code == -signal.SIGKILL
    assert first.exit_code == 1
    assert "rank 0 failed in step 3: RuntimeError" in first.report
    assert "rank 1 is silent, last seen at step " in first.report
    checkpoint = latest_checkpoint(tmp_path / "killed")
    assert checkpoint is not None and checkpoint.step == 2
    run_ranks(2, train_on_ranks, killed, None)
    assert untimed_rows(tmp_path / "killed") == untimed_rows(tmp_path / "straight")
