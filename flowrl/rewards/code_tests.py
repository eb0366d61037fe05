"""The tests of a row, in the forms in which the public data sets keep them.

form                                          data sets
{"inputs", "outputs", "fn_name"?}             TACO, APPS, veRL's
[{"input", "output", "testtype" or "type"?}]  LiveCodeBench, Codeforces, PrimeIntellect (DeepCoder)
{"public_test_cases", "private_test_cases"}   LiveCodeBench as published, compressed or not
{"test", "entry_point", "prompt"?}            HumanEval, HumanEval+, MBPP+
{"test_list", "test_imports"?}, ["assert"]    MBPP

Any of them may be a string of JSON. Assertions of the last two forms call the names that they do
not define and Python has not built in; those of entry_point and of the row's own "code" too.
"""

import ast
import base64
import binascii
import io
import json
import pickle
import zlib
from dataclasses import dataclass
from typing import Any

MAX_DECOMPRESSED_BYTES = 512 << 20
FUNCTION_TYPES = {"functional", "function_call", "call"}


@dataclass(frozen=True)
class PrintTest:
    """A whole program: text in, text out."""

    stdin: str
    expected: str

    @property
    def size(self) -> int:
        return len(self.stdin)


@dataclass(frozen=True)
class CallTest:
    """One call of a function, or of a method of class Solution."""

    function: str
    arguments: list[Any]
    expected: Any
    may_unwrap: bool  # the data set may have put the expected value into a list of one

    @property
    def size(self) -> int:
        return len(repr(self.arguments))


@dataclass(frozen=True)
class CheckTests:
    """Python text that calls functions of the program and raises if they are wrong."""

    setup: str
    checks: list[str]
    functions: list[str]
    prompt: str  # what the program completes, whose imports and helpers may be needed


Tests = list[PrintTest | CallTest] | CheckTests


def read_tests(ground_truth: Any) -> Tests:
    """The tests of a row. Raises ValueError if the form is not known or there are none."""
    data = _from_json(ground_truth)
    if isinstance(data, dict):  # parquet gives every row every key
        data = {key: value for key, value in data.items() if value is not None}
    if isinstance(data, dict) and "inputs" in data:
        tests = _paired(data)
    elif isinstance(data, dict) and {"public_test_cases", "private_test_cases"} & data.keys():
        tests = _livecodebench(data)
    elif isinstance(data, dict) and "test" in data:
        tests = _check_function(data)
    elif isinstance(data, dict) and "test_list" in data:
        setup = [*_texts(data, "test_imports"), _text(data, "test_setup_code")]
        tests = CheckTests("\n".join(setup), _texts(data, "test_list"), _own_names(data), "")
    elif isinstance(data, list) and data and all(isinstance(item, str) for item in data):
        tests = CheckTests("", data, [], "")
    elif isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        tests = [_single(item, None) for item in data]
    else:
        raise ValueError(
            f"the ground_truth {str(ground_truth)[:200]!r} has none of the forms of tests in "
            "docs/rewards.md"
        )
    if isinstance(tests, CheckTests):
        _refuse_broken(tests)
    if not (tests.checks if isinstance(tests, CheckTests) else tests):
        raise ValueError("the ground_truth has no tests; every program would pass")
    return tests


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"the ground_truth is no JSON ({error}): {value[:200]!r}") from None


def _paired(data: dict[str, Any]) -> list[PrintTest | CallTest]:
    inputs, outputs = data["inputs"], data.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("the ground_truth's inputs and outputs are not both lists")
    if len(inputs) != len(outputs):
        raise ValueError(f"the ground_truth has {len(inputs)} inputs and {len(outputs)} outputs")
    function = data.get("fn_name")
    return [_test(given, out, function) for given, out in zip(inputs, outputs, strict=True)]


def _single(item: dict[str, Any], function: str | None) -> PrintTest | CallTest:
    if "input" not in item or "output" not in item:
        raise ValueError(f"a test of the ground_truth has no input or output: {sorted(item)}")
    kind = item.get("testtype") or item.get("type") or "stdin"
    if kind not in FUNCTION_TYPES:
        return _test(item["input"], item["output"], None)
    metadata = _json_object(item.get("metadata"))
    function = item.get("fn_name") or metadata.get("func_name") or function
    if not function:
        raise ValueError(f"a test of type {kind!r} names no function")
    return _test(item["input"], item["output"], function)


