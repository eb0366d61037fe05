"""Draw time against the share of pairs kept, from what bench_linear_logprob.py has written.

    python benchmarks/plot_linear_logprob.py benchmarks/results/linear_logprob_cpu_*.json

One panel per dtype: forward and backward as a ratio to materialised PyTorch, the exact backward as
a line across, `drop_mass` as points.
"""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "head_time.png"


def main(
    paths: Annotated[list[Path], typer.Argument(help="JSON of the benchmark")],
    image: Annotated[Path, typer.Option(help="PNG to write")] = IMAGE,
) -> None:
    reports = [json.loads(path.read_text()) for path in paths]
    rows = [row for report in reports for row in report["results"]]
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(5 * len(dtypes), 3.6), sharey=True, squeeze=False
    )
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        chosen = [row for row in rows if row["dtype"] == dtype]
        for drop_mass in sorted({row["drop_mass"] for row in chosen} - {0.0}):
            points = sorted(
                (row["kept_share"], row["forward_backward"]["ratio"])
                for row in chosen
                if row["drop_mass"] == drop_mass
            )
            label = f"drop_mass = {drop_mass:.1e}"
            panel.plot(*zip(*points, strict=True), "o-", label=label)
        exact = [r["forward_backward"]["ratio"] for r in chosen if r["variant"] == "cpu"]
        if exact:
            panel.axhspan(min(exact), max(exact), color="0.85", label="exact, all inputs")
        panel.axhline(1, color="0.4", linewidth=1, linestyle="--", label="materialised PyTorch")
        panel.set(xscale="log", xlabel="share of (row, tile) pairs kept", title=dtype)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("forward and backward / PyTorch")
    panels[0][-1].legend(fontsize=8)
    facts = reports[0]["environment"]
    first = rows[0]
    figure.suptitle(
        f"Head of T {first['num_rows']}, H {first['hidden_size']}, V {first['vocab_size']}; "
        f"{facts['device']}, {facts['threads']} threads",
        fontsize=10,
    )
    figure.tight_layout()
    figure.savefig(image, dpi=120)
    print(image)


if __name__ == "__main__":
    typer.run(main)
