"""The report: versions as pip knows them, remedies, and the live implementation of an op."""

import io
import platform
from importlib import metadata

import pytest
import torch
from rich.console import Console

from flowrl import doctor
from flowrl.kernels import _native


def rendered(checks: list[doctor.Check]) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200, color_system=None).print(doctor.render(checks))
    return stream.getvalue()


def test_collect_reports_the_running_versions() -> None:
    checks = {check.name: check for check in doctor.collect()}
    assert checks["Python"].found == platform.python_version()
    assert checks["torch"].found == torch.__version__
    assert checks["transformers"].found.split(",")[0] == metadata.version("transformers")
    assert checks["C++ kernels"].is_ok == (_native.library_path() is not None)
    assert f"{torch.get_num_threads()} threads" in checks["CPU"].found
    assert checks["CUDA"].is_ok == torch.cuda.is_available()


def test_missing_package_names_its_remedy() -> None:
    package = doctor.Package("no-such-dist", "no_such_module", "nothing", "pip install --no-deps x")
    check = doctor.check_package(package)
    assert (check.found, check.remedy) == ("missing", "pip install --no-deps x")
    assert not check.is_ok
    plain = doctor.Package("no-such-dist", "no_such_module", "nothing", "")
    assert doctor.check_package(plain).remedy == "pip install no-such-dist"


def test_a_remedy_has_the_declared_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", {"flowrl": ["no-such-dist<3,>=2"]}.get)
    missing = doctor.Package("no-such-dist", "no_such_module", "nothing", "")
    assert doctor.check_package(missing).remedy == "pip install 'no-such-dist<3,>=2'"
    two = doctor.Package(
        "no-such-dist", "no_such_module", "", "get {0} or {1}", alternative="other"
    )
    assert doctor.check_package(two).remedy == "get 'no-such-dist<3,>=2' or 'other<3,>=2'"


def test_module_without_metadata_counts_as_installed() -> None:
    check = doctor.check_package(doctor.Package("no-such-dist", "json", "nothing", ""))
    assert (check.found, check.remedy, check.is_ok) == ("unknown version", "", True)


def test_version_outside_the_declared_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", {"transformers": "6.0.1"}.get)
    monkeypatch.setattr(metadata, "requires", {"flowrl": ["transformers<5.20,>=4.57"]}.get)
    check = doctor.check_package(doctor.Package("transformers", "transformers", "models", "", True))
    assert check.found == "6.0.1, but flowrl needs <5.20,>=4.57"
    assert check.remedy == "pip install 'transformers<5.20,>=4.57'"
    assert not check.is_ok


def test_implementations_follow_the_dispatcher() -> None:
    library = torch.library.Library("flowrl", "FRAGMENT")
    library.define("doctor_scratch(Tensor x) -> Tensor")
    library.impl("doctor_scratch", lambda x: x + 1, "CompositeExplicitAutograd")
    assert doctor.live_implementations("doctor_scratch") == ["reference"]
    assert doctor.implementation_for("doctor_scratch", "cpu") == "reference"
    library.impl("doctor_scratch", lambda x: x + 2, "CPU")
    assert torch.ops.flowrl.doctor_scratch(torch.zeros(())).item() == 2.0
    assert doctor.live_implementations("doctor_scratch") == ["reference", "cpu"]
    assert doctor.implementation_for("doctor_scratch", "cpu") == "cpu"
    assert doctor.implementation_for("doctor_scratch", "cuda") == "reference"
    library._destroy()


def test_ops_that_have_cpp_use_it_exactly_when_the_library_is_built() -> None:
    checks = {check.name: check for check in doctor.check_ops()}
    live = "reference, cpu" if _native.library_path() else "reference"
    for operator in ("sequence_sums", "segment_sum"):
        found = checks[operator].found.removesuffix(", triton")
        assert found == live
        assert checks[operator].needed_for.startswith(f"CPU: {live.split(', ')[-1]},")


def test_render_shows_every_check_and_every_remedy() -> None:
    checks = [
        doctor.Check("machine", "torch", "9.9", "everything", "", True, True),
        doctor.Check("packages", "wandb", "missing", "logs", "pip install [red]", False),
        doctor.Check("packages", "typer", "missing", "cli", "pip install typer", False, True),
        doctor.Check("ops", "segment_sum", "reference", "CPU tensors: reference", "", True),
    ]
    lines = [" ".join(line.split()) for line in rendered(checks).splitlines()]
    assert "ok torch 9.9 everything" in lines
    assert "- wandb missing logs" in lines
    assert "missing typer missing cli" in lines
    assert "ok segment_sum reference CPU tensors: reference" in lines
    assert "wandb (optional): pip install [red]" in lines
    assert "typer (required): pip install typer" in lines
