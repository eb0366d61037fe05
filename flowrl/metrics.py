"""Where the numbers of a run go: one JSON line a step, and TensorBoard or wandb when asked.

`metrics.jsonl` is the record of truth: the plot, the summary and a resumed run read it back.
In a distributed run only rank 0 builds a writer.
"""

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

import torch

METRICS_FILE = "metrics.jsonl"
LOGGERS = ("jsonl", "tensorboard", "wandb")

Row = dict[str, float | None]

logger = logging.getLogger(__name__)


def mean_min_max(name: str, values: torch.Tensor | Sequence[float]) -> dict[str, float]:
    """Summarise values of any shape as `name/mean`, `name/max` and `name/min` (float64 inside).

    Raises ValueError when there is no value.
    """
    flat = torch.as_tensor(values).detach().to(torch.float64).flatten()
    if flat.numel() == 0:
        raise ValueError(f"metric {name!r} has no values; leave it out of a step that has none")
    mean, largest, smallest = torch.stack([flat.mean(), flat.max(), flat.min()]).tolist()
    return {f"{name}/mean": mean, f"{name}/max": largest, f"{name}/min": smallest}


class Timer:
    """Add the wall-clock seconds of a block to `timings["timing_s/<name>"]`.

    Blocks of the same name add up. Work still queued on a GPU is not waited for, so such a
    block should end in something that reads its result.
    """

    def __init__(self, name: str, timings: dict[str, float]) -> None:
        self.key = f"timing_s/{name}"
        self.timings = timings

    def __enter__(self) -> "Timer":
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        elapsed_s = time.perf_counter() - self.started
        self.timings[self.key] = self.timings.get(self.key, 0.0) + elapsed_s


def read_metrics(run_dir: Path | str) -> list[Row]:
    """Rows of `run_dir/metrics.jsonl` in file order; `row["step"]` is an int, null becomes None.

    A torn last line (a run killed while writing) is left out. Raises FileNotFoundError without
    the file, ValueError with the line number for any other line that is no metrics row.
    """
    path = Path(run_dir) / METRICS_FILE
    return [row for _, row in _parse_lines(path)]


def metric_series(rows: Sequence[Row], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric over the rows that have it; null becomes NaN."""
    steps: list[int] = []
    values: list[float] = []
    for row in rows:
        if name in row:
            value = row[name]
            steps.append(_step_of(row))
            values.append(math.nan if value is None else float(value))
    return steps, values


class MetricsWriter:
    """Write each step's metrics to the asked loggers, a subset of jsonl, tensorboard and wandb.

    `resume_step` is the step of the checkpoint that the run continues from: later lines of
    metrics.jsonl and a torn last line are cut away, so the file ends up as if the run had never
    stopped (timings apart). With None the run starts anew, and lines of an earlier run in the
    same directory are moved to metrics.previous.jsonl.

    Raises ValueError for an unknown logger or an unreadable metrics.jsonl, ImportError when a
    logger's package is missing.
    """

    def __init__(
        self,
        run_dir: Path,
        loggers: Sequence[str],
        *,
        project_name: str,
        experiment_name: str,
        config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        _check_loggers(loggers)
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step = 0 if resume_step is None else resume_step
        self._names_seen_non_finite: set[str] = set()
        # Built last, so that a missing package changes nothing on disk, but written first.
        self._sinks: list[_Sink] = []
        if "tensorboard" in loggers:
            self._sinks.append(_TensorBoard(run_dir, config, resume_step))
        if "wandb" in loggers:
            self._sinks.append(_Wandb(run_dir, project_name, experiment_name, config, resume_step))
        if "jsonl" in loggers:
            self._sinks.insert(0, _JsonLines(run_dir / METRICS_FILE, resume_step))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; steps never decrease, and a step may have several rows.

        NaN and infinities become null, reported once per name. Raises ValueError for a step
        that goes back, a value that is no single number, or a metric named "step".
        """
        if step < self._last_step:
            raise ValueError(
                f"step {step} comes after step {self._last_step}; pass resume_step to continue "
                "from an earlier checkpoint"
            )
        row = {name: self._finite_or_none(name, value) for name, value in metrics.items()}
        for sink in self._sinks:
            sink.write(step, row)
        self._last_step = step

    def close(self) -> None:
        """Flush and close every logger; closing twice does no harm."""
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _finite_or_none(self, name: str, value: object) -> float | None:
        if name == "step":
            raise ValueError('the name "step" is taken by the step itself; rename the metric')
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Real):
            raise ValueError(
                f"metric {name!r} is {value!r}; pass one number (mean_min_max reduces several)"
            )
        number = float(value)
        if math.isfinite(number):
            return number
        if name not in self._names_seen_non_finite:
            self._names_seen_non_finite.add(name)
            logger.warning("metric %s is %s; non-finite values are written as null", name, number)
        return None


