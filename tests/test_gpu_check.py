"""benchmarks/gpu_check.sh with a stand-in for Python: which steps run, and within which limits."""

import os
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_check.sh"
STAND_IN = '#!/bin/bash\necho "$@" >>"$LOG"\ncase "$*" in\n{cases}*) exit 0 ;;\nesac\n'


def stand_in(path: Path, cases: str = "") -> Path:
    path.write_text(STAND_IN.format(cases=cases))
    path.chmod(0o755)
    return path


def call(
    tmp_path: Path, *options: str, cases: str = "", tools: tuple[str, ...] = ()
) -> tuple[int, list[str], list[str]]:
    """Exit status, lines of status.txt behind the first, and the commands that Python was given."""
    log, folder = tmp_path / "log", tmp_path / "bin"
    folder.mkdir()
    for tool in tools:
        stand_in(folder / tool)
    environment = os.environ | {
        "PYTHON": str(stand_in(tmp_path / "python", cases)),
        "LOG": str(log),
        "PATH": f"{folder}:/usr/bin:/bin",
    }
    done = subprocess.run(
        [SCRIPT, "--out", tmp_path / "out", *options],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    status = tmp_path / "out" / "status.txt"
    lines = status.read_text().splitlines()[1:] if status.exists() else [done.stderr]
    return done.returncode, lines, log.read_text().splitlines() if log.exists() else []


def steps(lines: list[str]) -> list[str]:
    return [line.split(":")[0] for line in lines]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), ["tests", "capture", *["bench"] * 3, "step_tiny", "train", "tune"]),
        (("bench",), ["bench"] * 3),
        (("tune", "train"), ["tune", "step_tiny", "train"]),
    ],
    ids=["default", "one", "two"],
)
def test_parts_run_their_steps(tmp_path: Path, parts: tuple[str, ...], expected: list[str]) -> None:
    archive = tmp_path / "all.tar.gz"
    options = [word for part in parts for word in ("--part", part)]
    code, lines, commands = call(tmp_path, "--device", "cpu", "--archive", str(archive), *options)
    assert code == 0
    assert [step.split("_smol")[0] for step in steps(lines)] == ["doctor", *expected]
    assert all("exit status 0" in line for line in lines)
    assert len(commands) == len(lines)
    with tarfile.open(archive) as packed:
        assert "./status.txt" in packed.getnames() and "./doctor.log" in packed.getnames()


def test_a_failing_step_stops_no_other_and_shows(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--part", "kernels")
    code, lines, _ = call(tmp_path, *options, cases="*'-m pytest'*) exit 3 ;;\n")
    assert code == 1
    assert steps(lines) == ["doctor", "tests", "capture"]
    assert "exit status 3" in lines[1] and "exit status 0" in lines[2]


def test_the_call_ends_in_time(tmp_path: Path) -> None:
    start = time.monotonic()
    code, lines, _ = call(
        *(tmp_path, "--device", "cpu", "--seconds", "7"), cases="*'-m pytest'*) sleep 60 ;;\n"
    )
    assert time.monotonic() - start < 20  # 7 s and what a loaded machine adds
    assert code == 1
    assert "exit status 124" in lines[1]
    assert set(lines[2:]) == {f"{step}: skipped, no time left" for step in steps(lines[2:])}
    assert steps(lines)[-1] == "tune"


def test_a_gpu_gets_everything_and_missing_tools_are_named(tmp_path: Path) -> None:
    code, lines, commands = call(tmp_path, "--part", "kernels", "--part", "profile")
    assert code == 0
    assert steps(lines) == ["doctor", "tests_head", "capture", "tests_rest", "sanitizer", "profile"]
    assert lines[-2:] == [
        "sanitizer: not run: compute-sanitizer is not installed",
        "profile: not run: ncu is not installed",
    ]
    assert any("-n 8" in command and "test_linear_logprob_triton.py" in command
               for command in commands)  # fmt: skip


def test_memory_checker_and_profiler_watch_the_ops(tmp_path: Path) -> None:
    tools = ("compute-sanitizer", "ncu")
    code, lines, commands = call(tmp_path, "--part", "kernels", "--part", "profile", tools=tools)
    assert code == 0
    assert steps(lines)[4:] == [
        *(f"{tool}_{shape}" for tool in ("memcheck", "racecheck")
          for shape in ("72_bfloat16", "70_bfloat16", "36_float32")),
        "profile",
    ]  # fmt: skip
    watched = [command for command in commands if "--once" in command]
    assert len(watched) == 7
    assert "--tool memcheck" in watched[0] and "--hidden 72 --vocab 4970" in watched[0]
    assert "--clock-control none" in watched[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--parts", "all"), "unknown option --parts"),
        (("--part", "all"), "unknown part all; there are kernels bench train profile tune"),
        (("--seconds",), "--seconds has no value"),
    ],
    ids=["option", "part", "value"],
)
def test_unknown_words_are_refused(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    code, lines, commands = call(tmp_path, *options)
    assert code == 2 and message in lines[0] and commands == []
