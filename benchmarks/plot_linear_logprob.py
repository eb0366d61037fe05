"""Draw what bench_linear_logprob.py has written: time and memory against T, time against entropy.

    cd benchmarks/results
    python ../plot_linear_logprob.py linear_logprob_cpu_rows_bfloat16.json \
        linear_logprob_cpu_entropy_bfloat16.json

The results are of one device and one dtype. Time is that of forward and backward. Against T the
logits are Gaussian, the worst case of `drop_mass`; against entropy each of its points names the
share f of (row, tile) pairs that it kept, since the entropy alone does not decide that.
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "head_time.png"
LABELS = {"torch": "materialised PyTorch", "torch.compile": "torch.compile", "cpu": "flowrl, exact"}


def label(row: dict) -> str:
    if row["drop_mass"] > 0:
        return f"flowrl, drop_mass {row['drop_mass']:.1e}"
    return LABELS.get(row["variant"], row["variant"])


def lines(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each variant, by its label; colours stay the same in all panels."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(label(row), []).append(row)
    return found


def draw_rows(panel: Axes, rows: list[dict], colours: dict[str, str], figure: str) -> None:
    for name, points in lines(rows).items():
        points.sort(key=lambda row: row["num_rows"])
        sizes = [row["num_rows"] for row in points]
        if figure == "time":
            values = [row["forward_backward"]["median_ms"] / 1e3 for row in points]
        else:
            values = [max(row["extra_mib"], 1.0) for row in points]
        panel.plot(sizes, values, "o-", color=colours[name], label=name)
    panel.set(xscale="log", yscale="log", xlabel="rows T")
    panel.set_xticks(sorted({row["num_rows"] for row in rows}))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}" if figure == "time" else "")
    panel.xaxis.set_minor_formatter("")


def draw_entropy(panel: Axes, rows: list[dict], colours: dict[str, str]) -> None:
    largest = max(row["drop_mass"] for row in rows)
    for name, points in lines(rows).items():
        points.sort(key=lambda row: row["mean_entropy_nats"])
        nats = [row["mean_entropy_nats"] for row in points]
        ratios = [row["forward_backward"]["ratio"] for row in points]
        panel.plot(nats, ratios, "o-", color=colours[name], label=name)
        for x, y, row in zip(nats, ratios, points, strict=True):
            if row["drop_mass"] > 0:
                panel.annotate(
                    f"f {row['kept_share']:.2g}",
                    (x, y),
                    xytext=(0, -12 if row["drop_mass"] == largest else 6),
                    textcoords="offset points",
                    fontsize=7,
                    ha="center",
                    color=colours[name],
                )
    panel.set(xlabel="mean entropy of the softmax, nats", ylabel="time / materialised PyTorch")
    panel.set(xscale="log", xticks=[row["mean_entropy_nats"] for row in points])
    panel.xaxis.set_major_formatter("{x:.2g}")
    panel.xaxis.set_minor_formatter("")
    panel.margins(x=0.1)
    panel.set_ylim(bottom=0)


def main(
    paths: Annotated[list[Path], typer.Argument(help="JSON of the benchmark")],
    image: Annotated[Path, typer.Option(help="PNG to write")] = IMAGE,
) -> None:
    reports = [json.loads(path.read_text()) for path in paths]
    rows = [row for report in reports for row in report["results"]]
    if len({row["dtype"] for row in rows} | {r["environment"]["device"] for r in reports}) != 2:
        raise ValueError("the results are of several dtypes or devices; draw them one by one")
    against_rows = [r for r in rows if r["states"] is None and r["peak"] == 0]
    against_entropy = [r for r in rows if r["entropy"] > 0]
    names = sorted({label(row) for row in rows})
    colours = {name: f"C{place}" for place, name in enumerate(names)}
    figure, panels = plt.subplots(1, 3, figsize=(13, 3.9))
    draw_rows(panels[0], against_rows, colours, "time")
    panels[0].set(ylabel="forward and backward, s", title="time against T")
    draw_rows(panels[1], against_rows, colours, "memory")
    panels[1].set(ylabel="MiB beyond the gradients", title="memory against T")
    draw_entropy(panels[2], against_entropy, colours)
    panels[2].set(title=f"time against entropy, T {against_entropy[0]['num_rows']}")
    handles = {}
    for panel in panels:
        panel.grid(alpha=0.3)
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=6, fontsize=8)
    facts, first = reports[0]["environment"], rows[0]
    figure.suptitle(
        f"Head of H {first['hidden_size']}, V {first['vocab_size']}, {first['dtype']}; "
        f"{facts['device']} ({facts['cpu_capability']}), {facts['threads']} threads",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(image, dpi=120)
    print(image)


if __name__ == "__main__":
    typer.run(main)
