"""Code rewards: reasons, limits and options, ordinary programs, checks, and the bars."""

import json
from typing import Any

import pytest

from flowrl.rewards import REWARDS, RewardPool, RewardRequest
from flowrl.rewards.auto import route
from flowrl.rewards.code import _sandboxes
from flowrl.rewards.sandbox.client import Limits, SandboxError, open_sandbox

ECHO = {"inputs": ["3\n", "4\n"], "outputs": ["3\n", "4\n"]}


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


def score(code: str, truth: Any, **options: Any) -> dict[str, Any]:
    return REWARDS["code"]("test", fenced(code), truth, {"code": options})


REASONS = {
    "passed": "print(input())",
    "wrong_answer": "print(3)",
    "runtime_error": "raise ValueError(3)",
    "time_limit": "while True: pass",
    "memory_limit": "x = bytearray(1 << 40)",
    "output_limit": "while True: print('x' * 999)",
    "forbidden": "import socket; socket.socket()",
}


@pytest.mark.parametrize(("reason", "code"), REASONS.items(), ids=REASONS.keys())
def test_reasons(reason, code):
    limit_s = 0.5 if reason == "time_limit" else 10.0
    returned = score(code, ECHO, time_limit_s=limit_s, total_time_limit_s=20.0)
    num_passed = {"passed": 2, "wrong_answer": 1}.get(reason, 0)
    assert (returned["score"], returned["code_reason"]) == (float(reason == "passed"), reason)
    assert (returned["num_passed"], returned["num_tests"]) == (num_passed, 2)
    assert returned["isolation"] in ("namespaces", "landlock")


def test_a_response_without_a_program():
    returned = REWARDS["code"]("test", "print(input())", ECHO, None)
    assert (returned["score"], returned["code_reason"]) == (0.0, "no_code")


def test_a_fraction_of_the_tests():
    truth = {"inputs": list("12345"), "outputs": list("12845")}
    assert score("print(input())", truth)["score"] == 0.0
    returned = score("print(input())", truth, score="fraction")
    assert (returned["score"], returned["code_reason"]) == (0.8, "wrong_answer")
    checks = ["assert f(1) == 1", "assert f(2) == 3", "assert f(3) == 3"]
    code = "def f(x):\n    return x"
    assert score(code, checks)["score"] == 0.0
    assert score(code, checks, score="fraction")["score"] == pytest.approx(2 / 3)


def test_the_longest_inputs_are_kept():
    truth = {"inputs": ["1", "333", "22", "1"], "outputs": ["x", "333", "22", "x"]}
    returned = score("print(input())", truth, max_tests=2, score=None)
    assert (returned["score"], returned["num_tests"]) == (1.0, 2)


