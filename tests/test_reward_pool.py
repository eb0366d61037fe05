import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flowrl.rewards import RewardPool, RewardRequest, RewardResult

# One file of reward functions, as a user writes them; the solution says what to do.
FUNCTIONS = """
import os, subprocess, sys, time
from fractions import Fraction
from pathlib import Path

def length(data_source, solution_str, ground_truth, extra_info=None):
    return len(solution_str)

def arguments(data_source, solution_str, ground_truth, extra_info):
    return {"score": 1, "seen": [data_source, solution_str, ground_truth, extra_info]}

class Odd(Exception):
    pass

def raises_odd():
    raise Odd("three")

def returns(data_source, solution_str, ground_truth, extra_info=None):
    return eval(solution_str)

def runs(data_source, solution_str, ground_truth, extra_info=None):
    exec(solution_str, globals())
    return 1.0

def draws(data_source, solution_str, ground_truth, extra_info=None):
    import random
    return random.random()

def modules(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": os.getpid(), "torch": "torch" in sys.modules, "numpy": "numpy" in sys.modules}

"""


@pytest.fixture
def functions(tmp_path: Path) -> str:
    path = tmp_path / "my_rewards.py"
    path.write_text(FUNCTIONS)
    return str(path)


def score(pool: RewardPool, *solutions: str) -> list[RewardResult]:
    return pool.score([RewardRequest("test", solution) for solution in solutions])


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def wait_until_gone(pid: int, timeout_s: float = 5.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def read_pid(path: Path, timeout_s: float = 10.0) -> int:
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)
    return int(path.read_text())


def test_arguments_and_extras_pass_through(functions):
    info = {"index": 3, "nested": [1.5, None, "\u00e9\ud800"]}
    with RewardPool(f"{functions}:arguments", num_workers=1) as pool:
        results = pool.score([RewardRequest("src", "a\nb", {"target": 2}, info)])
    assert results == [RewardResult(1.0, None, "", {"seen": ["src", "a\nb", {"target": 2}, info]})]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_are_in_order(functions, num_workers):
    solutions = ["x" * (37 * i % 101) for i in range(200)]
    with RewardPool(f"{functions}:length", num_workers=num_workers) as pool:
        results = score(pool, *solutions)
        assert pool.counts["requests"] == 200
    assert [result.score for result in results] == [len(s) for s in solutions]


def test_draws_do_not_depend_on_the_number_of_workers(functions):
    scores = []
    for num_workers in (1, 3):
        with RewardPool(f"{functions}:draws", num_workers=num_workers) as pool:
            scores.append([r.score for r in score(pool, *"abcdefgh")])
    assert scores[0] == scores[1]
    assert len(set(scores[0])) == 8


def test_draws_are_seeded_by_the_response(functions):
    with RewardPool(f"{functions}:draws", num_workers=1) as pool:
        results = score(pool, "a\u00e9", "cut \ud83d")  # half of a character, as a model may end
    assert [result.failure for result in results] == [None, None]
    random.seed("a\u00e9")
    assert results[0].score == random.random()


def test_empty_batch():
    with RewardPool("exact", num_workers=1) as pool:
        assert pool.score([]) == []
        assert pool.metrics()["reward/timeout"] == 0.0


def test_built_in_and_module_paths():
    with RewardPool("exact", num_workers=1) as pool:
        assert [r.score for r in pool.score([RewardRequest("", "a ", "a")])] == [1.0]
    with RewardPool("flowrl.rewards.numeric:compute_score", num_workers=1) as pool:
        assert [r.score for r in pool.score([RewardRequest("", "12.0", 12)])] == [1.0]


GOOD_RETURNS = {
    "0.25": (0.25, {}),
    "2": (2.0, {}),
    "True": (1.0, {}),
    "Fraction(1, 4)": (0.25, {}),
    "__import__('numpy').float32(0.5)": (0.5, {}),
    "{'score': 1, 'acc': True, 'pred': 'x'}": (1.0, {"acc": True, "pred": "x"}),
    "{'score': 1, 'n': __import__('numpy').int64(3), 5: {1}}": (1.0, {"n": 3.0, "5": "{1}"}),
}


def test_returned_numbers(functions):
    with RewardPool(f"{functions}:returns", num_workers=1) as pool:
        results = score(pool, *GOOD_RETURNS)
    assert [(r.score, r.extra) for r in results] == list(GOOD_RETURNS.values())
    assert {r.failure for r in results} == {None}


