"""Does FlowRL match the distribution? Exact answers, on a policy small enough to enumerate.

    python examples/distribution_matching/run.py

Trains every method from the same policies with the same budget, first at each learning rate of
one grid on seeds of their own, then at the chosen rate on fresh seeds, and measures by listing all
answers. Every finished run is a file, so the command continues where it was stopped.
"""

import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from exact import Cells, answer_measures, cell_logprobs, cells_of, divergence, right_logprobs
from methods import GROUP_SIZE, METHODS, Method
from report import MAX_SEEDS, Record, choose_rates, write_report
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.config import load_config
from flowrl.files import write_whole
from flowrl.parts import TorchParts
from flowrl.policy.enumerate import exact_success
from flowrl.policy.tiny import build_tiny_sums
from flowrl.rewards import RewardRequest, RewardResult, expression
from flowrl.run import Run, start
from flowrl.settings import Config

ROOT = Path(__file__).resolve().parents[2]
RATES = (3e-4, 1e-3, 1e-4)
FIRST_TUNING_SEED = 100  # the reported seeds start at 0
MEASURE_EVERY, DIVERGENCE_EVERY = 5, 50  # training steps
SHOWN_TARGET = 21  # the prompt whose answers are kept one by one


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str
    lr: float
    seed: int
    steps: int
    model: str

    @property
    def file_name(self) -> str:
        return f"{self.method}_lr{self.lr:g}_seed{self.seed}_steps{self.steps}.json"


def start_policy(home: Path, seed: int) -> None:
    """Make the policy that every method starts from with this seed.

    One for each, since supervision has luck of its own, and another kind of processor, which rounds
    otherwise, gets another policy from the same seed: the intervals are to count both.
    """
    if home.exists():
        return
    home.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{home.name}-", dir=home.parent))
    try:
        build_tiny_sums(scratch, seed=seed)
        os.replace(scratch, home)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def config_of(job: Job, folder: str) -> Config:
    """The settings of one run: the same budget for all, then the method's own."""
    return load_config(
        ROOT / "configs" / "tiny.yaml",
        [
            f"model.path={job.model}",
            f"rollout.n={GROUP_SIZE}",
            "flow.old_logprobs=rollout",  # the engine is the policy: saves a pass a step
            f"actor.optim.lr={job.lr}",
            # The value network is as new as Z, so it gets the rate of Z.
            "critic.optim={lr: 1.0e-3, weight_decay: 0.0}",
            "reward.num_workers=1",
            f"trainer.seed={job.seed}",
            f"trainer.total_training_steps={job.steps}",
            "trainer.num_threads=1",
            "trainer.device=cpu",
            "trainer.logger=[]",
            f"trainer.default_local_dir={folder}",
            *METHODS[job.method].overrides,
        ],
    )


class DirectRewards:
    """The reward of `sums` in this process: a parser of ten characters needs no isolation.

    The 128 messages a step to and from a worker would take a fifth of its time.
    """

    def score(self, requests: list[RewardRequest]) -> list[RewardResult]:
        return [
            RewardResult(expression.compute_score(r.data_source, r.solution, r.ground_truth))
            for r in requests
        ]

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


@contextmanager
def started_run(config: Config) -> Iterator[tuple[Run, PreTrainedModel]]:
    """A run that scores directly, and its policy's model."""
    with start(config) as run:
        assert isinstance(run.parts, TorchParts)
        run.rewards.close()
        run.parts.rewards = DirectRewards()
        yield run, run.parts.policy.model


@dataclass(frozen=True)
class Yardstick:
    """The cells of the prompts trained on, and what the reference and the target give them."""

    cells: list[Cells]
    references: list[Tensor]  # [R + 1] a prompt, or [N - 1] where there is no target
    targets: list[Tensor] | None  # [R + 1] a prompt; None for a method without a known one


