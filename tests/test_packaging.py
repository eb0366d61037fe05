"""Wheels built from the sdist: with the C++ kernels they use them, without they say so and run.

Everything is built in copies and offline; the checkout and its environment are not touched.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent
BUILD_FILES = [
    "setup.py",
    "pyproject.toml",
    "CMakeLists.txt",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
]

# Run from the installed wheel. Two sequences, of 2 and 1 tokens; the second token is masked, so the
# means are the first and the third row.
PROBE = """
import torch
import flowrl
from flowrl import doctor
from flowrl.kernels import _native, flow_balance
from flowrl.kernels.segment_mean import segment_mean

print(flowrl.__file__)
print(_native.load())
print(flow_balance.__name__, doctor.implementation_for("sequence_sums", "cpu"))
print(segment_mean.__module__, doctor.implementation_for("segment_sum", "cpu"))
hidden = torch.tensor([[1.0, -2.0], [5.0, 7.0], [4.0, 0.5]])
means = segment_mean(hidden, torch.tensor([0, 2, 3]), torch.tensor([True, False, True]))
print(means.tolist())
"""


@dataclass(frozen=True)
class Installation:
    """A wheel that was built from the sdist and unpacked into a folder of its own."""

    wheel: str
    folder: Path
    output: list[str]
    warnings: str


def run(*command: str | Path, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command that must succeed; its output is in the failure when it does not."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def install(tmp_path: Path, sdist: Path, **environ: str) -> Installation:
    """Build a wheel from the sdist, install it into a folder, and run the probe from there."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    wheels, folder, elsewhere = (tmp_path / name for name in ("wheels", "site", "elsewhere"))
    elsewhere.mkdir()
    built = run(
        *[*pip, "wheel", "-v", *offline, "--no-build-isolation", "-w", wheels, sdist],
        cwd=elsewhere,
        **environ,
    )
    (wheel,) = wheels.iterdir()
    run(*[*pip, "install", *offline, "--target", folder, wheel], cwd=elsewhere)
    probe = run(sys.executable, "-c", PROBE, cwd=elsewhere, PYTHONPATH=str(folder))
    return Installation(
        wheel.name, folder, probe.stdout.splitlines(), built.stdout + built.stderr + probe.stderr
    )


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy that has only what git would hand out."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, copy / name)
    for name in ("flowrl", "kernels"):
        shutil.copytree(
            ROOT / name,
            copy / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", "*.so"),
        )
    run(
        *[sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", copy / "dist"],
        cwd=copy,
    )
    (archive,) = (copy / "dist").iterdir()
    return archive


def test_wheel_from_sdist_runs_the_cpp_kernels(tmp_path: Path, sdist: Path) -> None:
    installed = install(tmp_path, sdist, FLOWRL_SKIP_CPP="0")
    assert not installed.wheel.endswith("none-any.whl")
    assert installed.output == [
        str(installed.folder / "flowrl" / "__init__.py"),
        "True",
        "flowrl.kernels.flow_balance cpu",
        "flowrl.kernels.segment_mean cpu",
        "[[1.0, -2.0], [4.0, 0.5]]",
    ]
    assert "C++ CPU kernels" not in installed.warnings
    assert [path.name for path in installed.folder.rglob("*.so")] == ["libflowrl_cpu.so"]
    assert list(installed.folder.rglob("*.cpp")) == []
    assert not (installed.folder / "kernels").exists()


def test_wheel_without_cpp_runs_the_reference_and_says_so(tmp_path: Path, sdist: Path) -> None:
    installed = install(tmp_path, sdist, FLOWRL_SKIP_CPP="1")
    assert installed.wheel.endswith("-py3-none-any.whl")
    assert installed.output == [
        str(installed.folder / "flowrl" / "__init__.py"),
        "False",
        "flowrl.kernels.flow_balance reference",
        "flowrl.kernels.segment_mean reference",
        "[[1.0, -2.0], [4.0, 0.5]]",
    ]
    assert "built without its C++ CPU kernels (FLOWRL_SKIP_CPP=1)" in installed.warnings
    assert installed.warnings.count("the C++ CPU kernels are not built") == 1


def test_build_without_tools_or_torch_names_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    # A bare environment, into which setuptools alone is put back.
    run(sys.executable, "-m", "venv", "--without-pip", "bare", cwd=tmp_path)
    (tmp_path / "path").mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / "path" / name).symlink_to(Path(setuptools.__file__).parent.parent / name)
    done = run(
        *[tmp_path / "bare" / "bin" / "python", "setup.py", "--version"],
        cwd=tmp_path,
        PATH=str(tmp_path / "empty"),
        PYTHONPATH=str(tmp_path / "path"),
        CXX="",
    )
    for name in ("torch (install it first", "pip install cmake", "pip install ninja", "g++"):
        assert name in done.stderr


def test_library_that_does_not_load_raises(tmp_path: Path) -> None:
    shutil.copy(ROOT / "kernels" / "_native.py", tmp_path / "_native.py")
    (tmp_path / "libflowrl_cpu.so").write_bytes(b"no library")
    program = (
        "import _native\ntry:\n    _native.load()\nexcept RuntimeError as error:\n    print(error)"
    )
    done = run(sys.executable, "-c", program, cwd=tmp_path)
    assert str(tmp_path / "libflowrl_cpu.so") in done.stdout
    assert "Rebuild it" in done.stdout