def _test(given: Any, output: Any, function: str | None) -> PrintTest | CallTest:
    if not function:
        return PrintTest(_lines(given), _lines(output))
    if isinstance(given, str):  # LiveCodeBench: a line of JSON for each argument
        lines = [line for line in given.split("\n") if line.strip()]
        arguments = [_argument(line, "input", function) for line in lines]
        expected = _argument(output, "output", function)
        return CallTest(function, arguments, expected, may_unwrap=False)
    if not isinstance(given, list):
        raise ValueError(f"arguments of {function} are no list: {str(given)[:100]!r}")
    return CallTest(function, given, output, may_unwrap=True)


def _lines(value: Any) -> str:
    """Text, which some rows keep as a list of lines or as one number."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(data: dict[str, Any], key: str) -> str:
    value = data.get(key) or ""
    if not isinstance(value, str):
        raise ValueError(f"the ground_truth's {key} is {str(value)[:100]}; give a text")
    return value


def _texts(data: dict[str, Any], key: str) -> list[str]:
    values = data.get(key) or []
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"the ground_truth's {key} is {str(values)[:100]}; give a list of texts")
    return values


def _json_object(value: Any) -> dict[str, Any]:
    found = _from_json(value or {})
    if not isinstance(found, dict):
        raise ValueError(f"the ground_truth's metadata is {value!r:.100}; give an object")
    return found


def _argument(text: Any, what: str, function: str) -> Any:
    """A value that LiveCodeBench keeps as JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the {what} {str(text)[:100]!r} of a test of {function} is no text of JSON: {error}; "
            "write a line of JSON for each argument and for the result"
        ) from error


def _livecodebench(data: dict[str, Any]) -> list[PrintTest | CallTest]:
    metadata = _json_object(data.get("metadata"))
    tests = []
    for name in ("public_test_cases", "private_test_cases"):
        cases = data.get(name) or []
        if isinstance(cases, str):
            cases = decode_cases(cases)
        tests += [_single(case, metadata.get("func_name")) for case in cases]
    return tests


class _TextUnpickler(pickle.Unpickler):
    """Reads a pickled string. Anything with a class or function in it could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the private test cases hold {module}.{name} and not only text")

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError("the private test cases hold a persistent object and not only text")


def decode_cases(text: str) -> list[dict[str, Any]]:
    """LiveCodeBench's test cases: JSON, or base64 of zlib of a pickled string of JSON.

    Raises ValueError if it is neither; nothing but text is unpickled.
    """
    if text.lstrip().startswith("["):
        return json.loads(text)
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(text, validate=True), MAX_DECOMPRESSED_BYTES)
        if not unpacker.eof:
            raise ValueError(f"more than {MAX_DECOMPRESSED_BYTES} bytes, or cut off")
        unpickled = _TextUnpickler(io.BytesIO(raw)).load()
        if not isinstance(unpickled, str):
            raise ValueError(f"a pickled {type(unpickled).__name__}, not text")
        return json.loads(unpickled)
    except (
        *(binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, IndexError, KeyError),
        *(ValueError, TypeError, AttributeError),
    ) as error:
        raise ValueError(f"the private test cases cannot be read: {error}") from error


def _check_function(data: dict[str, Any]) -> CheckTests:
    text, function = _text(data, "test"), _text(data, "entry_point")
    if "def check(" not in text:
        return CheckTests("\n".join(_texts(data, "test_imports")), [text], _own_names(data), "")
    if not function:
        raise ValueError("the ground_truth has a check function and names no entry_point for it")
    return CheckTests(text, [f"check({function})"], [function], _text(data, "prompt"))


def _own_names(data: dict[str, Any]) -> list[str]:
    """What the program has to define even if Python has it built in: MBPP asks for a `sum`."""
    function = _text(data, "entry_point")
    code = _parsed(_text(data, "code"), "the code of the ground_truth").body
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in code if isinstance(node, kinds)]
    return list(dict.fromkeys([*([function] if function else []), *names]))


def _refuse_broken(tests: CheckTests) -> None:
    if not all(_parsed(text, "a test of the ground_truth").body for text in tests.checks):
        raise ValueError("the ground_truth has an empty test; every program would pass it")
    _parsed(tests.setup, "the setup of the ground_truth's tests")
    _parsed(tests.prompt, "the prompt of the ground_truth")


def _parsed(text: str, what: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{what} is no Python: {error}; correct or drop the row") from error
