"""The two pictures of the comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

DOTS_PER_INCH = 120
GREY = "#6b7280"
COLOURS = {
    "flow_paper": "#1f5fa8",
    "flow_original": "#5b93cf",
    "flow_recipe": "#86b3e0",
    "flow_cispo": "#b3d0ee",
    "flow_paper_15": "#7c3aed",
    "balance": "#15803d",
    "grpo": "#d9480f",
    "grpo_kl": "#f59e0b",
    "ppo": "#be123c",
    "reinforce_pp": "#7c2d12",
}
# One of each family; the other presets of FlowRL would repeat its panel.
SHOWN = ("flow_paper", "balance", "flow_paper_15", "grpo_kl", "grpo", "ppo", "reinforce_pp")
FLOOR = 1e-5  # of the share axis

Result = Mapping[str, Any]


def _frame(axes: Axes, title: str, xlabel: str, ylabel: str, pad: float = 6) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=pad)
    axes.set_xlabel(xlabel, fontsize=10)
    axes.set_ylabel(ylabel, fontsize=10)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure).print_png(path)


def draw_training(results: Sequence[Result], path: Path) -> None:
    """Success against diversity over training, and the distance to the own target."""
    figure = Figure(figsize=(12.5, 5.2), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    _frame(
        left,
        "Success bought with diversity: up and right is better",
        "probability of a right answer",
        "effective number of right answers",
    )
    for result in results:
        _training_curve(left, result)
    start = results[0]["curve"]
    left.plot(start["success"][0], start["effective_answers"][0], "k*", ms=13, zorder=5)
    left.annotate(
        "start",
        (start["success"][0], start["effective_answers"][0]),
        (-4, 9),
        textcoords="offset points",
        fontsize=9,
    )
    for result in results:
        if result["method"] == "flow_paper" and result["target"] is not None:
            goal = result["target"]
            point = (goal["success"]["mean"], goal["effective_answers"]["mean"])
            left.plot(*point, "*", color=COLOURS["flow_paper"], ms=13, zorder=5)
            left.annotate(
                "FlowRL's target, beta 0.5",
                point,
                (-128, 9),
                textcoords="offset points",
                fontsize=9,
            )
    left.set_ylim(bottom=0)
    left.legend(loc="lower left", fontsize=8.5, frameon=False)

    _frame(right, "Is the target reached?", "training step", "KL(policy || target), nats")
    for result in results:
        pairs = zip(
            result["curve"]["step"],
            result["curve"].get("kl_target", [None] * len(result["curve"]["step"])),
            strict=True,
        )
        points = [(step, value) for step, value in pairs if value is not None]
        if points:
            right.plot(
                *zip(*points, strict=True),
                "o-",
                ms=4,
                color=COLOURS[result["method"]],
                label=result["label"],
            )
    right.set_yscale("log")
    right.legend(fontsize=8.5, frameon=False)
    _save(figure, path)


def _training_curve(axes: Axes, result: Result) -> None:
    """A line over training, and a cross of 95 % intervals at its end."""
    colour, curve, end = COLOURS[result["method"]], result["curve"], result["at_end"]
    axes.plot(
        curve["success"],
        curve["effective_answers"],
        color=colour,
        linewidth=1.8,
        label=result["label"],
    )
    success, effective = end["success"], end["effective_answers"]
    axes.errorbar(
        success["mean"],
        effective["mean"],
        xerr=success["half_width"],
        yerr=effective["half_width"],
        fmt="o",
        ms=5,
        color=colour,
        capsize=2,
    )


def draw_answers(results: Sequence[Result], path: Path) -> None:
    """The right answers to one prompt, before and after, one panel a method."""
    shown = [result for name in SHOWN for result in results if result["method"] == name]
    shown = shown or list(results)
    num_columns = min(4, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure = Figure(
        figsize=(3.3 * num_columns + 0.4, 2.9 * num_rows + 0.6),
        dpi=DOTS_PER_INCH,
        layout="constrained",
    )
    panels = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
    facts = shown[0]["shown"]
    for axes, result in zip(panels.flatten(), shown, strict=False):
        _answer_panel(axes, result)
    for axes in panels.flatten()[len(shown) :]:
        axes.set_axis_off()
    for axes in panels[:, 0]:
        axes.set_ylabel("share of the right answers", fontsize=9)
    figure.suptitle(
        f'Which of the {len(facts["answers"])} right answers to "{facts["prompt"]}" does a trained '
        "policy still give? Grey line: before training; dots: after (seed 0)",
        fontsize=12,
    )
    _save(figure, path)


def _answer_panel(axes: Axes, result: Result) -> None:
    facts, colour = result["shown"], COLOURS[result["method"]]
    before, after = np.array(facts["before"]), np.array(facts["after"])
    places = np.arange(1, len(before) + 1)
    share = after / after.sum()
    heights = np.maximum(share, FLOOR)  # what is rarer stands on the axis
    axes.vlines(places, FLOOR, heights, color=colour, alpha=0.3)
    axes.plot(places, before / before.sum(), color=GREY, linewidth=2, alpha=0.6)
    axes.plot(places, heights, "o", ms=4, color=colour, clip_on=False)
    axes.set_yscale("log")
    axes.set_ylim(FLOOR, 1)
    _frame(axes, result["label"], f"first number of the sum {facts['prompt'][:-1]}", "", pad=18)
    axes.tick_params(labelbottom=True, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    effective = float(np.exp(-(share * np.log(np.maximum(share, 1e-300))).sum()))
    axes.text(
        0,
        1.02,
        f"success {after.sum():.2f}, {effective:.1f} effective answers",
        transform=axes.transAxes,
        fontsize=8.5,
    )
