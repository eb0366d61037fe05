import math
import threading

import pytest

from flowrl.rewards import RewardPool, RewardRequest, RewardResult

FUNCTIONS = """
import os
from pathlib import Path

def first(data_source, solution_str, ground_truth, extra_info=None):
    os._exit(1)

async def second(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0

def narrow(solution):
    return 0.0

def _private(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0
"""


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("exacct", "did you mean 'exact'"),
        ("nothing", "choose one of"),
        ("{dir}/absent.py:f", "there is no file"),
        ("{dir}/mine.py:absent", r"no function 'absent'.*\['first', 'narrow', 'second'\]"),
        ("{dir}/mine.py:", "not of the form"),
        ("{dir}/mine.py", "unknown reward"),
        ("{dir}/mine.py:narrow", "signature.*solution"),
        ("{dir}/mine.py:second", "async"),
        ("{dir}/mine.py:os", "no function 'os'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("{dir}/broken.py:f", "SyntaxError"),
        ("{dir}/needs.py:f", "No module named 'no_such_package'"),
        ("{dir}/raises.py:f", "Odd: three"),
        ("{dir}/exits.py:f", "SystemExit"),
        ("{dir}/dies.py:f", "exited with status 7"),
    ],
)
def test_start_up_errors(tmp_path, function, message):
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "needs.py").write_text("import no_such_package\n")
    (tmp_path / "raises.py").write_text("class Odd(Exception): pass\nraise Odd('three')\n")
    (tmp_path / "exits.py").write_text("raise SystemExit(2)\n")
    (tmp_path / "dies.py").write_text("import os\nos._exit(7)\n")
    with pytest.raises(ValueError, match=f"(?s){message}"):
        RewardPool(function.format(dir=tmp_path), num_workers=1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reward")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": 0}, "num_workers is 0"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"timeout_s": math.nan}, "timeout_s is nan"),
        ({"memory_limit_bytes": -1}, "memory_limit_bytes is -1"),
    ],
    ids=["workers", "zero-time", "nan-time", "memory"],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardPool("exact", **arguments)


def test_a_worker_that_cannot_restart_is_an_error_not_a_zero(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    with RewardPool(f"{path}:first", num_workers=1) as pool:
        assert pool.score([RewardRequest("", "")])[0].failure == "crash"
        path.write_text("import no_such_package\n")
        with pytest.raises(RuntimeError, match="no_such_package"):
            pool.score([RewardRequest("", "")])


def test_a_sibling_file_can_be_imported_and_shadows_nothing(tmp_path):
    (tmp_path / "helper_of_mine.py").write_text("VALUE = 0.5\n")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')\n")
    (tmp_path / "mine.py").write_text(
        "import json\nfrom helper_of_mine import VALUE\n"
        "def f(data_source, solution_str, ground_truth, extra_info):\n    return VALUE\n"
    )
    with RewardPool(f"{tmp_path}/mine.py:f", num_workers=1) as pool:
        assert pool.score([RewardRequest("", "")]) == [RewardResult(0.5)]