BAD_RETURNS = {
    "float('nan')": "returned nan",
    "float('inf')": "returned inf",
    "-float('inf')": "returned -inf",
    "'1.0'": "'1.0' of type str",
    "None": "None of type NoneType",
    "[1.0]": "of type list",
    "1j": "of type complex",
    "10**400": "too large",
    "{}": "without 'score'",
    "{'acc': 1.0}": "without 'score': \\['acc'\\]",
    "{'score': None}": "None of type NoneType",
    "{'score': float('nan')}": "returned nan",
    "{'score': 1, 'x': (d := {}) or d.update(d=d) or d}": "Circular",
}


def test_bad_returns_are_invalid_and_counted(functions):
    with RewardPool(f"{functions}:returns", num_workers=2, failure_score=-0.5) as pool:
        results = score(pool, *BAD_RETURNS, "0.75")
        assert pool.counts == {
            "requests": len(BAD_RETURNS) + 1,
            "timeout": 0,
            "crash": 0,
            "exception": 0,
            "invalid": len(BAD_RETURNS),
        }
        fraction = len(BAD_RETURNS) / (len(BAD_RETURNS) + 1)
        assert pool.metrics() == {
            "reward/timeout": 0.0,
            "reward/crash": 0.0,
            "reward/exception": 0.0,
            "reward/invalid": fraction,
        }
    assert results[-1] == RewardResult(0.75)
    for result, pattern in zip(results, BAD_RETURNS.values(), strict=False):
        assert (result.score, result.failure) == (-0.5, "invalid")
        pytest.raises(ValueError, _raise, result.message).match(pattern)


def _raise(message: str) -> None:
    raise ValueError(message)


def test_exceptions_keep_their_message_and_the_worker(functions):
    with RewardPool(f"{functions}:returns", num_workers=1) as pool:
        first = score(pool, "os.getpid()")[0].score
        results = score(pool, "1/0", "missing", "sys.exit(3)", "(", "os.getpid()")
        assert pool.counts["exception"] == 4
        assert pool.metrics()["reward/exception"] == 0.8
    assert results[0].message.startswith("ZeroDivisionError: division by zero (")
    assert "name 'missing' is not defined" in results[1].message
    assert results[2].message.startswith("SystemExit: 3")
    assert results[3].message.startswith("SyntaxError")
    assert [r.failure for r in results] == ["exception"] * 4 + [None]
    assert results[4].score == first


def test_an_exception_of_unknown_kind_is_reported_and_replaces_the_worker(functions):
    with RewardPool(f"{functions}:returns", num_workers=1) as pool:
        first, odd, second = score(pool, "os.getpid()", "raises_odd()", "os.getpid()")
    assert (odd.score, odd.failure) == (0.0, "exception")
    assert odd.message.startswith("Odd: three (my_rewards.py:")
    assert first.failure is None and second.failure is None
    assert first.score != second.score


def test_the_order_of_sets_is_the_same_in_all_workers(functions):
    code = "{'score': 0, 'order': list(set('abcdefghijklmnop'))}"
    orders = set()
    for _ in range(2):
        with RewardPool(f"{functions}:returns", num_workers=1) as pool:
            orders.add(tuple(score(pool, code)[0].extra["order"]))
    assert len(orders) == 1


CRASHES = {
    "os._exit(3)": "exited with status 3",
    "os._exit(0)": "exited with status 0",
    "os.kill(os.getpid(), 11)": "ended by SIGSEGV",
    "os.abort()": "ended by SIGABRT",
    "os.killpg(0, 9)": "ended by SIGKILL",
    "__import__('ctypes').string_at(0)": "ended by SIGSEGV",
    "raise MemoryError('full')": "MemoryError: full",
    "x = bytearray(1 << 40)": "MemoryError",
    "os.closerange(3, 100)": "",
}


def test_a_crash_costs_its_own_request_only(functions):
    jobs = [job for crash in CRASHES for job in (crash, "pass")]
    with RewardPool(f"{functions}:runs", num_workers=2, failure_score=-1.0) as pool:
        results = score(pool, *jobs)
        assert pool.counts["crash"] == len(CRASHES)
        assert score(pool, "pass") == [RewardResult(1.0)]
    assert [r.score for r in results[1::2]] == [1.0] * len(CRASHES)
    for result, message in zip(results[::2], CRASHES.values(), strict=True):
        assert (result.score, result.failure) == (-1.0, "crash")
        assert message in result.message


HANGS = {
    "sleep": "time.sleep(60)",
    "python-loop": "\nwhile True: pass",
    "loop-in-c": "9**9**9",
    "ignores-signals": (
        "import signal\n"
        "for s in range(1, 32):\n"
        "  if s not in (9, 19): signal.signal(s, lambda *_: 0)\n"
        "while True: time.sleep(1)"
    ),
    "catches-all": "\nwhile True:\n  try: time.sleep(1)\n  except BaseException: pass",
    "child": "subprocess.run(['sleep', '60'])",
}


