"""Build of the C++ CPU kernels; everything declarative stands in pyproject.toml.

One shared library, libflowrl_cpu.so, holds kernels/*/cpu.cpp. It is built when torch, cmake, a
build tool and a C++ compiler are present. When one is missing the installation is pure Python, CPU
tensors then take the reference implementations, and that is said here and at run time. A compiler
error is an error. FLOWRL_SKIP_CPP=1 asks for the pure-Python installation.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(*names: str) -> str | None:
    """Path of the first of these programs; those that pip put beside this Python come first."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return next((path for name in names if (path := shutil.which(name, path=search))), None)


def missing_for_cpp() -> list[str]:
    """What the C++ build lacks on this machine; empty when it can run."""
    has_compiler = os.environ.get("CXX") or find_tool("c++", "g++", "clang++")
    found = {
        "torch (install it first and pass --no-build-isolation to pip)": importlib.util.find_spec(
            "torch"
        ),
        "cmake (pip install cmake)": find_tool("cmake"),
        "ninja or make (pip install ninja)": find_tool("ninja", "make"),
        "a C++ compiler (g++ or clang++)": has_compiler,
    }
    return [name for name, where in found.items() if not where]


class CMakeBuild(build_ext):
    """Runs cmake in place of the compiler calls of setuptools."""

    def get_ext_filename(self, fullname: str) -> str:
        # No Python ABI tag: the library registers operators with torch and does not know Python.
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        torch_spec = importlib.util.find_spec("torch")
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        assert torch_spec is not None and torch_spec.origin is not None and cmake is not None
        generator = "Ninja" if ninja else "Unix Makefiles"
        # Kept between builds, so that editing one file recompiles one file. CMake refuses a build
        # folder that was made for other sources or another generator: both are in its name.
        key = zlib.crc32(f"{ROOT} {generator}".encode())
        build_dir = ROOT / "build" / f"cmake-{key:08x}"
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output_dir,
            "FLOWRL_TORCH_DIR": Path(torch_spec.origin).parent,
        }
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(
            [cmake, "-S", ROOT, "-B", build_dir, "-G", generator, *definitions], check=True
        )
        subprocess.run(
            [cmake, "--build", build_dir, "--parallel", str(os.cpu_count() or 1)], check=True
        )


def cpp_extensions() -> list[Extension]:
    """The C++ library, or nothing and a warning that says why."""
    if os.environ.get("FLOWRL_SKIP_CPP") == "1":
        reason = "FLOWRL_SKIP_CPP=1"
    elif missing := missing_for_cpp():
        reason = "missing: " + "; ".join(missing)
    else:
        return [Extension("flowrl.kernels.libflowrl_cpu", sources=[])]
    print(f"warning: flowrl is built without its C++ CPU kernels ({reason})", file=sys.stderr)
    return []


setup(ext_modules=cpp_extensions(), cmdclass={"build_ext": CMakeBuild})