class _Sink(Protocol):
    def write(self, step: int, row: Row) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    def __init__(self, path: Path, resume_step: int | None) -> None:
        if path.exists() and resume_step is None and path.stat().st_size > 0:
            previous = path.with_name("metrics.previous.jsonl")
            os.replace(path, previous)
            logger.warning("%s held an earlier run; it is now %s", path, previous)
        elif path.exists() and resume_step is not None:
            _cut_after(path, resume_step)
        self._file = open(path, "a", encoding="ascii", newline="\n")  # noqa: SIM115 (kept open)

    def write(self, step: int, row: Row) -> None:
        self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, run_dir: Path, config: dict[str, Any], resume_step: int | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "the logger 'tensorboard' needs its package: pip install tensorboard, "
                "or take it out of trainer.logger"
            ) from error
        # purge_step hides the events that the interrupted run wrote after the checkpoint.
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        if resume_step is None:
            # Indented by four, Markdown shows it verbatim.
            lines = json.dumps(config, indent=2, default=str).splitlines()
            self._writer.add_text("config", "\n".join("    " + line for line in lines), 0)

    def write(self, step: int, row: Row) -> None:
        for name, value in row.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Online or offline as wandb itself is set up (WANDB_MODE, `wandb offline`)."""

    def __init__(
        self,
        run_dir: Path,
        project_name: str,
        experiment_name: str,
        config: dict[str, Any],
        resume_step: int | None,
    ) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ImportError(
                "the logger 'wandb' needs its package: pip install wandb, "
                "or take it out of trainer.logger"
            ) from error
        id_path = run_dir / "wandb_run_id.txt"
        is_resumed = resume_step is not None and id_path.exists()
        self._run = wandb.init(
            project=project_name,
            name=experiment_name,
            config=config,
            dir=str(run_dir),
            id=id_path.read_text().strip() if is_resumed else None,
            resume="allow" if is_resumed else None,
        )
        id_path.write_text(self._run.id + "\n")
        # wandb's own step refuses to go back to a checkpoint, so the x axis is a metric of ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, row: Row) -> None:
        finite = {name: value for name, value in row.items() if value is not None}
        self._run.log({"step": step, **finite})

    def close(self) -> None:
        self._run.finish()


def _check_loggers(loggers: Sequence[str]) -> None:
    unknown = [name for name in loggers if name not in LOGGERS]
    if isinstance(loggers, str) or unknown:
        raise ValueError(
            f"loggers is {loggers!r}; it must be a list of {', '.join(LOGGERS)} "
            "(the console is flowrl.console.TrainingConsole)"
        )


def _parse_lines(path: Path) -> list[tuple[bytes, Row]]:
    """Every whole line with its row; the bytes are kept, so that rewriting changes none."""
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    parsed: list[tuple[bytes, Row]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _step_of(row)
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{path} line {number} is no metrics row: {line[:80]!r}; repair or remove it"
            ) from error
        parsed.append((line, row))
    return parsed


def _step_of(row: Row) -> int:
    step = row["step"]
    if not isinstance(step, int):
        raise TypeError(f"step is {step!r}, not an integer")
    return step


def _cut_after(path: Path, last_step: int) -> None:
    """Keep the lines up to a step; written beside the file, then renamed, so it never tears."""
    kept = [line for line, row in _parse_lines(path) if _step_of(row) <= last_step]
    content = b"".join(line + b"\n" for line in kept)
    if content == path.read_bytes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