def test_hanging_requests_are_killed(functions):
    jobs = [job for hang in HANGS.values() for job in (hang, "pass")]
    with RewardPool(f"{functions}:runs", num_workers=6, timeout_s=1.0) as pool:
        start = time.monotonic()
        results = score(pool, *jobs)
        assert 1.0 <= time.monotonic() - start < 8.0
        assert pool.counts["timeout"] == len(HANGS)
    late = RewardResult(0.0, "timeout", "no score within timeout_s = 1 s", {})
    assert dict(zip(HANGS, results[::2], strict=True)) == dict.fromkeys(HANGS, late)
    assert results[1::2] == [RewardResult(1.0)] * len(HANGS)


def test_hanging_requests_are_timed_from_their_dispatch(functions):
    # Together they take 1.8 s on the one worker, but each of them only 0.6 s.
    with RewardPool(f"{functions}:runs", num_workers=1, timeout_s=1.5) as pool:
        results = score(pool, *["time.sleep(0.6)"] * 3)
    assert [r.failure for r in results] == [None] * 3


def test_prints_do_not_disturb(functions, capfd):
    noise = [
        "print('x' * 3_000_000)",
        "os.write(1, b'\\0' * 100_000)",
        "sys.stdout.close(); os.close(1)",
        "sys.stdin.close(); os.close(0)",
        "assert sys.stdin is None or sys.stdin.closed or sys.stdin.read() == ''",
    ]
    with RewardPool(f"{functions}:runs", num_workers=1) as pool:
        assert score(pool, *noise) == [RewardResult(1.0)] * len(noise)
        assert pool.counts["requests"] == len(noise)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("x") >= 3_000_000


def test_large_messages(functions):
    solutions = ["a" * 10_000_000, "b" * 12_000_000, "c"]
    with RewardPool(f"{functions}:length", num_workers=2) as pool:
        assert [r.score for r in score(pool, *solutions)] == [1e7, 1.2e7, 1.0]
    with RewardPool(f"{functions}:arguments", num_workers=2) as pool:
        results = score(pool, *solutions)
    assert [r.extra["seen"][1] for r in results] == solutions


def test_a_fork_that_returns_sends_no_second_reply(functions):
    with RewardPool(f"{functions}:runs", num_workers=1) as pool:
        code = "if os.fork() == 0: raises_odd()"
        results = score(pool, *["os.fork()", "pass", code, "pass"] * 4)
    assert results == [RewardResult(1.0)] * 16


def test_no_process_outlives_the_pool(functions, tmp_path):
    stray, worker = tmp_path / "stray", tmp_path / "worker"
    code = (
        f"Path({str(worker)!r}).write_text(str(os.getpid()))\n"
        f"Path({str(stray)!r}).write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
    )
    with RewardPool(f"{functions}:runs", num_workers=1) as pool:
        assert score(pool, code)[0].score == 1.0
        pids = [read_pid(stray), read_pid(worker)]
        assert all(map(is_running, pids))
    assert all(wait_until_gone(pid) for pid in pids)


@pytest.mark.parametrize("ending", ["os._exit(1)", "time.sleep(60)"], ids=["crash", "timeout"])
def test_a_stray_child_that_holds_the_pipes_dies_with_its_worker(functions, tmp_path, ending):
    stray = tmp_path / "stray"
    code = (
        "if os.fork() == 0:\n"
        f"  Path({str(stray)!r}).write_text(str(os.getpid()))\n"
        "  time.sleep(60)\n"
        f"while not Path({str(stray)!r}).exists(): time.sleep(0.01)\n"
        f"{ending}"
    )
    with RewardPool(f"{functions}:runs", num_workers=1, timeout_s=2.0) as pool:
        start = time.monotonic()
        result = score(pool, code)[0]
        assert result.failure == ("crash" if "exit" in ending else "timeout")
        assert time.monotonic() - start < 4.0
        assert wait_until_gone(read_pid(stray))
        assert score(pool, "pass") == [RewardResult(1.0)]


def test_a_pool_that_is_dropped_ends_its_workers(functions):
    pool = RewardPool(f"{functions}:modules", num_workers=1)
    pid = int(score(pool, "")[0].score)
    assert is_running(pid)
    del pool
    assert wait_until_gone(pid)


PARENT = """
import sys, threading
from flowrl.rewards import RewardPool, RewardRequest
pool = RewardPool(sys.argv[1], num_workers=1, timeout_s=60)
code = "Path(%r).write_text(str(os.getpid()))\\n" % sys.argv[2]
{ending}
"""
ENDINGS = {
    "killed-during-a-hang-in-c": "pool.score([RewardRequest('', code + '9**9**9')])",
    "exits-without-close": "pool.score([RewardRequest('', code)])",
    "raises": "pool.score([RewardRequest('', code)]); raise KeyboardInterrupt",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS.keys())