def yardstick_of(run: Run, model: PreTrainedModel, method: Method) -> Yardstick:
    """Measure the policy before training, and derive the target."""
    numbers = sorted(int(p.prompt.ground_truth) for p in run.train_prompts)
    cells = [cells_of(run.tokenizer, number) for number in numbers]
    if method.target is None:
        return Yardstick(cells, [right_logprobs(model, c) for c in cells], None)
    references = [cell_logprobs(model, c) for c in cells]
    targets = [
        method.target(reference, c.is_right, c.lengths)
        for reference, c in zip(references, cells, strict=True)
    ]
    return Yardstick(cells, references, targets)


def mean_measures(yardstick: Yardstick, policies: Sequence[Tensor]) -> dict[str, float]:
    """answer_measures of a policy's log-probs, [N - 1] or [R + 1] a prompt, meaned over prompts."""
    rows = [
        answer_measures(logprobs[: c.num_right], reference[: c.num_right])
        for c, reference, logprobs in zip(
            yardstick.cells, yardstick.references, policies, strict=True
        )
    ]
    return {name: mean(row[name] for row in rows) for name in rows[0]}


def policies_of(model: PreTrainedModel, yardstick: Yardstick, is_whole: bool) -> list[Tensor]:
    """The policy as it is now: [R + 1] a prompt, or [N - 1], which is cheaper."""
    logprobs_of = cell_logprobs if is_whole else right_logprobs
    return [logprobs_of(model, c) for c in yardstick.cells]


def measured(yardstick: Yardstick, policies: Sequence[Tensor]) -> dict[str, float]:
    """All measures of a policy; the distance from the target if [R + 1] a prompt are given."""
    row = mean_measures(yardstick, policies)
    if yardstick.targets is not None and len(policies[0]) == len(yardstick.targets[0]):
        row["kl_target"] = mean(map(divergence, policies, yardstick.targets))
        row["other_text"] = mean(float(logprobs[-1].exp()) for logprobs in policies)
    return row


def held_out(run: Run, model: PreTrainedModel) -> dict[str, float]:
    """Success and diversity on the prompts that were not trained on."""
    numbers = [int(p.prompt.ground_truth) for p in run.val_prompts]
    pairs = [exact_success(model, run.tokenizer, number) for number in numbers]
    return {
        "success": mean(success for success, _ in pairs),
        "effective_answers": mean(effective for _, effective in pairs),
    }


def shown_answers(model: PreTrainedModel, yardstick: Yardstick) -> dict[str, Any]:
    """The probability of every right answer to one prompt: before, now and at the target."""
    place = [c.target for c in yardstick.cells].index(SHOWN_TARGET)
    cells, targets = yardstick.cells[place], yardstick.targets
    count = cells.num_right
    return {
        "prompt": f"{SHOWN_TARGET}=",
        "answers": cells.answers[:count],
        "before": yardstick.references[place][:count].exp().tolist(),
        "after": right_logprobs(model, cells).exp().tolist(),
        "target": None if targets is None else targets[place][:count].exp().tolist(),
    }


def trained(job: Job) -> Record:
    """Train, and measure on the way."""
    started = time.perf_counter()
    method = METHODS[job.method]
    with (
        tempfile.TemporaryDirectory() as folder,
        started_run(config_of(job, folder)) as (run, model),
    ):
        yardstick = yardstick_of(run, model, method)
        targets = yardstick.targets
        curve = [{"step": 0, **measured(yardstick, yardstick.references)}]
        while run.step < job.steps:
            method.step(run)
            is_last = run.step == job.steps
            if is_last or run.step % MEASURE_EVERY == 0:
                is_whole = targets is not None and (is_last or run.step % DIVERGENCE_EVERY == 0)
                policies = policies_of(model, yardstick, is_whole)
                curve.append({"step": run.step, **measured(yardstick, policies)})
        return {
            **asdict(job),
            "reference": run.parts.reference_fingerprint,
            "trained_on": [c.target for c in yardstick.cells],
            "curve": curve,
            "held_out": held_out(run, model),
            "target": None if targets is None else mean_measures(yardstick, targets),
            "shown": shown_answers(model, yardstick),
            "elapsed_s": time.perf_counter() - started,
        }