def test_the_total_time_is_limited():
    truth = {"inputs": ["0.4"] * 50, "outputs": [""] * 50}
    code = "import time\ntime.sleep(float(input()))"
    returned = score(code, truth, total_time_limit_s=1.0, score="fraction")
    assert returned["code_reason"] == "time_limit"
    assert returned["num_passed"] <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time": 3}, "its keys may be"),
        ({"time_limit_s": 0}, r"\['time_limit_s'\] is 0; give a number of seconds above 0"),
        ({"time_limit_s": "6"}, r"\['time_limit_s'\] is '6'; give"),
        ({"total_time_limit_s": float("inf")}, r"\['total_time_limit_s'\] is inf; give"),
        ({"memory_limit_mb": 1.5}, r"\['memory_limit_mb'\] is 1.5; give a whole number >= 1"),
        ({"max_tests": -1}, r"\['max_tests'\] is -1; give a whole number >= 0"),
        ({"max_tests": -1, "score": "fraction"}, r"\['max_tests'\] is -1"),
        ({"max_tests": 2.0}, r"\['max_tests'\] is 2.0"),
        ({"score": "some"}, "'some'; all or fraction"),
        ({"isolation": "none"}, "isolation 'none' is unknown"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        score("print(3)", ECHO, **options)


PROGRAMS = {
    "reads-lines": "import sys\nfor line in sys.stdin: print(line.strip())",
    "reads-bytes": "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())",
    "reads-descriptor": "import os\nos.write(1, os.read(0, os.fstat(0).st_size))",
    "opens-descriptor": "print(open(0).read())",
    "main-guard": "if __name__ == '__main__':\n    print(input())",
    "leaves-a-file-open": "out = open(1, 'w', closefd=False)\nout.write(input())",
    "exit-handler": "import atexit, io, sys\nout = io.StringIO()\n"
    "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nout.write(input())",
    "replaced-streams": "import io, os, sys\nsys.stdin = io.StringIO(os.read(0, 99).decode())\n"
    "sys.stdout = open(1, 'w', closefd=False)\nprint(input())",
    "exits-in-the-middle": "import sys\nprint(input())\nsys.exit()\nprint(3)",
    "thread": "import threading\ndef f(): print(input())\nthreading.stack_size(1 << 26)\n"
    "t = threading.Thread(target=f)\nt.start()",
    "deep-recursion": "import sys\nsys.setrecursionlimit(10**6)\n"
    "def f(n): return n and f(n - 1)\nf(50000)\nprint(input())",
    "names-without-import": "d = deque([int(input())])\nprint(gcd(d[0], 0), sep='')",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    "print(A(int(input())).x)",
    "numpy": "import numpy as np\nprint(np.array([int(input())]).sum())",
    "standard-library": "import bisect, decimal, fractions, heapq, itertools, re, string, typing\n"
    "print(decimal.Decimal(input()))",
    "swallows-errors": "import socket\ntry: open('/etc/passwd')\nexcept OSError: print(input())",
    "scratch-error": "try: open('/x', 'w')\nexcept OSError: print(input())",
}


@pytest.mark.parametrize("code", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_ordinary_programs_pass(code):
    returned = score(code, ECHO)
    assert (returned["code_reason"], returned["message"]) == ("passed", "")


def test_a_verdict_does_not_depend_on_chance():
    code = (
        "import random, numpy\nprint(random.random(), numpy.random.rand(), list(set('abcdefgh')))"
    )
    outputs = set()
    for _ in range(2):
        with open_sandbox() as sandbox:
            outputs |= {sandbox.run(code, "", Limits()).output for _ in range(2)}
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 10


def test_a_sandbox_that_ended_is_an_error_and_is_replaced():
    assert score("print(input())", ECHO)["score"] == 1.0
    _sandboxes["landlock"]._process.kill()
    _sandboxes["landlock"]._process.wait()
    with pytest.raises(SandboxError, match="the sandbox"):
        score("print(input())", ECHO)
    assert score("print(input())", ECHO)["score"] == 1.0


HUMANEVAL = {
    "prompt": "import math\n\n\ndef half(x):\n    return x / 2\n\n\ndef f(x):\n    '''doc'''\n",
    "entry_point": "f",
    "test": (
        "import numpy as np\nMETADATA = {}\n\n\ndef check(candidate):\n"
        "    for x, y in [(2, [1.0]), (3, [1.5])]:\n"
        "        assert np.allclose(candidate(x), y, atol=1e-6)\n"
        "    assert half(4) == 2\n"
    ),
}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x):\n    return [half(x)]", "passed"),
        ("    return [half(x)]", "passed"),
        ("def f(x):\n    return [x]", "wrong_answer"),
        ("def g(x):\n    return [x / 2]", "wrong_answer"),
        ("def f(x):\n    while True: pass", "time_limit"),
        ("def f(x):\n    import socket; socket.socket()", "forbidden"),
        ("def f(x):\n    return lambda: 0", "wrong_answer"),
        ("raise SystemExit(0)", "wrong_answer"),
        ("import os; os._exit(0)", "wrong_answer"),
        ("import os; os.abort()", "runtime_error"),
    ],
)
def test_checks_with_numpy_and_prompt(code, expected):
    returned = score(code, HUMANEVAL, total_time_limit_s=1.0 if expected == "time_limit" else 20.0)
    assert (returned["code_reason"], returned["score"]) == (expected, float(expected == "passed"))


