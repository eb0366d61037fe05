"""One picture of a run, drawn from its metrics.jsonl: is it learning, and is it healthy?"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from flowrl.config import load_config
from flowrl.metrics import METRICS_FILE, Row, metric_series, read_metrics

PLOT_FILE = "training.png"
WIDTH_PIXELS, HEIGHT_PIXELS = 1400, 800
DOTS_PER_INCH = 100
NUM_PANELS = 6

BLUE, ORANGE, GREEN, GREY = "#1f5fa8", "#d9730d", "#2f855a", "#6b7280"

Series = tuple[np.ndarray, np.ndarray]


class Panel(NamedTuple):
    """One plot: shown when any of its `metrics` has a value."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    draw: Callable[[Axes, Sequence[Row]], None]


def plot_run(run_dir: Path | str, title: str | None = None) -> Path:
    """Draw `run_dir/metrics.jsonl` as `run_dir/training.png` (1400 x 800 pixels) and return it.

    Faint lines are the recorded values, strong ones their centred rolling mean; null and missing
    values leave gaps. `title` None names objective, task and model from `run_dir/config.yaml`.
    Raises FileNotFoundError without metrics.jsonl, ValueError when it has no row to draw.
    """
    run_dir = Path(run_dir)
    rows = read_metrics(run_dir)
    panels = [panel for panel in PANELS if any(_has_values(rows, name) for name in panel.metrics)]
    if not panels:
        raise ValueError(
            f"{run_dir / METRICS_FILE} has {len(rows)} rows and none of the plotted metrics; "
            "plot after the first training step, with the jsonl logger on"
        )
    figure = Figure(
        figsize=(WIDTH_PIXELS / DOTS_PER_INCH, HEIGHT_PIXELS / DOTS_PER_INCH),
        dpi=DOTS_PER_INCH,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.03),  # inches
    )
    # Model names may hold $ signs, which would start a formula.
    figure.suptitle(title or _title_from_config(run_dir), fontsize=14, parse_math=False)
    cells = figure.subplots(2, NUM_PANELS // 2).flatten()
    for axes in cells[len(panels) :]:
        axes.set_axis_off()
    all_steps = [step for row in rows if (step := row["step"]) is not None]
    first, last = min(all_steps), max(all_steps)
    margin = max(0.5, 0.03 * (last - first))
    for axes, panel in zip(cells, panels, strict=False):
        _frame(axes, panel.title, panel.unit)
        axes.set_xlim(first - margin, last + margin)
        panel.draw(axes, rows)
        _legend(axes)
    path = run_dir / PLOT_FILE
    temporary = path.with_name(PLOT_FILE + ".tmp")
    FigureCanvasAgg(figure).print_png(temporary)
    temporary.replace(path)
    return path


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over up to `window` neighbours (fewer at the ends), ignoring NaN; float64."""
    is_known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_known)])
    centres = np.arange(len(values))
    starts = np.maximum(centres - (window - 1) // 2, 0)
    stops = np.minimum(centres + window // 2 + 1, len(values))
    num_known = counts[stops] - counts[starts]
    means = (sums[stops] - sums[starts]) / np.maximum(num_known, 1)
    return np.where(num_known > 0, means, np.nan)


def _draw_score(axes: Axes, rows: Sequence[Row]) -> None:
    _curve(axes, _series(rows, "critic/score/mean"), BLUE, "train")
    steps, accuracy = _series(rows, "val/accuracy")
    if len(steps) == 0:
        return
    # Through a dictionary, since a row may lack the interval.
    low = dict(zip(*_series(rows, "val/accuracy_low"), strict=True))
    high = dict(zip(*_series(rows, "val/accuracy_high"), strict=True))
    below = [
        max(mean - low.get(step, mean), 0.0) for step, mean in zip(steps, accuracy, strict=True)
    ]
    above = [
        max(high.get(step, mean) - mean, 0.0) for step, mean in zip(steps, accuracy, strict=True)
    ]
    axes.errorbar(
        steps,
        accuracy,
        yerr=[below, above],
        color=ORANGE,
        marker="o",
        markersize=4,
        capsize=3,
        linewidth=1.2,
        label="held-out (95 %)",
    )


def _draw_log_z(axes: Axes, rows: Sequence[Row]) -> None:
    _curve(axes, _series(rows, "flow/log_z"), BLUE, "mean")
    _curve(axes, _series(rows, "flow/log_z_stationary"), ORANGE, "stationary", style="--")


def _draw_residual(axes: Axes, rows: Sequence[Row]) -> None:
    steps, mean = _series(rows, "flow/residual")
    std_steps, std = _series(rows, "flow/residual_std")
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    _curve(axes, (steps, mean), BLUE, "mean")
    if np.array_equal(steps, std_steps):
        window = _window(len(steps))
        centre, spread = rolling_mean(mean, window), rolling_mean(std, window)
        axes.fill_between(
            steps,
            centre - spread,
            centre + spread,
            color=BLUE,
            alpha=0.15,
            linewidth=0,
            label="\u00b1 1 std of the responses",
        )


def _draw_weight(axes: Axes, rows: Sequence[Row]) -> None:
    _curve(axes, _series(rows, "flow/weight"), BLUE, "mean", zoom=True)
    shares = [
        (_series(rows, "flow/ess"), GREEN, "ESS (right)"),
        (_series(rows, "flow/clipfrac"), ORANGE, "clipped (right)"),
    ]
    known = [values[np.isfinite(values)] for (_, values), _, _ in shares]
    highest = max((float(values.max()) for values in known if len(values)), default=None)
    if highest is None:
        return
    right = axes.twinx()
    right.set_ylabel("share of the batch", fontsize=9)
    right.tick_params(labelsize=8)
    right.spines[["top", "left"]].set_visible(False)
    for series, colour, label in shares:
        _curve(right, series, colour, label)
        axes.plot([], [], color=colour, linewidth=2, label=label)  # one legend for both scales
    right.set_ylim(-0.03, max(1.03, 1.05 * highest))


def _draw_one(axes: Axes, rows: Sequence[Row], name: str) -> None:
    _curve(axes, _series(rows, name), BLUE, zoom=True)


def _panel_of_one(title: str, unit: str, name: str) -> Panel:
    return Panel(title, unit, (name,), partial(_draw_one, name=name))


# The first six with data are drawn.
PANELS = (
    Panel("Score", "score", ("critic/score/mean", "val/accuracy"), _draw_score),
    Panel("log Z", "nats", ("flow/log_z", "flow/log_z_stationary"), _draw_log_z),
    Panel("Residual", "nats", ("flow/residual",), _draw_residual),
    Panel("Weight", "importance weight", ("flow/weight", "flow/ess"), _draw_weight),
    _panel_of_one("Entropy", "nats per token", "actor/entropy"),
    _panel_of_one("Response length", "tokens", "response_length/mean"),
    _panel_of_one("Gradient norm", "L2 norm before clipping", "actor/grad_norm"),
    _panel_of_one("Loss", "loss", "actor/loss"),
    _panel_of_one("Mismatch", "nats per token", "mismatch/logprob_abs_diff_mean"),
)


def _title_from_config(run_dir: Path) -> str:
    path = run_dir / "config.yaml"
    if not path.exists():
        return run_dir.resolve().name
    config = load_config(path)
    objective = f"{config.algorithm.objective} ({config.flow.preset})"
    return f"{objective} on {config.data.task}, {Path(config.model.path).name}"


def _series(rows: Sequence[Row], name: str) -> Series:
    steps, values = metric_series(rows, name)
    return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)


def _has_values(rows: Sequence[Row], name: str) -> bool:
    return any(row.get(name) is not None for row in rows)


def _window(num_points: int) -> int:
    return min(max(num_points // 20, 1), 200)


def _curve(
    axes: Axes, series: Series, colour: str, label: str = "", style: str = "-", zoom: bool = False
) -> None:
    steps, values = series
    if not np.isfinite(values).any():
        return
    window = _window(len(values))
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.25)
    # A run of one step is a point: without a marker it would be invisible.
    marker = "o" if len(values) <= 30 else ""
    means = rolling_mean(_zoomed(axes, values) if zoom else values, window)
    axes.plot(steps, means, style, color=colour, linewidth=1.8, marker=marker, ms=3.5, label=label)


def _zoomed(axes: Axes, values: np.ndarray) -> np.ndarray:
    """Zoom in, and say so, where fewer than 1 % of a lone curve's values would flatten the others.

    Returns the values with those off the scale as NaN: one of them would lift the rolling mean
    off the scale too.
    """
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, [0.5, 99.5])
    if len(known) < 100 or low == high or np.ptp(known) < 4 * (high - low):
        return values
    margin = 0.25 * (high - low)
    is_hidden = (values < low - margin) | (values > high + margin)
    axes.set_ylim(low - margin, high + margin)
    axes.text(
        0.99,
        0.02,
        f"{is_hidden.sum()} of {len(known)} values off scale, up to {np.abs(known).max():.3g}",
        transform=axes.transAxes,
        ha="right",
        fontsize=8,
        color=GREY,
    )
    return np.where(is_hidden, np.nan, values)


def _frame(axes: Axes, name: str, unit: str) -> None:
    axes.set_title(name, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    """Above the panel, beside its title, where it can cover no data."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        axes.legend(
            handles,
            labels,
            loc="lower right",
            bbox_to_anchor=(1.02, 0.99),
            ncols=len(labels),
            fontsize=8,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.0,
        )
