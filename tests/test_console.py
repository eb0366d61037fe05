import io
import math
import re
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from flowrl.console import (
    Accuracy,
    Example,
    TrainingConsole,
    clean_text,
    format_duration,
    format_number,
    print_start,
    print_summary,
)


@pytest.mark.parametrize(
    ("value", "width", "text"),
    [
        (None, 5, "-"),
        (math.nan, 5, "nan"),
        (-math.inf, 5, "-inf"),
        (0.0, 5, "0"),
        (0.43751, 6, "0.438"),
        (-12.3456, 6, "-12.35"),
        (132.25, 5, "132.2"),
        (12345.6, 5, "12346"),
        (123456.0, 5, "123k"),
        (123456.0, 6, "123456"),
        (-2.5e9, 5, "-2.5G"),
        (1.24e-4, 5, "1e-4"),
        (1.24e-4, 6, "1.2e-4"),
        (-1.25e-12, 6, "-1e-12"),
        (1e300, 5, "1e+300"),
    ],
)
def test_format_number(value, width, text):
    assert format_number(value, width) == text


def test_format_duration():
    assert [format_duration(s) for s in (0.9, 61, 3661.5, 360000)] == [
        "0:00:00",
        "0:01:01",
        "1:01:01",
        "100:00:00",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\n\n b\tc ", "a b c"),
        ("\x1b[2J\x07\x00\x9b", r"\x1b[2J\x07\x00\x9b"),
        ("\u202eabc\u200b\ud800", r"\u202eabc\u200b\ud800"),
        ("[bold red]x[/]", "[bold red]x[/]"),
        (" \n", "(empty)"),
        ("0123456789" * 3, "0123 [... 18 characters ...] 23456789"),
    ],
    ids=["white-space", "control", "bidi", "markup", "empty", "long"],
)
def test_clean_text_is_one_harmless_line(text, expected):
    assert clean_text(text, 100 if len(text) < 30 else 12) == expected


def test_clean_text_escapes_what_the_output_cannot_encode():
    assert clean_text("\u4f60=1", 100, "ascii") == r"\u4f60=1"
    assert clean_text("\u4f60=1", 100, "utf-8") == "\u4f60=1"


STEP_METRICS = {
    "critic/score/mean": -0.5,
    "flow/zero_variance_groups": 0.4375,
    "response_length/mean": 132.25,
    "flow/log_z": 1.5,
    "flow/residual": -12.3456,
    "flow/weight": 1.0,
    "flow/ess": 0.987,
    "actor/entropy": 0.25,
    "actor/grad_norm": 123456.0,
    "perf/time_per_step": 3.21,
}
HEADER = " step  score   flat   len  log Z  resid weight   ESS  entr gnorm tok/s s/step"
STEP_LINE = "    1 -0.500  0.438 132.2  1.500 -12.35  1.000 0.987 0.250  123k     -  3.210"


