"""What a confined process does: run a program, call a function of it, or check what it returns.

Descriptors: 0, 1 and 2 as usual, 3 what is to be done, from 4 on where values go. This code shares
its process with the program, which may change all of it: nothing it reports is believed, but for
`judge`, in whose process there is no program.
"""

import atexit
import builtins
import contextlib
import gc
import io
import json
import os
import random
import symtable
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from . import plain

TASK, VALUES, ANSWERS, RESULT = 3, 4, 5, 6
FILE_NAME = "solution.py"
MAX_MESSAGE_BYTES = 16 << 20
PASSED, FAILED = b"1", b"0"  # of a check, in RESULT
BUFFERED = (io.TextIOWrapper, io.BufferedRandom, io.BufferedWriter)  # outer before inner

# Names that answers to contest tasks use without importing them, as LeetCode's editor has them.
STAR_IMPORTS = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "typing"),
)
PLAIN_IMPORTS = (*STAR_IMPORTS[:-1], "io", "sys", "json")

# What a function may raise and the process go on. Any other error, one that the program defines,
# ends the process, which the judge takes for an answer as wrong as the error.
ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, ImportError),
    *(LookupError, MemoryError, NameError, OSError, ReferenceError, RuntimeError, StopIteration),
    *(SyntaxError, TypeError, ValueError, Warning),
)


class CandidateError(RuntimeError):
    """The function under test raised, ended, or returned what is no plain value."""


def preamble() -> dict[str, Any]:
    """The names that every program finds defined; built-in names keep their meaning."""
    names: dict[str, Any] = {}
    for module in STAR_IMPORTS:
        exec(f"from {module} import *", names)
    for module in PLAIN_IMPORTS:
        exec(f"import {module}", names)
    return {name: value for name, value in names.items() if name not in dir(builtins)}


def run(names: dict[str, Any]) -> None:
    """The program as the main module, with what the task gives it."""
    try:
        _run_main(names, _read_task()["code"])
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            end((error.code or 0) & 0xFF)
        print(error.code, file=sys.stderr)
        end(1)
    end(0)


def end(status: int) -> None:
    """What an interpreter does at its end, without taking itself apart, which costs 20 ms.

    A file that was left open is flushed, as its deletion would.
    """
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    files = [item for item in gc.get_objects() if type(item) in BUFFERED]
    for file in sorted(files, key=lambda file: BUFFERED.index(type(file))):
        with contextlib.suppress(OSError, ValueError):  # it is closed, or its output limited
            file.flush()
    os._exit(status)


def end_by_error(kind: Any, error: Any, trace: Any) -> None:
    """The hook for errors that nothing caught."""
    sys.__excepthook__(kind, error, trace)
    end(1)


def call(names: dict[str, Any]) -> None:
    """The value of one call of the program's function, behind the run's nonce."""
    task = _read_task()
    # Not as the main program: what an answer does under __name__ == "__main__" is its own test.
    space = _run_main(names, task["code"], "solution")
    function = find_function(space, task["function"])
    value = function(*plain.decode(task["arguments"]))
    _write(VALUES, (task["nonce"] + plain.encode(value)).encode())
    os._exit(0)


def serve(names: dict[str, Any]) -> None:
    """Calls of the program's functions, as the judge in another process asks for them."""
    task = _read_task()
    space = _run_main(names, task["code"], "solution", task["prompt"])
    while request := _receive(VALUES):
        name, arguments, keywords = json.loads(request)
        try:
            function = find_function(space, name)
            value = function(*plain.decode(arguments), **plain.decode(keywords))
            answer = ["value", plain.encode(value)]
        except ERRORS as error:
            answer = ["error", f"{type(error).__name__}: {error}"[:200]]
        _send(ANSWERS, json.dumps(answer))
    os._exit(0)


def judge(names: dict[str, Any]) -> None:
    """Runs the checks, whose calls go to the process of the program, and writes which passed.

    A check is Python text: an assertion, or code that raises if the program is wrong. What the
    prompt defines is the prompt's, whatever the program makes of it, but for task["functions"]; a
    name that neither it nor the checks define is the program's.
    """
    task = _read_task()
    texts = [task["setup"], *task["checks"]]
    compare_shapes()
    # Only the prompt finds the names of a program there: a check imports what it needs.
    space: dict[str, Any] = {"__name__": "checks", "__builtins__": {**names, **vars(builtins)}}
    exec(compile(task["prompt"], "prompt", "exec"), space)
    defined = space.keys() - task["functions"]
    for name in free_names(texts, task["functions"]) - defined:
        space[name] = _proxy(name)
    exec(compile(task["setup"], "setup", "exec"), space)
    for check in task["checks"]:
        try:
            exec(compile(check, "check", "exec"), space)
            _write(RESULT, PASSED)  # one by one: a later check may hang
        except ERRORS:
            _write(RESULT, FAILED)
    os._exit(0)


