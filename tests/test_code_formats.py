"""Code rewards: where the program stands, what counts as right, and the forms of tests."""

import base64
import json
import os
import pickle
import time
import zlib
from typing import Any

import pytest

from flowrl.rewards.code_answer import extract_program, same_output, same_value
from flowrl.rewards.code_tests import CallTest, CheckTests, PrintTest, decode_cases, read_tests
from flowrl.rewards.sandbox import plain
from flowrl.rewards.sandbox.harness import free_names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\na\n```", "a\n"),
        ("```py\na\n```\n```Python3\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```python\na\n```\n```\nb\n```", "a\n"),
        ("```cpp\na\n```\n```python\nb\n```\n```cpp\nc\n```", "b\n"),
        ("```cpp\na\n```", None),
        ("  ```python\n  a\n  ```", "a\n"),
        ("1. So:\n   ```python\n   if a:\n     b\n  c\n   ```", "if a:\n  b\nc\n"),
        ("- ```python\n  a\n\n    b\n  ```", "a\n\n  b\n"),
        ("\t```python\n\ta\n\t```", "a\n"),
        ('```python title="a.py"\na\n```', "a\n"),
        ("```cpp title=python\na\n```", None),
        ("```python 3\na\n```", "a\n"),
        ("use ```x```\n```inline```\n```python\na\n```", "a\n"),
        ("```python\ns = 'a\u2028b\x0cc'\n```", "s = 'a\u2028b\x0cc'\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("```python\na", None),
        ("print(3)", None),
        ("", None),
        ("```python\n```", "\n"),
        ("<think>```python\na\n```</think>", None),
        ("<think>```python\na\n```</think>```python\nb\n```", "b\n"),
        ("```python\nprint('```')\nx = 1\n```", "print('```')\nx = 1\n"),
        ("```python\r\na\r\nb\r\n```", "a\nb\n"),
    ],
)
def test_extract_program(text, expected):
    assert extract_program(text) == expected


@pytest.mark.parametrize(
    ("printed", "expected", "is_same"),
    [
        ("3", "3\n", True),
        ("1 2\n3", "1\n2 3\n", True),
        ("", "", True),
        ("", "3", False),
        ("3 4", "3", False),
        ("YES", "Yes", False),
        ("2 1", "1 2", False),
        ("3.0", "3", True),
        ("3.0000001", "3", False),
        ("3e0", "3", True),
        ("0.333333", "0.3333333", True),
        ("0.3333", "0.3333333", False),
        ("1000000.5", "1000000.0", True),
        ("1000002.5", "1000000.0", False),
        ("1e-9", "0.0", True),
        ("-0.0", "0.0", True),
        ("nan", "0.5", False),
        ("nan", "nan", True),
        ("inf", "1e400", False),
        ("50000000000000000", "50000000000000001", False),
        ("007", "7", True),
        ("0110", "0110", True),
        ("110", "0110", False),
        ("00110", "0110", False),
        ("0", "00", False),
        ("-7", "-07", False),
        ("0", "0", True),
        ("-0", "0", True),
        (".5", "0.5", True),
        ("0x7", "7", False),
        ("1_0", "10", False),
        ("9" * 500 + ".0", "9" * 500, False),
        ("9" * 500, "9" * 500, True),
        ("\u0663", "3", False),
    ],
)
def test_same_output(printed, expected, is_same):
    assert same_output(printed, expected) == is_same


@pytest.mark.parametrize(
    ("returned", "expected", "is_same"),
    [
        (3, 3, True),
        (3.0, 3, True),
        (True, True, True),
        ("3", 3, False),
        ((1, (2, 3)), [1, [2, 3]], True),
        ([1, 2], [1, 2, 3], False),
        ({1, 2}, [1, 2], False),
        (0.1 + 0.2, 0.3, True),
        ([0.31], [0.3], False),
        (float("nan"), 0.5, False),
        (10**400, 0.5, False),
        ({1: [2]}, {"1": [2]}, True),
        ({1: 2}, {"1": 3}, False),
        ({}, [], False),
        (None, None, True),
        (None, False, False),
        ("ab", ["a", "b"], False),
    ],
)
def test_same_value(returned, expected, is_same):
    assert same_value(returned, expected) == is_same