CIPHER = {
    "prompt": (
        "def encode(s: str):\n    return ''.join([chr(ord(c) + 1) for c in s])\n\n\n"
        "def longest(words: List[str]):\n    return decode(max(words, key=len))\n\n\n"
        "def decode(s: str):\n    'The inverse of encode.'\n"
    ),
    "entry_point": "decode",
    "test": (
        "def check(candidate):\n"
        "    for s in ('', 'abc', 'xy'):\n"
        "        assert candidate(encode(s)) == s\n"
        "    assert longest(['b', encode('xy')]) == 'xy'\n"
    ),
}
DECODE = "def decode(s):\n    return ''.join([chr(ord(c) - 1) for c in s])"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (DECODE, "passed"),
        ("from __future__ import annotations\n" + DECODE, "passed"),
        ("    return ''.join([chr(ord(c) - 1) for c in s])", "passed"),
        (
            "def decode(s):\n    return encode(s)[:0] + ''.join([chr(ord(c) - 1) for c in s])",
            "passed",
        ),
        ("def encode(s):\n    return s\ndef decode(s):\n    return s", "wrong_answer"),
        ("def longest(x):\n    return 'xy'\ndef decode(s):\n    return s", "wrong_answer"),
        ("x = 1", "wrong_answer"),
    ],
)
def test_what_the_prompt_defines_is_not_the_programs(code, expected):
    returned = score(code, CIPHER, total_time_limit_s=20.0)
    assert (returned["code_reason"], returned["score"]) == (expected, float(expected == "passed"))


CLOSE = "import numpy as np\nassert np.allclose(f(3), {0}, atol=1e-6)"
ASSERT_CLOSE = "import numpy as np\nnp.testing.assert_allclose(actual=f(3), desired={0}, rtol=1e-6)"


@pytest.mark.parametrize("check", [CLOSE, ASSERT_CLOSE], ids=["allclose", "assert_allclose"])
@pytest.mark.parametrize(
    ("returned", "expected", "is_right"),
    [
        ("1.5", "1.5", True),
        ("[1.5, 2]", "(1.5, 2)", True),
        ("[]", "1.5", False),
        ("[[]]", "[1.5]", False),
        ("[1.5, 1.5]", "1.5", False),
        ("1.6", "1.5", False),
    ],
)
def test_close_values_have_one_shape(check, returned, expected, is_right):
    code = f"def f(x):\n    return {returned}"
    assert score(code, [check.format(expected)], total_time_limit_s=20.0)["score"] == is_right


MBPP = {"test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"]}
RIGHT_SUM = "def sum(a, b):\n    return {(10, 15): 6, (100, 150): 93}[a, b]"


@pytest.mark.parametrize(
    "named", [{"entry_point": "sum"}, {"code": RIGHT_SUM}], ids=["name", "code"]
)
def test_a_function_may_have_a_built_in_name(named):
    assert score(RIGHT_SUM, MBPP | named)["score"] == 1.0
    returned = score("def sum(a, b):\n    return 6", MBPP | named)
    assert (returned["score"], returned["num_passed"]) == (0.0, 1)


def test_what_passed_before_a_check_hangs_counts():
    checks = ["assert f(1) == 1", "assert f(2) == 3", "assert f(0) == 0", "assert f(4) == 4"]
    code = "def f(x):\n    while not x: pass\n    return x"
    returned = score(code, checks, score="fraction", total_time_limit_s=4.0)
    assert (returned["score"], returned["num_passed"]) == (0.25, 1)
    assert (returned["code_reason"], returned["num_tests"]) == ("time_limit", 4)


def test_checks_that_end_themselves_are_a_fault_of_the_test():
    returned = score("def f(x): return x", ["import sys; sys.exit(f(0))"])
    assert (returned["score"], returned["code_reason"]) == (0.0, "test_error")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        *((source, "code") for source in ("taco", "apps", "codecontests", "codeforces")),
        *((source, "code") for source in ("livecodebench", "humaneval", "humanevalplus", "mbpp")),
        *((source, "code") for source in ("code", "BAAI/TACO", "evalplus/humanevalplus")),
    ],
)
def test_auto_finds_the_reward(source, name):
    assert route(source, None) == name