def compare_shapes() -> None:
    """Makes NumPy's two comparisons that tests use refuse values of different shapes.

    An empty array is close to every number, since it is stretched to none of its elements.
    """
    numpy: Any = sys.modules["numpy"]
    numpy.allclose = _of_equal_shape(numpy.allclose, ("a", "b"))
    testing: Any = sys.modules["numpy.testing"]
    testing.assert_allclose = _of_equal_shape(testing.assert_allclose, ("actual", "desired"))


def _of_equal_shape(compare: Callable[..., Any], names: tuple[str, str]) -> Callable[..., Any]:
    def compare_equal_shapes(*arguments: Any, **keywords: Any) -> Any:
        compared = [*arguments, *(keywords[name] for name in names if name in keywords)][:2]
        shapes = [sys.modules["numpy"].shape(value) for value in compared]
        if shapes[0] != shapes[-1]:
            raise AssertionError(f"values of the shapes {shapes} are not close")
        return compare(*arguments, **keywords)

    return compare_equal_shapes


MODES: dict[str, Callable[[dict[str, Any]], None]] = {
    "run": run,
    "call": call,
    "serve": serve,
    "judge": judge,
}


def find_function(space: dict[str, Any], name: str) -> Callable[..., Any]:
    """The function of that name, or the method of a class Solution, of which one is made."""
    if "Solution" in space and hasattr(space["Solution"], name):
        return getattr(space["Solution"](), name)
    if not callable(space.get(name)):
        raise NameError(f"name {name!r} is not defined")
    return space[name]


def free_names(texts: list[str], functions: list[str]) -> set[str]:
    """The given functions, and the names that the texts use and neither bind nor find built in."""
    used, bound = set(), set(dir(builtins))
    for text in texts:
        top = symtable.symtable(text, "check", "exec")
        for table in _with_children(top):
            for symbol in table.get_symbols():
                if table is top or symbol.is_global():
                    is_bound = symbol.is_assigned() or symbol.is_imported()
                    (bound if is_bound else used).add(symbol.get_name())
    return (used - bound).union(functions)


def _with_children(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _with_children(child)


def _proxy(name: str) -> Callable[..., Any]:
    def candidate(*arguments: Any, **keywords: Any) -> Any:
        request = [name, plain.encode(list(arguments)), plain.encode(keywords)]
        try:
            _send(ANSWERS, json.dumps(request))
            kind, content = json.loads(_receive(VALUES))
            if kind == "value":
                return plain.decode(content)
        except (OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
            raise CandidateError(str(error)) from error
        raise CandidateError(str(content))

    return candidate


def _run_main(
    names: dict[str, Any], code: str, name: str = "__main__", prompt: str = ""
) -> dict[str, Any]:
    """Executes the prompt and the program in a fresh main module and returns its names."""
    _open_standard_streams()
    # A verdict must not depend on which worker gives it.
    random.seed(0)
    sys.modules["numpy.random"].seed(0)
    sys.excepthook = end_by_error
    module = ModuleType(name)
    sys.modules[name] = module
    sys.argv[:] = [FILE_NAME]
    space = vars(module)
    space.update(names, __builtins__=builtins)
    for text in _parts(prompt, code):
        exec(compile(text, FILE_NAME, "exec"), space)
    return space


def _parts(prompt: str, code: str) -> list[str]:
    """What is to be executed: both, or one text where the program is the end of the prompt.

    Apart, since `from __future__` may only stand at the beginning.
    """
    if not prompt:
        return [code]
    try:
        compile(code, FILE_NAME, "exec")
    except SyntaxError:
        return [f"{prompt}\n{code}"]
    return [prompt, code]


def _open_standard_streams() -> None:
    """Streams over this process's descriptors; those of the zygote had other ones."""
    errors = "surrogateescape"
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8", errors=errors, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8", errors=errors, closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(
        2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False
    )


def _read_task() -> dict[str, Any]:
    with open(TASK, encoding="utf-8") as file:
        return json.load(file)


def _send(descriptor: int, text: str) -> None:
    body = text.encode()
    _write(descriptor, len(body).to_bytes(8, "big") + body)


def _receive(descriptor: int) -> bytes:
    """The next message, or b"" at the end of file."""
    header = _read(descriptor, 8)
    length = int.from_bytes(header, "big")
    if len(header) < 8:
        return b""
    if length > MAX_MESSAGE_BYTES:
        raise ValueError(f"a message of {length} bytes")
    return _read(descriptor, length)


def _read(descriptor: int, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length and (part := os.read(descriptor, length - len(parts))):
        parts += part
    return bytes(parts)


def _write(descriptor: int, body: bytes) -> None:
    rest = memoryview(body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
