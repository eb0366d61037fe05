"""Tiny training runs on the task `sums`, and the `flowrl` command inside this process."""

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import torch

from flowrl.cli import main
from flowrl.config import dump_config, load_config
from flowrl.metrics import read_metrics
from flowrl.run import Run
from flowrl.train import train

BASE = (
    "data.task=sums",
    "data.chat_template=false",
    "data.train_batch_size=4",
    "data.max_prompt_length=8",
    "data.max_response_length=7",
    "model.dtype=float32",
    "rollout.n=4",
    "actor.ppo_mini_batch_size=4",
    "actor.ppo_max_token_len_per_gpu=256",
    "actor.optim.lr=1e-3",
    "actor.optim.lr_warmup_steps=2",
    "actor.optim.weight_decay=0",
    "flow.beta=5",
    "flow.z_lr=1e-2",
    "reward.num_workers=1",
    "validation.n=1",
    "validation.greedy=false",
    "trainer.device=cpu",
    "trainer.num_threads=1",
    "trainer.logger=[jsonl]",
)
# Wall-clock times and what is divided by them; every other metric repeats to the last bit.
TIMED = ("timing_s/", "perf/time_per_step", "perf/throughput")


def settings(model: Path, run_dir: Path, *changes: str) -> list[str]:
    """Overrides of a whole run; later ones win."""
    return [*BASE, f"model.path={model}", f"trainer.default_local_dir={run_dir}", *changes]


@contextmanager
def kept_threads() -> Iterator[None]:
    """trainer.num_threads acts on the whole process, and the next test wants its own number."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def trained(model: Path, run_dir: Path, *changes: str) -> Run:
    """Train in this process."""
    with kept_threads():
        return train(load_config(None, settings(model, run_dir, *changes)))


def config_file(path: Path, model: Path, run_dir: Path, *changes: str) -> Path:
    """Write the YAML file of a run."""
    text = dump_config(load_config(None, settings(model, run_dir, *changes)))
    path.write_text(text, encoding="utf-8")
    return path


def training_rows(run_dir: Path) -> list[dict]:
    """The metrics of the training steps, without the evaluation before them."""
    return [row for row in read_metrics(run_dir) if "actor/loss" in row]


def untimed_rows(run_dir: Path) -> list[dict]:
    """All metrics that a repeated run has to repeat."""
    return [
        {name: value for name, value in row.items() if not name.startswith(TIMED)}
        for row in read_metrics(run_dir)
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file under a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def cli(*arguments: str | Path) -> tuple[int, str, str]:
    """Run `flowrl` with these arguments; its exit code, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    earlier, sys.argv = sys.argv, ["flowrl", *map(str, arguments)]
    level = logging.getLogger("flowrl").level
    code: object = 0
    try:
        with kept_threads(), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = earlier
        logging.getLogger("flowrl").setLevel(level)
    assert isinstance(code, int)
    return code, out.getvalue(), err.getvalue()


def refused(*arguments: str | Path) -> str:
    """The one line with which `flowrl` refuses its input."""
    code, _, err = cli(*arguments)
    assert code == 2, err
    assert "Traceback" not in err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")