def test_plain_mode_prints_one_line_a_step(capsys, monkeypatch):
    monkeypatch.setattr("flowrl.console.time.monotonic", lambda: 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with TrainingConsole(40) as console:
        console.step(0, {"val/accuracy": 0.125, "val/accuracy_low": 0.08, "val/accuracy_high": 0.2})
        console.phase("generating")
        console.step(1, STEP_METRICS)
        console.step(2, {"critic/score/mean": 0.0, "val/accuracy": 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "      step 0: held-out accuracy 12.5 % (95 %: 8.0 to 20.0 %)",
        "[1/40 steps, 0:00:00 elapsed, 0:00:00 left]",
        HEADER,
        STEP_LINE,
        "    2      0" + "      -" + "     -" + "      -" * 3 + "     -" * 4 + "      -",
        "      step 2: held-out accuracy 25.0 %",
    ]
    assert len(HEADER) == len(STEP_LINE) <= 80


def test_plain_mode_repeats_the_header_and_estimates_from_its_own_steps(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("flowrl.console.time.monotonic", lambda: now[0])
    with TrainingConsole(100, first_step=50) as console:
        for step in range(51, 93):
            now[0] += 60.0
            console.step(step, STEP_METRICS)
    lines = capsys.readouterr().out.splitlines()
    headers = [number for number, line in enumerate(lines) if line == HEADER]
    assert headers == [1, 23, 45]
    # One minute a step: after step 51, 49 are left; after 71, 29; after 91, 9.
    assert [lines[number - 1] for number in headers] == [
        "[51/100 steps, 0:01:00 elapsed, 0:49:00 left]",
        "[71/100 steps, 0:21:00 elapsed, 0:29:00 left]",
        "[91/100 steps, 0:41:00 elapsed, 0:09:00 left]",
    ]
    assert len(lines) == 42 + 2 * 3


def test_live_mode_ends_with_the_bar_and_the_last_twelve_steps():
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=80)
    with TrainingConsole(40, is_live=True, console=terminal) as console:
        for step in range(1, 21):
            console.phase("generating")
            console.step(
                step, {**STEP_METRICS, "val/accuracy": 0.25} if step == 5 else STEP_METRICS
            )
        console.phase("updating")
    # Each frame begins where the cursor went up over the one before.
    lines = [line.rstrip() for line in screen.getvalue().split("\x1b[2K")[-1].splitlines()]
    assert "step 20/40" in lines[0]
    assert re.search(r"0:00:0\d elapsed, 0:00:0\d left", lines[0])  # a busy machine takes seconds
    assert lines[1] == HEADER
    assert lines[3:15] == [STEP_LINE.replace("    1", f"{step:5d}", 1) for step in range(9, 21)]
    assert lines[15] == "step 5: held-out accuracy 25.0 %"
    assert "updating" not in lines[0]
    assert max(len(line) for line in lines) <= 80


def test_live_mode_shows_the_phase_and_leaves_an_error_visible():
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, color_system=None, width=100)
    with (
        pytest.raises(RuntimeError),
        TrainingConsole(40, is_live=True, console=terminal) as console,
    ):
        console.phase("scoring")
        assert "scoring" in screen.getvalue()
        raise RuntimeError
    assert "stopped" in screen.getvalue().split("\x1b[2K")[-1]
    # The cursor is shown again.
    assert "\x1b[?25h" in screen.getvalue()


def test_banner_shows_values_literally(capsys):
    print_start({"model": "[bold]x[/nope]\x1b[31m", "run dir": Path("runs/a")})
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "flowrl " + "-" * 73,
        r"model    [bold]x[/nope]\x1b[31m",
        "run dir  runs/a",
    ]


def test_summary_survives_any_response_at_80_columns(capsys):
    examples = [
        Example(
            prompt="What is 2+2?\n[/red]",
            before="[/] five\x1b[2J",
            is_before_correct=False,
            after="4 " * 20000 + "so the answer is 4",
            is_after_correct=True,
        ),
        Example(prompt="\u4f60" * 500, after="x" * 5000, is_after_correct=False),
    ]
    plot_path = Path("runs") / ("long" * 30) / "training.png"
    print_summary(
        Accuracy(0.125, 0.081, 0.182),
        Accuracy(0.43, 0.363, 0.499),
        examples,
        plot_path,
        plot_path.parent,
        3661.0,
    )
    text = capsys.readouterr().out
    lines = [line.strip() for line in text.splitlines()]
    assert "before           12.5 %    8.1 to 18.2 %" in lines
    assert "after            43.0 %   36.3 to 49.9 %" in lines
    assert "change     +30.5 points" in lines
    assert "prompt           What is 2+2? [/red]" in lines
    assert r"before  wrong    [/] five\x1b[2J" in lines
    assert any(line.startswith("after   correct  4 4 4") for line in lines)
    assert "so the answer is 4" in text
    assert "example 2 of 2" in lines
    assert lines[-3:] == [
        "elapsed  1:01:01",
        f"plot     {plot_path}",
        f"run      {plot_path.parent}",
    ]
    assert "\x1b" not in text
    # Cells, not characters: an ideograph is two wide. The two paths are left whole.
    assert max(cell_len(line) for line in text.splitlines()[:-2]) <= 80
    # Two examples of at most 200 + 320 characters each, whatever the model wrote.
    assert len(text) < 4000


def test_summary_without_evaluation_or_plot(capsys):
    print_summary(None, None, [], None, Path("runs/a"), 5.0)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["summary " + "-" * 72, "elapsed  0:00:05", "run      runs/a"]


def test_summary_prints_to_an_ascii_stream():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    example = Example(prompt="\u4f60", after="\u00e9", is_after_correct=True)
    print_summary(
        None,
        Accuracy(1.0, 0.9, 1.0),
        [example],
        None,
        Path("runs/a"),
        5.0,
        Console(file=stream, width=80),
    )
    text = raw.getvalue().decode("ascii")
    assert r"\u4f60" in text and r"correct  \xe9" in text
