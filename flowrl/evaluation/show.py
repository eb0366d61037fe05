"""What a person sees of an evaluation: two tables and a picture of pass@k."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from flowrl.evaluation.results import GraderResult, GroupResult
from flowrl.intervals import Accuracy

PLOT_FILE = "pass_at_k.png"
DOTS_PER_INCH = 100
WIDTH_INCHES, PANEL_HEIGHT_INCHES = 12.0, 4.0
PANELS_PER_ROW = 3
BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#6b7280"
COLOURS = (BLUE, ORANGE)


# Headings of the second table and the measures below them (flowrl/diversity.py).
MEASURES = {
    "right\nanswers": "distinct_correct_answers",
    "right\nforms": "distinct_correct_forms",
    "all\nforms": "distinct_forms",
    "effective\nanswers": "effective_answers",
    "distinct\n2-grams": "distinct_2",
    "self-\nBLEU": "self_bleu",
}


def render(groups: Sequence[GroupResult], model: str) -> Group:
    """The tables of an evaluation; "12.3 +-4.5" is a mean and half of its 95 % interval, in %."""
    n = groups[0].num_samples
    accuracy = Table("task", "grader", box=SIMPLE_HEAD, title=Text(f"accuracy in %, {model}"))
    has_greedy = any(r.greedy for g in groups for r in g.graders.values())
    headings = [f"avg@{n}", f"pass@{n}", f"maj@{n}", *(["greedy"] if has_greedy else [])]
    for heading in (*headings, "no\nanswer"):
        accuracy.add_column(heading, justify="right")
    spread = Table(
        "task",
        box=SIMPLE_HEAD,
        title=f"{n} responses a prompt, means over prompts",
        padding=(0, 1, 0, 0),  # it has many columns
    )
    has_judge = any(group.judge for group in groups)
    for heading in ("items", "tokens", "cut", *MEASURES, *(["judge"] if has_judge else [])):
        spread.add_column(heading, justify="right")
    for group in groups:
        label = Text(_label(group))
        for i, (grader, result) in enumerate(group.graders.items()):
            accuracy.add_row(label if i == 0 else "", grader, *_accuracy(result, n, has_greedy))
        row = [str(group.num_prompts), f"{group.mean_tokens:.0f}", f"{100 * group.truncated:.0f} %"]
        row += [_number(group.diversity.get(key)) for key in MEASURES.values()]
        spread.add_row(label, *row, *([_number(group.judge)] if has_judge else []))
    wholes = [group for group in groups if group.source == "all"]
    notes = [Text(_mean_over_tasks(wholes, n))] if len(wholes) > 1 else []
    notes += [Text(f"{_label(g)}: {g.note}") for g in wholes if g.note]
    notes += [
        Text(f"{_label(g)}: Codeforces rating {_rating(g.rating)}")
        for g in wholes
        if g.rating is not None
    ]
    notes += [
        Text(f"{_label(g)}, {name}: no verdict on {_failures(result)}; they count as wrong")
        for g in wholes
        for name, result in g.graders.items()
        if result.failures
    ]
    return Group(accuracy, spread, *notes)


def _label(group: GroupResult) -> str:
    """A task without the folder of its name; one of its sources, indented."""
    return group.task.rpartition("/")[2] if group.source == "all" else f"  {group.source}"


def _mean_over_tasks(wholes: Sequence[GroupResult], n: int) -> str:
    first = [next(iter(group.graders.values())) for group in wholes]
    avg = sum(100 * result.avg.mean for result in first) / len(first)
    passed = sum(100 * result.pass_at[n].mean for result in first) / len(first)
    return f"mean of the {len(first)} tasks, first grader: avg@{n} {avg:.1f}, pass@{n} {passed:.1f}"


def _accuracy(result: GraderResult, n: int, has_greedy: bool) -> list[str]:
    cells = [_percent(result.avg), _percent(result.pass_at[n]), _percent(result.majority_at.get(n))]
    if has_greedy:
        cells.append(_percent(result.greedy))
    has_answers = bool(result.majority_at)
    return [*cells, f"{100 * result.no_answer:.0f} %" if has_answers else "-"]


def _percent(value: Accuracy | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value.mean:.1f} +-{50 * (value.high - value.low):.1f}"


def _number(value: Accuracy | None) -> str:
    return "-" if value is None else f"{value.mean:.2f}"


def _rating(value: Accuracy) -> str:
    return f"{value.mean:.0f}, 95 % interval {value.low:.0f} to {value.high:.0f}"


def _failures(result: GraderResult) -> str:
    return ", ".join(f"{number} ({kind})" for kind, number in sorted(result.failures.items()))


def plot_pass_at_k(groups: Sequence[GroupResult], path: Path, model: str) -> None:
    """Draw pass@k with 95 % intervals against k, one panel a task, and the first grader's maj@k."""
    wholes = [group for group in groups if group.source == "all"]
    num_rows = -(-len(wholes) // PANELS_PER_ROW)
    num_columns = min(len(wholes), PANELS_PER_ROW)
    width = max(5.0, WIDTH_INCHES * num_columns / PANELS_PER_ROW)
    figure = Figure((width, PANEL_HEIGHT_INCHES * num_rows), DOTS_PER_INCH, layout="constrained")
    figure.suptitle(f"pass@k, {model}", fontsize=12, parse_math=False)
    cells = figure.subplots(num_rows, num_columns, squeeze=False).flatten()
    for axes in cells[len(wholes) :]:
        axes.set_axis_off()
    for axes, group in zip(cells, wholes, strict=False):
        _draw(axes, group)
    temporary = path.with_name(path.name + ".tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    temporary.replace(path)


def _draw(axes: Axes, group: GroupResult) -> None:
    first = next(iter(group.graders.values()))
    ks = sorted(first.pass_at)
    for (grader, result), colour in zip(group.graders.items(), COLOURS, strict=False):
        values = [result.pass_at[k] for k in ks]
        axes.plot(ks, [v.mean for v in values], "o-", color=colour, ms=3.5, label=f"pass, {grader}")
        lows, highs = [v.low for v in values], [v.high for v in values]
        axes.fill_between(ks, lows, highs, color=colour, alpha=0.15, linewidth=0)
    if first.majority_at:
        values = [first.majority_at[k].mean for k in ks]
        axes.plot(ks, values, "s--", color=GREY, ms=3, linewidth=1.2, label="majority")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(k) for k in ks])
    axes.set_ylim(-0.02, 1.02)
    title = f"{_label(group)}, {group.num_prompts} prompts"
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", parse_math=False)
    axes.set_xlabel("k, responses a prompt", fontsize=9)
    axes.set_ylabel("share of the prompts", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="best")