VALUES = [
    *(None, True, 3, -(10**40), 10**5000, 0.1, float("inf"), 2 + 3j, "\u00e9\ud800", b"\0\xff"),
    *([], [1, [2]], (1,), {1, 2}, frozenset({3}), {"a": 1, (1, 2): [None]}, range(1, 9, 2)),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_plain_values_return(value):
    decoded = plain.decode(plain.encode(value))
    assert decoded == value
    assert type(decoded) is type(value)


def test_plain_iterators_and_numpy():
    numpy = pytest.importorskip("numpy")
    assert list(plain.decode(plain.encode(map(abs, [-1, 2])))) == [1, 2]
    assert plain.decode(plain.encode(numpy.int64(3))) == 3
    assert plain.decode(plain.encode([numpy.arange(3), numpy.float32(0.5)])) == [[0, 1, 2], 0.5]
    with pytest.raises(TypeError, match="a function cannot leave the sandbox"):
        plain.encode(len.__class__.__init__.__class__ and (lambda: 0))


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[1]", "{}", '{"a": 1}', '{"list": 3}', '{"int": "z"}', '{"int": 3}'),
        *(
            '{"list": [], "set": []}',
            '{"set": [{"list": []}]}',
            '{"dict": [1]}',
            '{"range": ["1"]}',
        ),
        *('{"bytes": "zz"}', '{"complex": [1, 2, 3]}', "[" * 100_000, '{"list":[' * 5000),
    ],
)
def test_other_text_is_no_value(text):
    with pytest.raises(ValueError):
        plain.decode(text)


def test_keys_of_one_hash_are_refused_at_once():
    step = (1 << 61) - 1  # hash(n * step) is 0
    numbers = [{"int": hex(n * step)} for n in range(1, 200_001)]
    started = time.process_time()
    for name, items in (
        ("set", numbers),
        ("frozenset", numbers),
        ("dict", [[n, 1] for n in numbers]),
    ):
        with pytest.raises(ValueError, match="200000 keys of one hash"):
            plain.decode(json.dumps({name: items}))
    assert time.process_time() - started < 60  # minutes, if the set were built
    assert plain.decode(plain.encode({-1, -2, step, 0})) == {-1, -2, step, 0}


@pytest.mark.parametrize(
    ("texts", "functions", "expected"),
    [
        (["assert f(1) == g(2)"], [], {"f", "g"}),
        (["import math\nassert math.isclose(f(1), 2)"], [], {"f"}),
        (["from a import b as c", "assert c(f)"], [], {"f"}),
        (
            ["def check(h):\n    x = [h(i) for i in range(3)]\n    assert x == poly(3)"],
            [],
            {"poly"},
        ),
        (["assert max(3) == len([])"], ["max"], {"max"}),
        (["assert sorted(f(*a)) == [lambda q: q]", "a = 3"], [], {"f"}),
        (["def g(f):\n    return f", "assert f(g)"], [], {"f"}),
        (["def g():\n    global h\n    h = 1\n    return k", "assert f(h)"], [], {"f", "k"}),
    ],
)
def test_free_names(texts, functions, expected):
    assert free_names(texts, functions) == expected


