import json

import numpy as np
import pytest
from matplotlib import image

from flowrl.config import dump_config, load_config
from flowrl.plots import plot_run, rolling_mean


def test_rolling_mean_is_centred_shrinks_at_the_ends_and_skips_nan():
    values = np.array([1.0, 2.0, np.nan, 6.0, 10.0])
    np.testing.assert_array_equal(rolling_mean(values, 3), [1.5, 1.5, 4.0, 8.0, 8.0])
    np.testing.assert_array_equal(rolling_mean(values, 1), values)
    # An even window leans one to the right.
    np.testing.assert_array_equal(rolling_mean(np.arange(4.0), 2), [0.5, 1.5, 2.5, 3.0])
    np.testing.assert_array_equal(rolling_mean(np.array([np.nan, np.nan, 4.0]), 2), [np.nan, 4, 4])


FLOW_NAMES = (
    "critic/score/mean",
    "flow/log_z",
    "flow/log_z_stationary",
    "flow/residual",
    "flow/residual_std",
    "flow/weight",
    "flow/ess",
    "flow/clipfrac",
    "actor/entropy",
    "response_length/mean",
)


def make_rows(num_steps: int, names=FLOW_NAMES) -> list[dict]:
    noise = np.random.default_rng(0).random((num_steps, len(names)))
    return [
        {"step": i + 1, **dict(zip(names, map(float, noise[i]), strict=True))}
        for i in range(num_steps)
    ]


def with_nulls(rows: list[dict]) -> list[dict]:
    for row in rows[::2]:
        row["flow/residual"] = row["flow/ess"] = None
    for row in rows:
        row["flow/log_z"] = None
    return rows


def with_outliers(rows: list[dict]) -> list[dict]:
    rows[100]["actor/entropy"] = 1e6
    return rows


VALIDATION = {"val/accuracy": 0.5, "val/accuracy_low": 0.4, "val/accuracy_high": 0.6}


@pytest.mark.parametrize(
    "rows",
    [
        make_rows(1),
        [{"step": 0, **VALIDATION}],
        [{"step": 0, **VALIDATION}, *make_rows(40), {"step": 40, "val/accuracy": 0.75}],
        with_nulls(make_rows(60)),
        make_rows(25, ("actor/loss", "actor/grad_norm")),
        with_outliers(make_rows(10_000)),
    ],
    ids=["one-step", "validation-only", "validation", "nulls", "no-flow-metrics", "10k-steps"],
)
def test_plot_is_a_picture_of_1400_by_800_pixels(tmp_path, rows):
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    path = plot_run(tmp_path)
    assert path == tmp_path / "training.png"
    pixels = image.imread(path)
    assert pixels.shape == (800, 1400, 4)
    # Something is drawn in colour: blue curves, or the orange of the validation.
    is_coloured = np.ptp(pixels[:, :, :3], axis=2) > 0.3
    assert is_coloured.sum() > 20
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["metrics.jsonl", "training.png"]


def test_plot_takes_its_title_from_the_config(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(make_rows(1)[0]) + "\n")
    overrides = ["model.path=models/Tiny-$1", "data.task=reasoning_gym/x", "flow.preset=recipe"]
    (tmp_path / "config.yaml").write_text(dump_config(load_config(None, overrides)))
    from_config = plot_run(tmp_path).read_bytes()
    title = "flow_balance (recipe) on reasoning_gym/x, Tiny-$1"
    assert plot_run(tmp_path, title).read_bytes() == from_config
    assert plot_run(tmp_path, "another").read_bytes() != from_config


def test_plot_needs_something_to_draw(tmp_path):
    with pytest.raises(FileNotFoundError):
        plot_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "timing_s/gen": 1.0}\n')
    with pytest.raises(ValueError, match="1 rows and none of the plotted metrics"):
        plot_run(tmp_path)
