import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.metrics import (
    MetricsWriter,
    Timer,
    mean_min_max,
    metric_series,
    read_metrics,
)


def open_writer(run_dir: Path, resume_step: int | None = None, loggers=("jsonl",)) -> MetricsWriter:
    return MetricsWriter(
        run_dir,
        loggers,
        project_name="project",
        experiment_name="experiment",
        config={"actor": {"optim": {"lr": 1e-6}}},
        resume_step=resume_step,
    )


def write_steps(run_dir: Path, steps, resume_step: int | None = None) -> None:
    with open_writer(run_dir, resume_step) as writer:
        for step in steps:
            writer.write(step, {"actor/loss": step / 4})


def test_one_json_line_a_step_on_disk_at_once(tmp_path):
    writer = open_writer(tmp_path / "run")
    writer.write(1, {"actor/loss": 0.1, "response_length/max": 7, "actor/lr": -1e-300})
    expected = b'{"step": 1, "actor/loss": 0.1, "response_length/max": 7.0, "actor/lr": -1e-300}\n'
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == expected
    writer.close()
    writer.close()


def test_scalar_tensors_and_numpy_numbers_become_floats(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(0, {"a": torch.tensor(0.5), "b": np.float32(0.25), "c": np.int64(3)})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 0, "a": 0.5, "b": 0.25, "c": 3.0}\n'


def test_non_finite_is_null_and_named_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "flowrl.metrics"), open_writer(tmp_path) as writer:
        writer.write(1, {"flow/weight": math.inf, "flow/ess": 1.0})
        writer.write(2, {"flow/weight": math.nan, "flow/ess": -math.inf})
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "flow/weight": null, "flow/ess": 1.0}\n'
        '{"step": 2, "flow/weight": null, "flow/ess": null}\n'
    )
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "metric flow/weight is inf; non-finite values are written as null",
        "metric flow/ess is -inf; non-finite values are written as null",
    ]