# Expressions over a list xs of integers: right and wrong. Every wrong one differs on a test.
EXPRESSIONS = {
    "sum(xs)": "sum(xs[1:])",
    "max(xs)": "max(xs[:-1])",
    "min(xs)": "xs[0] + 1",
    "len(xs)": "len(xs) - 1",
    "sorted(xs)[0]": "sorted(xs)[1]",
    "sorted(xs)[-2]": "sorted(xs)[-1]",
    "xs[0] * xs[1]": "xs[0] * xs[2]",
    "xs[0] - xs[-1]": "xs[-1] - xs[0]",
    "len(set(xs))": "len(xs) + 1",
    "sum(x * x for x in xs)": "sum(x * x for x in xs) + 1",
    "sum(x % 2 for x in xs)": "sum(1 - x % 2 for x in xs) + len(xs)",
    "xs[::-1]": "xs",
    "sorted(xs)": "sorted(xs, reverse=True)",
    "[x + 1 for x in xs]": "[x - 1 for x in xs]",
    "[x for x in xs if x > 2]": "[x for x in xs if x <= 2]",
    "xs[1:] + xs[:1]": "xs[-1:] + xs[:-1]",
    "list(itertools.accumulate(xs))": "xs",
    "[a * b for a, b in zip(xs, xs[1:])]": "[a + b + 100 for a, b in zip(xs, xs[1:])]",
    "functools.reduce(math.gcd, xs)": "functools.reduce(math.gcd, xs) + 1",
    "math.prod(xs)": "-math.prod(xs)",
    "str(xs[0]) * 3": "str(xs[0]) * 2",
    "'-'.join(map(str, xs))": "'+'.join(map(str, xs))",
    "''.join(map(chr, [x + 97 for x in xs]))": "''.join(map(chr, [x + 98 for x in xs]))",
    "xs[0] / 7": "xs[0] / 8",
    "sum(xs) / len(xs)": "sum(xs) / len(xs) + 0.001",
}
LISTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
IMPORTS = "import functools, itertools, math, sys\n"
PRINTED = "print(*y) if isinstance(y, list) else print(y)"
STYLES = {
    "input": f"{IMPORTS}xs = list(map(int, input().split()))\ny = {{}}\n{PRINTED}",
    "stdin": f"{IMPORTS}xs = [int(x) for x in sys.stdin.read().split()]\ny = {{}}\n{PRINTED}",
    "main": f"{IMPORTS}def main():\n    xs = list(map(int, sys.stdin.readline().split()))\n"
    f"    y = {{}}\n    {PRINTED}\nif __name__ == '__main__':\n    main()",
    "write": f"{IMPORTS}xs = list(map(int, open(0).read().split()))\ny = {{}}\n"
    "sys.stdout.write(' '.join(map(str, y)) if isinstance(y, list) else str(y))",
    "function": f"{IMPORTS}def f(xs):\n    return {{}}",
    "solution": f"{IMPORTS}class Solution:\n    def f(self, xs: List[int]):\n        return {{}}",
    "check": f"{IMPORTS}def f(xs):\n    return {{}}",
    "asserts": f"{IMPORTS}def f(xs):\n    return {{}}",
}


def truth_of(style: str, expression: str) -> Any:
    """The tests of a task in the form that belongs to the style."""
    space = {name: __import__(name) for name in ("functools", "itertools", "math")}
    values = [eval(expression, {**space, "xs": xs}) for xs in LISTS]
    if style in ("function", "solution"):
        cases = zip(LISTS, values, strict=True)
        cases = [{"input": json.dumps(xs), "output": json.dumps(value)} for xs, value in cases]
        return [case | {"testtype": "functional", "fn_name": "f"} for case in cases]
    if style == "check":
        pairs = list(zip(LISTS, values, strict=True))
        test = f"def check(f):\n    for xs, y in {pairs!r}:\n        assert f(xs) == y"
        return {"test": test, "entry_point": "f"}
    if style == "asserts":
        return [f"assert f({xs}) == {y!r}" for xs, y in zip(LISTS, values, strict=True)]
    outputs = [" ".join(map(str, y)) if isinstance(y, list) else str(y) for y in values]
    return {"inputs": [" ".join(map(str, xs)) for xs in LISTS], "outputs": outputs}


def test_200_right_and_200_wrong_programs():
    requests, expected = [], []
    for right, wrong in EXPRESSIONS.items():
        for style, template in STYLES.items():
            for expression in (right, wrong):
                code = template.format(expression)
                requests.append(RewardRequest("taco", fenced(code), truth_of(style, right)))
                expected.append("passed" if expression == right else "wrong_answer")
    assert expected.count("passed") == expected.count("wrong_answer") == 200
    with RewardPool("auto", num_workers=2, timeout_s=60.0) as pool:
        results = pool.score(requests)
        metrics = pool.metrics()
    assert {name: value for name, value in metrics.items() if value} == {
        "reward/code/passed": 0.5,
        "reward/code/wrong_answer": 0.5,
    }
    assert [result.extra.get("code_reason", result.message) for result in results] == expected
    assert [result.score for result in results] == [float(e == "passed") for e in expected]
