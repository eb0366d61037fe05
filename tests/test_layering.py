"""Who may import whom, and the house rules that a parser can check.

Every rule takes the path of a file, relative to the repository, and its text, and returns what it
objects to. Each is tried on the whole tree and on one snippet that it must refuse.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 500

# What these parts may import of flowrl beside themselves; the other parts are restrained only by
# the rules below.
ALLOWED_PARTS = {
    "kernels": set(),
    "objectives": {"kernels"},
    "partition": {"batch", "kernels"},
    "interface": {"objectives", "batch"},
    "policy": {"interface", "objectives", "partition", "batch", "kernels"},
    "megatron": {"interface", "objectives", "partition", "batch", "kernels"},
}
ALLOWED_PACKAGES = {"kernels": {"torch", "triton"}, "objectives": {"torch"}}
ONLY_IMPORTERS = {"train": {"cli"}, "cli": {"__main__"}}


def dotted(path: str) -> list[str]:
    """Module name parts: kernels/x/__init__.py -> [flowrl, kernels, x, __init__]."""
    parts = path.removesuffix(".py").split("/")
    return ["flowrl", *parts] if parts[0] == "kernels" else parts


def part_of(module: list[str]) -> str:
    """The part of flowrl that a module belongs to, "" for flowrl itself or another package."""
    return module[1] if module[0] == "flowrl" and len(module) > 1 else ""


def imports(path: str, text: str) -> Iterator[list[str]]:
    """Every module, or module plus imported name, that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = dotted(path)[: -node.level] + base
            yield from ([*base, alias.name] for alias in node.names)