def end_with_parent() -> None:
    """In a worker: exit when the command is killed, instead of waiting for work for ever."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def finished(
    jobs: Sequence[Job], folder: Path, pool: ProcessPoolExecutor, what: str
) -> list[Record]:
    """The records of all jobs: read where they exist, else trained, some at a time."""
    missing = [job for job in jobs if not (folder / job.file_name).exists()]
    num_done = len(jobs) - len(missing)
    print(f"{what}: {len(jobs)} runs, {num_done} of them finished earlier", flush=True)
    started = time.perf_counter()
    futures = {pool.submit(trained, job): job for job in missing}
    try:
        for num_new, future in enumerate(as_completed(futures), start=1):
            job, record = futures[future], future.result()
            write_whole(folder / job.file_name, json.dumps(record, indent=1) + "\n")
            left_s = (time.perf_counter() - started) / num_new * (len(missing) - num_new)
            last = record["curve"][-1]
            print(
                f"[{num_done + num_new}/{len(jobs)}] {job.method} lr {job.lr:g} seed {job.seed}: "
                f"success {last['success']:.3f}, {last['effective_answers']:.1f} answers, "
                f"{record['elapsed_s']:.0f} s; about {left_s / 60:.0f} min left",
                flush=True,
            )
    finally:  # after an error or an interrupt, do not train the rest before saying so
        for future in futures:
            future.cancel()
    return [json.loads((folder / job.file_name).read_text(encoding="utf-8")) for job in jobs]


def main(
    folder: Annotated[Path, typer.Option(help="finished runs are kept here")] = Path(
        "runs/distribution_matching"
    ),
    methods: Annotated[list[str], typer.Option("--method", help="default: all")] = list(METHODS),  # noqa: B006
    seeds: Annotated[int, typer.Option(help="reported seeds a method")] = 5,
    tuning_seeds: Annotated[int, typer.Option(help="seeds a learning rate")] = 2,
    rates: Annotated[list[float], typer.Option("--rate", help="learning rates")] = list(RATES),  # noqa: B006
    steps: Annotated[int, typer.Option(help="training steps")] = 200,
    processes: Annotated[int, typer.Option(help="runs at a time, one thread each")] = 2,
    model: Annotated[
        str | None, typer.Option(help="the policy to start from; default: one for each seed")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="root of the tables, record and pictures; default: the folder"),
    ] = None,
) -> None:
    if unknown := set(methods) - set(METHODS):
        raise typer.BadParameter(f"no method {sorted(unknown)}; there are {', '.join(METHODS)}")
    if not 1 <= seeds <= MAX_SEEDS:
        raise typer.BadParameter(f"--seeds is {seeds}; give 1 to {MAX_SEEDS}, as the t table has")
    tuned_on = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning_seeds)
    homes = {seed: folder / "policies" / f"seed{seed}" for seed in (*tuned_on, *range(seeds))}

    def job(method: str, lr: float, seed: int) -> Job:
        return Job(method, lr, seed, steps, str(homes[seed]) if model is None else model)

    tuning_jobs = [
        job(method, lr, seed)
        for seed, lr, method in itertools.product(tuned_on, rates, methods)
        if len(rates) > 1  # else there is nothing to choose
    ]
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, end_with_parent) as pool:
        if model is None:
            list(pool.map(start_policy, homes.values(), homes.keys()))
        tuning = finished(tuning_jobs, folder, pool, "choosing learning rates")
        chosen = dict.fromkeys(methods, rates[0]) | choose_rates(tuning)
        jobs = [
            job(method, chosen[method], seed)
            for seed, method in itertools.product(range(seeds), methods)
        ]
        records = finished(jobs, folder, pool, "reported runs")
    write_report(records, tuning, folder if out is None else out)


if __name__ == "__main__":
    typer.run(main)