def compressed(value: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


CASES = [
    {"input": "[1, 2]\n3", "output": "6", "testtype": "functional"},
    {"input": "[]\n0", "output": "0", "testtype": "functional"},
]
CALLS = [CallTest("f", [[1, 2], 3], 6, False), CallTest("f", [[], 0], 0, False)]

FORMS = {
    "taco": ({"inputs": ["1\n"], "outputs": ["2\n"]}, [PrintTest("1\n", "2\n")]),
    "taco-text": ('{"inputs": ["1"], "outputs": ["2"], "fn_name": null}', [PrintTest("1", "2")]),
    "keys-without-value": (
        {"inputs": None, "test": None, "test_list": ["assert f(1)"], "test_imports": None},
        CheckTests("", ["assert f(1)"], [], ""),
    ),
    "apps-lines": ({"inputs": [["1", "2"]], "outputs": [["3"]]}, [PrintTest("1\n2", "3")]),
    "taco-call": (
        {"inputs": [[[1], 2]], "outputs": [[3]], "fn_name": "f"},
        [CallTest("f", [[1], 2], [3], True)],
    ),
    "deepcoder-lcb": (
        [case | {"metadata": {"func_name": "f"}} for case in CASES],
        CALLS,
    ),
    "codeforces": ([{"input": "1", "output": "2"}], [PrintTest("1", "2")]),
    "primeintellect": (
        [{"type": "function_call", "fn_name": "f", "input": [[1, 2], 3], "output": 6}],
        [CallTest("f", [[1, 2], 3], 6, True)],
    ),
    "primeintellect-print": (
        [{"type": "stdin_stdout", "fn_name": None, "input": "1", "output": "2"}],
        [PrintTest("1", "2")],
    ),
    "lcb": (
        {
            "public_test_cases": json.dumps(CASES[:1]),
            "private_test_cases": compressed(json.dumps(CASES[1:])),
            "metadata": '{"func_name": "f"}',
        },
        CALLS,
    ),
    "humaneval": (
        {"test": "def check(f):\n    assert f(1)", "entry_point": "g", "prompt": "import math\n"},
        CheckTests("def check(f):\n    assert f(1)", ["check(g)"], ["g"], "import math\n"),
    ),
    "mbpp": (
        {"test_list": ["assert f(1)"], "test_imports": ["import math"]},
        CheckTests("import math\n", ["assert f(1)"], [], ""),
    ),
    "mbppplus": (
        {"test": "assert f(1)", "prompt": "Write"},
        CheckTests("", ["assert f(1)"], [], ""),
    ),
    "mbpp-code": (
        {
            "test_list": ["assert sum(1)"],
            "code": "import a\ndef sum(x):\n    def g(): pass\nclass B: pass",
        },
        CheckTests("", ["assert sum(1)"], ["sum", "B"], ""),
    ),
    "mbpp-entry-point": (
        {"test_list": ["assert sum(1)"], "entry_point": "sum", "code": "def sum(x): pass"},
        CheckTests("", ["assert sum(1)"], ["sum"], ""),
    ),
    "asserts": (["assert f(1)"], CheckTests("", ["assert f(1)"], [], "")),
}


@pytest.mark.parametrize(("truth", "expected"), FORMS.values(), ids=FORMS.keys())
def test_forms_of_tests(truth, expected):
    assert read_tests(truth) == expected
    assert read_tests(json.dumps(truth) if not isinstance(truth, str) else truth) == expected


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ("no json", "is no JSON"),
        ("3", "none of the forms"),
        (None, "none of the forms"),
        ({}, "none of the forms"),
        ([], "none of the forms"),
        ({"inputs": [], "outputs": []}, "has no tests"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": ["1"]}, "not both lists"),
        ({"inputs": [3], "outputs": [3], "fn_name": "f"}, "are no list"),
        ([{"input": "1"}], "no input or output"),
        ([{"input": "1", "output": "1", "type": "functional"}], "names no function"),
        ({"test": "def check(f): pass"}, "names no entry_point"),
        ({"test": "assert (", "entry_point": "f"}, "is no Python"),
        (["assert f(", "assert g()"], "is no Python"),
        ({"test": "def check(f): pass", "entry_point": "f", "prompt": "Write f."}, "the prompt of"),
        (
            {"test_list": ["assert f()"], "code": "def f("},
            "the code of the ground_truth is no Python",
        ),
        ({"test": ""}, "an empty test"),
        (["assert f()", "# nothing"], "an empty test"),
        ({"test": 5}, "test is 5; give a text"),
        ({"test": "assert f()", "entry_point": ["f"]}, r"entry_point is \['f'\]; give a text"),
        ({"test_list": [1]}, r"test_list is \[1\]; give a list of texts"),
        ({"test_list": "assert f()"}, "test_list is assert f"),
        ({"public_test_cases": "[]", "metadata": "[]"}, r"metadata is '\[\]'; give an object"),
        (
            [{"input": "x", "output": "1", "type": "call", "fn_name": "f"}],
            "input 'x' of a test of f",
        ),
        (
            [{"input": "1", "output": 1, "type": "call", "fn_name": "f"}],
            "output '1' of a test of f",
        ),
    ],
)
def test_bad_tests_are_refused(truth, message):
    with pytest.raises(ValueError, match=message):
        read_tests(truth)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/flowrl-bomb",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (compressed(Bomb()), r"hold (posix|nt)\.system"),
        (compressed([Bomb()]), "system"),
        (compressed(len), "builtins.len"),
        (compressed([1, 2]), "a pickled list, not text"),
        (compressed("no json"), "cannot be read"),
        (base64.b64encode(b"\x80\x04.").decode(), "cannot be read"),
        (base64.b64encode(zlib.compress(b"\x80\x04.")).decode(), "cannot be read"),
        (compressed("[1]")[:20], "cannot be read"),
        ("%%%", "cannot be read"),
    ],
)
def test_private_cases_run_no_code(text, message):
    with pytest.raises(ValueError, match=message):
        decode_cases(text)
    assert not os.path.exists("/tmp/flowrl-bomb")