def test_workers_die_with_their_parent(functions, tmp_path, ending):
    marker = tmp_path / "worker"
    command = [sys.executable, "-c", PARENT.format(ending=ending)]
    parent = subprocess.Popen(
        [*command, f"{functions}:runs", str(marker)], stderr=subprocess.DEVNULL
    )
    try:
        worker = read_pid(marker)
        if "9**9**9" in ending:
            parent.kill()
        parent.wait(timeout=10)
        assert wait_until_gone(worker)
    finally:
        parent.kill()
        parent.wait()


@pytest.fixture
def obeys_sigint():
    # What a shell started in the background ignores the signal, and Python leaves it so.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupted_score_cancels_the_rest(functions, obeys_sigint):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with RewardPool(f"{functions}:runs", num_workers=1, timeout_s=30.0) as pool:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            score(pool, *["time.sleep(20)"] * 3)
        start = time.monotonic()
    assert time.monotonic() - start < 2.0


def test_scores_from_several_threads(functions):
    with RewardPool(f"{functions}:length", num_workers=2) as pool:
        found: dict[int, list[float]] = {}

        def work(thread: int) -> None:
            results = score(pool, *["x" * (thread + i) for i in range(50)])
            found[thread] = [r.score for r in results]

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.counts["requests"] == 200
    assert found == {n: [float(n + i) for i in range(50)] for n in range(4)}


def test_workers_are_light_and_reused(functions):
    with RewardPool(f"{functions}:modules", num_workers=2) as pool:
        results = score(pool, *"abcdefgh")
    assert {(r.extra["torch"], r.extra["numpy"]) for r in results} == {(False, False)}
    assert len({r.score for r in results}) <= 2
    assert os.getpid() not in {r.score for r in results}


def test_failures_are_logged_once_a_message(functions, caplog):
    with (
        caplog.at_level(logging.WARNING),
        RewardPool(f"{functions}:returns", num_workers=2) as pool,
    ):
        score(pool, "1/0", "1/0", "None", "1")
        score(pool, "1/0", "1")
        levels = [(r.levelname, r.getMessage()) for r in caplog.records]
        assert [level for level, _ in levels] == ["WARNING", "WARNING"]
        assert "division by zero" in levels[0][1]
        assert "NoneType" in levels[1][1]
        score(pool, "1/0", "1/0")
    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING", "ERROR"]
    assert "every one of 2 rewards failed {'exception': 2}" in caplog.records[2].getMessage()


def test_the_number_of_logged_messages_is_bounded(functions, caplog):
    with RewardPool(f"{functions}:returns", num_workers=2) as pool:
        score(pool, "1", *[f"undefined_{i}" for i in range(150)])
        assert pool.counts["exception"] == 150
    assert len(caplog.records) == 101


def test_memory_limit(functions):
    code = "x = bytearray(1 << 29)"
    with RewardPool(f"{functions}:runs", num_workers=1, memory_limit_bytes=1 << 28) as pool:
        assert [r.failure for r in score(pool, code, "pass")] == ["crash", None]
    with RewardPool(f"{functions}:runs", num_workers=1, memory_limit_bytes=0) as pool:
        assert score(pool, code)[0].failure is None


def test_misuse_is_an_error():
    pool = RewardPool("exact", num_workers=1)
    with pytest.raises(ValueError, match="request 1 .*cannot be sent"):
        pool.score([RewardRequest("", ""), RewardRequest("", "", lambda: 0)])
    pool.close()
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.score([])


def test_late_mathematics_is_cut_off():
    request = RewardRequest("", "the final answer is 9**9**9**9", "34")
    with RewardPool("math_verify", num_workers=1, timeout_s=1.0) as pool:
        results = pool.score([request, RewardRequest("", "the final answer is 34", "34")])
    assert (results[0].score, results[0].failure) == (0.0, "timeout")
    assert results[1] == RewardResult(1.0)


def test_model_text_given_to_countdown_never_runs(tmp_path):
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    entry = {"answer": "", "metadata": {"numbers": [4, 6, 1, 1], "target": 24}}
    answers = [code, f"<answer>{code}</answer>", f"24 or {code}", f"{code} = 24", "4*6*1*1"]
    requests = [
        RewardRequest("", answer, "", {"dataset": dataset, "entry": entry})
        for dataset in ("countdown", "puzzle24")
        for answer in answers
    ]
    with RewardPool("gym", num_workers=1) as pool:
        results = pool.score(requests)
    assert [r.score for r in results] == [0.0, 0.0, 0.0, 0.0, 1.0] * 2
    assert [r.failure for r in results] == [None] * 10
    assert not marker.exists()
