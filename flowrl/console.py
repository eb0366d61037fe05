"""What a person sees: the start banner, the running table, and the summary at the end.

On a terminal the table is live (rich); elsewhere each step is one plain line without control
codes. Model output is never trusted: markup is not interpreted and control characters are
written as escapes.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from rich.box import SIMPLE, SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from flowrl.intervals import Accuracy

WIDTH = 80
NUM_LIVE_ROWS = 12
NUM_LINES_PER_HEADER = 20
MAX_PROMPT_CHARS = 200
MAX_RESPONSE_CHARS = 320


class Column(NamedTuple):
    """One column of the running table: its heading, the metric it shows, its width."""

    label: str
    metric: str
    width: int


# With the step these take 77 of the 80 characters.
DEFAULT_COLUMNS = (
    Column("score", "critic/score/mean", 6),
    Column("flat", "flow/zero_variance_groups", 6),
    Column("len", "response_length/mean", 5),
    Column("log Z", "flow/log_z", 6),
    Column("resid", "flow/residual", 6),
    Column("weight", "flow/weight", 6),
    Column("ESS", "flow/ess", 5),
    Column("entr", "actor/entropy", 5),
    Column("gnorm", "actor/grad_norm", 5),
    Column("tok/s", "perf/throughput", 5),
    Column("s/step", "perf/time_per_step", 6),
)
STEP_COLUMN = Column("step", "step", 5)


@dataclass(frozen=True)
class Example:
    """One held-out prompt with a response from before the training (if any) and one from after."""

    prompt: str
    after: str
    is_after_correct: bool
    before: str | None = None
    is_before_correct: bool = False


def format_number(value: float | None, width: int) -> str:
    """The most precise spelling of a number that fits `width` characters; None is "-"."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(float(value))
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        mantissas = (f"{value:.{digits}e}" for digits in (2, 1, 0))
        spellings = [text.replace("e-0", "e-") for text in mantissas]
    else:
        spellings = [f"{value:.{digits}f}" for digits in (3, 2, 1, 0)]
        for suffix, scale in (("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12)):
            spellings += [f"{value / scale:.{digits}f}{suffix}" for digits in (1, 0)]
    fitting = [text for text in spellings if len(text) <= width]
    return fitting[0] if fitting else f"{value:.0e}"


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def clean_text(text: str, max_chars: int, encoding: str = "utf-8") -> str:
    """Model output as one harmless line of at most about `max_chars` characters.

    White space runs become a space; unprintable characters (control, bidirectional, private)
    and those outside `encoding` become backslash escapes. Of a long text the middle is left out,
    since answers stand at the end.
    """
    line = "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in " ".join(text.split())
    )
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    if len(line) > max_chars:
        num_head = max_chars // 3
        num_cut = len(line) - max_chars
        tail = line[num_head + num_cut :]
        line = f"{line[:num_head]} [... {num_cut} characters ...] {tail}"
    return line or "(empty)"


class TrainingConsole:
    """Show a run's progress; use it as a context manager around the loop.

    `is_live` None means: live on a terminal, plain lines elsewhere. `first_step` is the number
    of steps done before this process began, so the remaining time counts only its own steps.
    """

    def __init__(
        self,
        total_steps: int,
        columns: Sequence[Column] = DEFAULT_COLUMNS,
        is_live: bool | None = None,
        *,
        first_step: int = 0,
        console: Console | None = None,
    ) -> None:
        self._total_steps = total_steps
        self._columns = (STEP_COLUMN, *columns)
        self._console = console or Console()
        if is_live is None:
            # Not rich's is_terminal: FORCE_COLOR, common in CI, makes that true for a log file.
            is_live = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._is_live = is_live
        self._first_step = self._step = first_step
        self._num_lines = 0
        self._validation = ""
        self._rows: list[list[str]] = []
        self._started = time.monotonic()
        self._progress = Progress(
            SpinnerColumn("line"),
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[times]}"),
            TextColumn("{task.fields[phase]}", style="cyan", markup=False),
            console=self._console,
        )
        self._task = self._progress.add_task(
            "", total=total_steps, completed=first_step, phase="", times=self._times()
        )
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> "TrainingConsole":
        self._started = time.monotonic()
        if self._is_live:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_live:
            self._progress.update(self._task, phase="" if error is None else "stopped")
            self._live.stop()

    def phase(self, name: str) -> None:
        """Say what the loop does now, such as "generating"; plain mode stays silent."""
        self._progress.update(self._task, phase=name)
        if self._is_live:
            self._live.refresh()

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Show a finished step, and the held-out accuracy when the metrics have one."""
        self._step = step
        self._progress.update(self._task, completed=step, phase="", times=self._times())
        cells = [format_number(metrics.get(c.metric), c.width) for c in self._columns[1:]]
        cells.insert(0, str(step))
        has_row = any(column.metric in metrics for column in self._columns)
        validation = _validation_text(step, metrics)
        if self._is_live:
            if has_row:
                # A new list, since the refresh thread may be reading the old one.
                self._rows = [*self._rows, cells][-NUM_LIVE_ROWS:]
            self._validation = validation or self._validation
            self._live.refresh()
            return
        if has_row:
            self._print_plain_row(cells)
        if validation:
            print(f"      {validation}", file=self._console.file, flush=True)

    def _print_plain_row(self, cells: list[str]) -> None:
        if self._num_lines % NUM_LINES_PER_HEADER == 0:
            times = f"[{self._step}/{self._total_steps} steps, {self._times()}]"
            header = _plain_line([c.label for c in self._columns], self._columns)
            print(f"{times}\n{header}", file=self._console.file)
        print(_plain_line(cells, self._columns), file=self._console.file, flush=True)
        self._num_lines += 1

    def _times(self) -> str:
        elapsed_s = time.monotonic() - self._started
        num_done = self._step - self._first_step
        if num_done <= 0:
            return f"{format_duration(elapsed_s)} elapsed"
        remaining_s = elapsed_s / num_done * max(self._total_steps - self._step, 0)
        return f"{format_duration(elapsed_s)} elapsed, {format_duration(remaining_s)} left"

    def _render(self) -> Group:
        # Called by the refresh thread four times a second: the times move during a long step.
        self._progress.update(self._task, times=self._times())
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, header_style="bold")
        for column in self._columns:
            table.add_column(column.label, justify="right", min_width=column.width, no_wrap=True)
        for cells in self._rows:
            table.add_row(*[Text(cell) for cell in cells])
        footer = [Text(self._validation, style="green")] if self._validation else []
        return Group(self._progress.get_renderable(), table, *footer)


def print_start(summary: Mapping[str, object], console: Console | None = None) -> None:
    """Print the banner: one `label value` line per item (model, task, objective, device, ...)."""
    console = console or _plain_if_not_terminal()
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in summary.items():
        text = clean_text(str(value), MAX_RESPONSE_CHARS, console.encoding)
        table.add_row(Text(label), Text(text))
    console.print(_rule("flowrl", console))
    console.print(table)


def print_summary(
    before: Accuracy | None,
    after: Accuracy | None,
    examples: Sequence[Example],
    plot_path: Path | None,
    run_dir: Path,
    elapsed_s: float,
    console: Console | None = None,
) -> None:
    """Print what the training changed: held-out accuracy, example responses, where things are."""
    console = console or _plain_if_not_terminal()
    console.print(_rule("summary", console))
    if before is not None or after is not None:
        console.print(_accuracy_table(before, after))
    for number, example in enumerate(examples, start=1):
        console.print(Text(f"example {number} of {len(examples)}", style="bold"))
        console.print(Padding(_example_table(example, console.encoding), (0, 0, 1, 2)))
    console.print(Text(f"elapsed  {format_duration(elapsed_s)}"))
    # Paths are not wrapped, so that they can be copied.
    if plot_path is not None:
        console.print(Text(f"plot     {plot_path}"), soft_wrap=True)
    console.print(Text(f"run      {run_dir}"), soft_wrap=True)


def _accuracy_table(before: Accuracy | None, after: Accuracy | None) -> Table:
    table = Table(box=SIMPLE, header_style="bold")
    table.add_column("held-out")
    table.add_column("accuracy", justify="right")
    table.add_column("95 % interval", justify="right")
    for label, accuracy in (("before", before), ("after", after)):
        if accuracy is not None:
            mean, low, high = (100 * x for x in (accuracy.mean, accuracy.low, accuracy.high))
            table.add_row(label, f"{mean:.1f} %", f"{low:.1f} to {high:.1f} %")
    if before is not None and after is not None:
        delta = 100 * (after.mean - before.mean)
        style = "green" if delta > 0 else "red" if delta < 0 else ""
        table.add_row("change", Text(f"{delta:+.1f} points", style=style), "")
    return table


def _example_table(example: Example, encoding: str) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    prompt = clean_text(example.prompt, MAX_PROMPT_CHARS, encoding)
    table.add_row(Text("prompt", style="cyan"), "", Text(prompt))
    answers = [("after", example.after, example.is_after_correct)]
    if example.before is not None:
        answers.insert(0, ("before", example.before, example.is_before_correct))
    for label, response, is_correct in answers:
        verdict = Text("correct", style="green") if is_correct else Text("wrong", style="red")
        shown = clean_text(response, MAX_RESPONSE_CHARS, encoding)
        table.add_row(Text(label, style="cyan"), verdict, Text(shown))
    return table


def _validation_text(step: int, metrics: Mapping[str, float | None]) -> str:
    accuracy = metrics.get("val/accuracy")
    if accuracy is None:
        return ""
    text = f"step {step}: held-out accuracy {100 * accuracy:.1f} %"
    low, high = metrics.get("val/accuracy_low"), metrics.get("val/accuracy_high")
    if low is None or high is None:
        return text
    return f"{text} (95 %: {100 * low:.1f} to {100 * high:.1f} %)"


def _plain_line(cells: Sequence[str], columns: Sequence[Column]) -> str:
    return " ".join(cell.rjust(column.width) for cell, column in zip(cells, columns, strict=True))


def _rule(title: str, console: Console) -> Padding:
    rule = Rule(Text(title, style="bold"), align="left", characters="-", style="dim")
    return Padding(rule, (0, max(console.width - WIDTH, 0), 0, 0))


def _plain_if_not_terminal() -> Console:
    """rich's console on a terminal; 80 columns without codes elsewhere, FORCE_COLOR or not."""
    console = Console()
    if console.file.isatty():
        return console
    return Console(width=WIDTH, force_terminal=False, color_system=None)