def uses_attribute(text: str, owner: str, names: set[str]) -> bool:
    """Whether owner.name stands in the code for one of the names."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(ast.parse(text))
    )


def is_package_code(path: str) -> bool:
    return path.endswith(".py") and path.split("/")[0] in {"flowrl", "kernels"}


def rule_parts(path: str, text: str) -> list[str]:
    """A part of flowrl imports only the parts below it."""
    part = part_of(dotted(path)) if is_package_code(path) else ""
    if part not in ALLOWED_PARTS:
        return []
    allowed = ALLOWED_PARTS[part] | {part, "", "__version__"}
    return [".".join(module) for module in imports(path, text) if part_of(module) not in allowed]


def rule_packages(path: str, text: str) -> list[str]:
    """Kernels and objectives need torch (and triton) and the standard library, nothing else."""
    part = part_of(dotted(path)) if is_package_code(path) else ""
    if part not in ALLOWED_PACKAGES:
        return []
    allowed = ALLOWED_PACKAGES[part] | sys.stdlib_module_names | {"flowrl"}
    return [".".join(module) for module in imports(path, text) if module[0] not in allowed]


def rule_no_process_group(path: str, text: str) -> list[str]:
    """Kernels and objectives are single-device: groups and collectives stay with the caller."""
    if not is_package_code(path) or part_of(dotted(path)) not in {"kernels", "objectives"}:
        return []
    found = any(module[:2] == ["torch", "distributed"] for module in imports(path, text))
    found = found or uses_attribute(text, "torch", {"distributed"})
    return ["torch.distributed"] if found else []


def rule_only_importers(path: str, text: str) -> list[str]:
    """The loop and the command stand at the top: nothing in the package builds on them."""
    if not is_package_code(path):
        return []
    part = part_of(dotted(path))
    return [
        f"flowrl.{target}"
        for target, importers in ONLY_IMPORTERS.items()
        if part not in importers | {target}
        and any(part_of(module) == target for module in imports(path, text))
    ]


def rule_megatron(path: str, text: str) -> list[str]:
    """Only flowrl/megatron/ knows Megatron-core."""
    if not is_package_code(path) or path.startswith("flowrl/megatron/"):
        return []
    return [".".join(module) for module in imports(path, text) if module[0] == "megatron"]


def rule_environ(path: str, text: str) -> list[str]:
    """Only flowrl/config.py touches the environment."""
    if not is_package_code(path) or path == "flowrl/config.py":
        return []
    names = {"environ", "environb", "getenv", "getenvb", "putenv"}
    found = any(module[0] == "os" and module[-1] in names for module in imports(path, text))
    return ["os.environ"] if found or uses_attribute(text, "os", names) else []


def rule_broad_except(path: str, text: str) -> list[str]:
    """No bare except, no except Exception."""
    if not path.endswith(".py"):
        return []
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind) if kind else "everything" for kind in caught}
            if names & {"everything", "Exception", "BaseException"}:
                found.append(f"line {node.lineno}: except {', '.join(sorted(names))}")
    return found


def rule_size(path: str, text: str) -> list[str]:
    """A file of more than 500 lines holds more than one idea."""
    lines = text.count("\n")
    return [f"{lines} lines"] if lines > MAX_LINES else []


def rule_ascii(path: str, text: str) -> list[str]:
    """ASCII in code."""
    return [
        f"line {number}"
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.isascii()
    ]


def rule_symlink(root: Path) -> list[str]:
    """kernels/ is reached as flowrl.kernels by a symlink, and never shadows the PyPI package."""
    found = []
    if (root / "kernels" / "__init__.py").exists():
        found.append("kernels/__init__.py shadows the PyPI package `kernels`")
    link = root / "flowrl" / "kernels"
    if not link.is_symlink() or link.readlink() != Path("../kernels"):
        found.append("flowrl/kernels is no symlink to ../kernels")
    return found


RULES: dict[Callable[[str, str], list[str]], tuple[str, str]] = {
    rule_parts: ("kernels/op/__init__.py", "from ...batch import pack"),
    rule_packages: ("flowrl/objectives/grpo.py", "import numpy as np"),
    rule_no_process_group: (
        "flowrl/objectives/grpo.py",
        "import torch\ntorch.distributed.all_reduce(x)",
    ),
    rule_only_importers: ("flowrl/evaluate.py", "def f():\n    from flowrl import train"),
    rule_megatron: ("flowrl/policy/model.py", "from megatron.core import parallel_state"),
    rule_environ: ("flowrl/metrics.py", "from os import environ"),
    rule_broad_except: ("tests/test_x.py", "try:\n    f()\nexcept (OSError, Exception):\n    g()"),
    rule_size: ("kernels/op/cpu.cpp", "\n" * (MAX_LINES + 1)),
    rule_ascii: ("kernels/op/cpu.cpp", "// a \u2264 b"),
}
RULE_IDS = [rule.__name__.removeprefix("rule_") for rule in RULES]


def source_files() -> Iterator[Path]:
    """The project's own code; flowrl/kernels is left out, since it is kernels/ once more."""
    yield ROOT / "setup.py"
    for folder in ("flowrl", "kernels", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            is_link = path.is_relative_to(ROOT / "flowrl" / "kernels")
            if path.suffix in {".py", ".cpp"} and not is_link:
                yield path


@pytest.mark.parametrize("rule", RULES, ids=RULE_IDS)
def test_tree_follows_rule(rule: Callable[[str, str], list[str]]) -> None:
    objections = {}
    for path in source_files():
        name = path.relative_to(ROOT).as_posix()
        if found := rule(name, path.read_text(encoding="utf-8")):
            objections[name] = found
    assert objections == {}, rule.__doc__


@pytest.mark.parametrize(("rule", "example"), RULES.items(), ids=RULE_IDS)
def test_rule_refuses_bad_snippet(
    rule: Callable[[str, str], list[str]], example: tuple[str, str]
) -> None:
    assert len(rule(*example)) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels/op/__init__.py", "from .._native import load\nimport math, torch"),
        ("flowrl/cli.py", "from flowrl.train import train\nfrom flowrl import config"),
        ("flowrl/megatron/model.py", "from megatron.core import tensor_parallel"),
        ("flowrl/objectives/grpo.py", "from flowrl.kernels.flow_balance import sequence_sums"),
        ("flowrl/config.py", "import os\nos.environ.get('HOME')"),
    ],
    ids=["kernel", "cli", "megatron", "objective", "config"],
)
def test_rules_accept_layered_code(path: str, text: str) -> None:
    assert [found for rule in RULES for found in rule(path, text)] == []


def test_source_files_reach_every_folder_once() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in source_files()]
    expected = {"setup.py", "flowrl/config.py", "kernels/_native.py", "tests/test_layering.py"}
    assert expected <= set(names)
    assert len({path.resolve() for path in source_files()}) == len(names)


def test_tree_has_the_kernels_symlink() -> None:
    assert rule_symlink(ROOT) == []


def test_symlink_rule_refuses_a_copied_package(tmp_path: Path) -> None:
    for folder in ("kernels", "flowrl/kernels"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kernels" / "__init__.py").touch()
    assert len(rule_symlink(tmp_path)) == 2