@pytest.mark.parametrize(
    "value",
    ["0.5", None, [1.0], torch.ones(2)],
    ids=["text", "none", "list", "vector"],
)
def test_a_metric_is_one_number(tmp_path, value):
    with open_writer(tmp_path) as writer, pytest.raises(ValueError, match="actor/loss.*one number"):
        writer.write(1, {"actor/loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_step_is_reserved_and_never_goes_back(tmp_path):
    with open_writer(tmp_path) as writer:
        writer.write(2, {"actor/loss": 1.0})
        writer.write(2, {"timing_s/save_checkpoint": 3.0})
        with pytest.raises(ValueError, match="step 1 comes after step 2"):
            writer.write(1, {"actor/loss": 1.0})
        with pytest.raises(ValueError, match='"step" is taken'):
            writer.write(3, {"step": 3.0})
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 2]


@pytest.mark.parametrize(
    "torn", [b"", b'{"step": 6, "actor/lo', b"\0\0\0\0", b'{"step": 6'], ids=repr
)
def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(tmp_path, torn):
    write_steps(tmp_path / "whole", range(8))
    write_steps(tmp_path / "cut", range(6))
    path = tmp_path / "cut/metrics.jsonl"
    path.write_bytes(path.read_bytes() + torn)
    write_steps(tmp_path / "cut", range(4, 8), resume_step=3)
    assert path.read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_resume_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 1.50}\n{"step": 2, "a": 2.0}')
    write_steps(tmp_path, [3], resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (
        b'{"step": 1, "a": 1.50}\n{"step": 2, "a": 2.0}\n{"step": 3, "actor/loss": 0.75}\n'
    )


def test_resume_without_a_file_starts_one_at_the_next_step(tmp_path):
    write_steps(tmp_path, [5], resume_step=4)
    assert read_metrics(tmp_path) == [{"step": 5, "actor/loss": 1.25}]
    with open_writer(tmp_path, 5) as writer, pytest.raises(ValueError, match="after step 5"):
        writer.write(4, {})


def test_a_new_run_sets_earlier_lines_aside(tmp_path, caplog):
    write_steps(tmp_path, [1, 2])
    with caplog.at_level(logging.WARNING, "flowrl.metrics"):
        write_steps(tmp_path, [1])
    assert read_metrics(tmp_path) == [{"step": 1, "actor/loss": 0.25}]
    assert (tmp_path / "metrics.previous.jsonl").read_text().count("\n") == 2
    assert "held an earlier run" in caplog.text


@pytest.mark.parametrize(
    "bad",
    ['{"step": 2, "a', '{"a": 1.0}', "[1]", '{"step": 1.5}'],
    ids=["torn", "-", "list", "1.5"],
)
def test_reading_forgives_only_the_last_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": null}\n' + bad)
    assert read_metrics(tmp_path) == [{"step": 1, "a": None}]
    path.write_text('{"step": 1, "a": null}\n' + bad + '\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is no metrics row"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match="line 2 is no metrics row"):
        open_writer(tmp_path, resume_step=1)


def test_metric_series_skips_rows_without_the_metric():
    rows = [{"step": 0, "b": 1.0}, {"step": 1, "a": 2.0}, {"step": 4, "a": None}]
    steps, values = metric_series(rows, "a")
    assert steps == [1, 4]
    assert values[0] == 2.0 and math.isnan(values[1])


@pytest.mark.parametrize("loggers", [("console",), ("jsonl", "mlflow"), "jsonl"], ids=repr)
def test_unknown_loggers_are_refused(tmp_path, loggers):
    with pytest.raises(ValueError, match="jsonl, tensorboard, wandb"):
        open_writer(tmp_path, loggers=loggers)


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, name, module):
    write_steps(tmp_path, [1])
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {name}"):
        open_writer(tmp_path, loggers=("jsonl", name))
    assert read_metrics(tmp_path) == [{"step": 1, "actor/loss": 0.25}]


def test_tensorboard_receives_finite_values_and_forgets_steps_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, resume_step in ((range(1, 6), None), (range(4, 7), 3)):
        with open_writer(tmp_path, resume_step, ("tensorboard",)) as writer:
            for step in steps:
                loss = step / 4 if resume_step is None else -step
                writer.write(step, {"actor/loss": loss, "flow/weight": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["actor/loss"]
    found = [(event.step, event.value) for event in events.Scalars("actor/loss")]
    assert found == [(1, 0.25), (2, 0.5), (3, 0.75), (4, -4.0), (5, -5.0), (6, -6.0)]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, 1.0, -1.0], torch.tensor([[0, 1], [1, -1]]), torch.tensor([0.0, 1, 1, -1]).half()],
    ids=["list", "int-matrix", "half"],
)
def test_mean_min_max(values):
    assert mean_min_max("critic/score", values) == {
        "critic/score/mean": 0.25,
        "critic/score/max": 1.0,
        "critic/score/min": -1.0,
    }


def test_mean_min_max_sums_in_float64_and_refuses_nothing():
    # In float32 the sum of 2**24 and ones stays at 2**24.
    values = torch.cat([torch.tensor([2.0**24]), torch.ones(3)])
    assert mean_min_max("n", values)["n/mean"] == (2**24 + 3) / 4
    with pytest.raises(ValueError, match="'n' has no values"):
        mean_min_max("n", [])


def test_timer_adds_up_and_records_a_block_that_fails(monkeypatch):
    clock = iter([10.0, 12.5, 20.0, 20.25, 30.0, 31.0])
    monkeypatch.setattr("flowrl.metrics.time.perf_counter", lambda: next(clock))
    timings: dict[str, float] = {}
    with Timer("gen", timings):
        pass
    with Timer("gen", timings):
        pass
    with pytest.raises(KeyError), Timer("reward", timings):
        raise KeyError
    assert timings == {"timing_s/gen": 2.75, "timing_s/reward": 1.0}
