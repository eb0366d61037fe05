"""Python programs against tests: 1 if all pass. The programs run in `sandbox`, and only there.

The verdict is made where no program is: what a program prints, and what its functions return as
plain values, is compared in this process; checks written in Python, as HumanEval's, run in a
process of their own, to which the program's functions are calls over a pipe. A program never holds
an expected value, so all that it can do about its verdict is to satisfy the tests.
"""

import json
import math
import time
from dataclasses import dataclass, fields
from typing import Any

from flowrl.rewards.code_answer import extract_program, same_output, same_value
from flowrl.rewards.code_tests import CallTest, CheckTests, PrintTest, read_tests
from flowrl.rewards.sandbox import plain
from flowrl.rewards.sandbox.client import Limits, Sandbox, SandboxError, open_sandbox


@dataclass(frozen=True)
class Options:
    """What a row may ask for in extra_info["code"]."""

    time_limit_s: float = 6.0  # each test; the checks of a row count as one
    total_time_limit_s: float = 9.0  # all tests; below reward.timeout_s, which ends the worker
    memory_limit_mb: int = 1024
    max_tests: int = 0  # keep those with the longest inputs; 0: all
    score: str = "all"  # 1 if all tests pass; or "fraction": of the tests that passed
    isolation: str = "landlock"  # the weakest level to accept; see sandbox/confine.py

    def __post_init__(self) -> None:
        for name in ("time_limit_s", "total_time_limit_s"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(
                    f"extra_info['code'][{name!r}] is {value!r}; give a number of seconds above 0"
                )
        for name, least in (("memory_limit_mb", 1), ("max_tests", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"extra_info['code'][{name!r}] is {value!r}; give a whole number >= {least}"
                )
        if self.score not in ("all", "fraction"):
            raise ValueError(f"extra_info['code']['score'] is {self.score!r}; all or fraction")


# Of this process, by the level that is required; they live as long as it.
_sandboxes: dict[str, Sandbox] = {}


def warm_up() -> None:
    """Starts the sandbox, so that no request pays for it. Raises ValueError if none works."""
    _sandbox(Options().isolation)


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict | None = None
) -> dict[str, Any]:
    """1.0 if the response's program passes all tests, else 0.0; or the fraction that passed.

    Forms of ground_truth: see `code_tests`; of extra_info["code"]: see `Options`. Returns beside
    score: num_passed, num_tests, isolation (the level at which the program ran), message and
    code_reason, of the first test that failed: "passed", "no_code", "wrong_answer" or what
    `sandbox.client.Finished` names. After a failure no more tests run, unless the score is a
    fraction.

    Raises ValueError for an unknown form or option, or if the required level of isolation does not
    work here; SandboxError, a RuntimeError, if the sandbox itself ends.
    """
    options = read_options(extra_info)
    tests = read_tests(ground_truth)
    code = extract_program(solution_str)
    if isinstance(tests, CheckTests):
        num_tests = len(tests.checks)
    else:
        tests = _longest(tests, options.max_tests)
        num_tests = len(tests)
    assert num_tests > 0  # else every program would pass
    level, passed, reason, message = "", 0, "no_code", ""
    if code is not None:
        sandbox = _sandbox(options.isolation)
        level = sandbox.level
        try:
            if isinstance(tests, CheckTests):
                passed, reason, message = _check(sandbox, code, tests, options)
            else:
                passed, reason, message = _run_tests(sandbox, code, tests, options)
        except SandboxError:
            _sandboxes.pop(options.isolation).close()
            raise
    is_fraction = options.score == "fraction"
    return {
        "score": passed / num_tests if is_fraction else float(passed == num_tests),
        "code_reason": reason,
        "num_passed": passed,
        "num_tests": num_tests,
        "isolation": level,
        "message": message,
    }


def read_options(extra_info: dict | None) -> Options:
    """The options of a row. Raises ValueError for an unknown one, or a value out of range."""
    given = (extra_info or {}).get("code") or {}
    known = {item.name for item in fields(Options)}
    if not isinstance(given, dict) or not given.keys() <= known:
        raise ValueError(f"extra_info['code'] is {given!r}; its keys may be {sorted(known)}")
    return Options(**{key: value for key, value in given.items() if value is not None})


def _sandbox(required: str) -> Sandbox:
    if required not in _sandboxes:
        _sandboxes[required] = open_sandbox(required)
    return _sandboxes[required]


def _longest(tests: list[Any], max_tests: int) -> list[Any]:
    if not max_tests or len(tests) <= max_tests:
        return tests
    order = sorted(range(len(tests)), key=lambda index: -tests[index].size)
    return [tests[index] for index in sorted(order[:max_tests])]


def _run_tests(
    sandbox: Sandbox, code: str, tests: list[PrintTest | CallTest], options: Options
) -> tuple[int, str, str]:
    """How many tests passed, and why the first that did not failed."""
    deadline = time.monotonic() + options.total_time_limit_s
    num_passed, first_reason, first_message = 0, "passed", ""
    for test in tests:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            reason, message = "time_limit", "the total time limit"
        else:
            limits = _limits(options, remaining_s)
            reason, message = _run_test(sandbox, code, test, limits)
        if reason == "passed":
            num_passed += 1
            continue
        if first_reason == "passed":
            first_reason, first_message = reason, message
        if options.score == "all":
            break
    return num_passed, first_reason, first_message


def _limits(options: Options, remaining_s: float) -> Limits:
    return Limits(min(options.time_limit_s, remaining_s), options.memory_limit_mb)


def _run_test(
    sandbox: Sandbox, code: str, test: PrintTest | CallTest, limits: Limits
) -> tuple[str, str]:
    if isinstance(test, PrintTest):
        finished = sandbox.run(code, test.stdin, limits)
        is_right = finished.reason is None and same_output(finished.output, test.expected)
    else:
        finished = sandbox.call(code, test.function, test.arguments, limits)
        is_right = finished.reason is None and _is_expected(finished.result, test)
    if finished.reason is not None:
        return finished.reason, _last_line(finished.error)
    return ("passed", "") if is_right else ("wrong_answer", "")


def _is_expected(result: str, test: CallTest) -> bool:
    try:
        value = plain.decode(result)
        if same_value(value, test.expected):
            return True
        is_wrapped = isinstance(test.expected, list) and len(test.expected) == 1
        return test.may_unwrap and is_wrapped and same_value(value, test.expected[0])
    except (ValueError, RecursionError):
        return False


def _check(
    sandbox: Sandbox, code: str, tests: CheckTests, options: Options
) -> tuple[int, str, str]:
    limits = _limits(options, options.total_time_limit_s)
    finished = sandbox.check(code, tests.setup, tests.checks, tests.functions, limits, tests.prompt)
    num_passed = sum(json.loads(finished.result))
    if num_passed == len(tests.checks):
        return num_passed, "passed", ""
    return num_passed, finished.reason or "wrong_answer", _last_line(finished.error)


def _last_line(error: str) -> str:
    return error.rstrip().rpartition("\n")[2][:200]
