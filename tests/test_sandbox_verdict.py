"""Programs that want another verdict, at both levels: none is faked, no test is in their reach."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from flowrl.rewards.sandbox import plain
from flowrl.rewards.sandbox.client import Limits, Sandbox
from flowrl.rewards.sandbox.confine import LEVELS

LIMITS = Limits(time_limit_s=10.0, memory_limit_mb=256, output_limit_mb=1)


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(request.param) as opened:
        yield opened


# Counts, in all memory around its own objects, texts of which it knows the halves only. The kernel
# says of each page whether it can be read.
SEARCH = """
import ctypes, os
libc = ctypes.CDLL(None)
def search(pairs):
    counts, buffer = [0 for _ in pairs], ctypes.create_string_buffer(1 << 20)
    for center in (id(control[9]), id(len), id(os), ctypes.addressof(buffer)):
        for page in range((center >> 12) - 8192, (center >> 12) + 8192):
            address = page << 12
            if libc.pwrite(0, ctypes.c_void_p(address), ctypes.c_size_t(4096), 0) == 4096:
                text = ctypes.string_at(address, 4096)
                for index, (first, second) in enumerate(pairs):
                    where = text.find(first)
                    while where >= 0:
                        counts[index] += text.startswith(second, where + len(first))
                        where = text.find(first, where + 1)
    return counts[0] > 0, counts[1:]
control = [b"con" + b"trol-" + str(7 * 11 * 13).encode() for _ in range(99)]
"""


def test_no_memory_of_another_run(sandbox: Sandbox) -> None:
    first, second = os.urandom(6).hex(), os.urandom(6).hex()
    for _ in range(3):
        sandbox.run(f"print('{first}{second}')", f"{first}{second}", LIMITS)
        sandbox.call("def f(x): return x", "f", [first + second], LIMITS)
    code = f"{SEARCH}print(search([(b'control', b'-1001'), (b'{first}', b'{second}')]))"
    assert sandbox.run(code, "", LIMITS).output == "(True, [0])\n"


def test_no_memory_of_the_checks(sandbox: Sandbox) -> None:
    first, second = os.urandom(6).hex(), os.urandom(6).hex()
    pairs = f"[(b'control', b'-1001'), (b'{first}', b'{second}')]"
    code = f"{SEARCH}def f(): return search({pairs})"
    for _ in range(2):
        setup = f"expected = '{first}{second}'"
        checked = sandbox.check(code, setup, ["assert f() == (True, [0])"], [], LIMITS)
        assert checked.result == "[true]"


@pytest.mark.parametrize("function", ["np.allclose", "np.testing.assert_allclose"])
def test_an_empty_list_is_not_close_to_a_number(sandbox: Sandbox, function: str) -> None:
    right, wrong = f"assert {function}(f(3), 1.0) is not False", f"assert {function}([], 1.0)"
    limits = replace(LIMITS, time_limit_s=60.0)
    setup = "import numpy as np"
    checked = sandbox.check("def f(x): return x / 3", setup, [right, wrong], [], limits)
    assert checked.result == "[true, false]"


FAKES = {
    "exits": "import os; os._exit(0)",
    "exits-politely": "import sys; sys.exit(0)",
    "prints-words": "print('passed'); print('True'); print('[true]'); print('OK')",
    "equal-to-all": (
        "class E(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n"
        "    __hash__ = None\n"
        "def f(*_): return E(7)"
    ),
    "equal-text": (
        "class E(str):\n    __eq__ = lambda *_: True\n    __hash__ = str.__hash__\n"
        "def f(*_): return E('x')"
    ),
    "raises": "def f(*_): raise AssertionError",
    "exits-inside": "import os\ndef f(*_): os._exit(0)",
    "system-exit-inside": "def f(*_): raise SystemExit(0)",
    "keyboard": "def f(*_): raise KeyboardInterrupt",
    "patched-json": (
        "import json\njson.dumps = lambda *_, **__: 'true'\n"
        "json.loads = lambda *_, **__: ['value', '5']\n"
        "def f(*_): return 0"
    ),
    "patched-builtins": (
        "import builtins\nbuiltins.isinstance = lambda *_: True\nbuiltins.len = lambda *_: 5\n"
        "builtins.all = builtins.any = lambda *_: True\ndef f(*_): return 0"
    ),
    "patched-harness": (
        "import sys\nfor name, module in list(sys.modules.items()):\n"
        "    if name.startswith('sandbox'):\n"
        "        for key in list(vars(module)):\n"
        "            if callable(vars(module)[key]) and key[0] != '_':\n"
        "                vars(module)[key] = lambda *_, **__: True\n"
        "def f(*_): return 0"
    ),
    "writes-results": (
        "import os\n"
        "for number in range(3, 64):\n"
        "    for text in (b'[true]', b'true', b'5', b'{\"passed\": true}'):\n"
        "        try: os.write(number, text)\n"
        "        except OSError: pass\n"
        "os._exit(0)"
    ),
    "answers-before-it-is-asked": (
        "import os, json\n"
        "body = json.dumps(['value', 'true']).encode()\n"
        "for number in range(3, 64):\n"
        "    try: os.write(number, len(body).to_bytes(8, 'big') + body)\n"
        "    except OSError: pass\n"
        "os._exit(0)"
    ),
    "exit-handler": (
        "import atexit, os\n"
        "@atexit.register\n"
        "def fake():\n"
        "    for number in range(1, 64):\n"
        "        try: os.write(number, b'[true]')\n"
        "        except OSError: pass\n"
        "    os._exit(0)\n"
        "def f(*_): return 0"
    ),
    "searches-its-frames": (
        "import gc, sys\n"
        "def f(*_):\n"
        "    frame, found = sys._getframe(), []\n"
        "    while frame:\n"
        "        found += [value for value in frame.f_locals.values() if type(value) is int]\n"
        "        frame = frame.f_back\n"
        "    found += [x for x in gc.get_objects() if type(x) is int]\n"
        "    return 98765 if 98765 in found else 0"
    ),
    "closes-everything": "import os\nos.closerange(0, 64)\ndef f(*_): return 0",
    "nan": "def f(*_): return float('nan')",
    "none": "def f(*_): return None",
    "endless": "import itertools\ndef f(*_): return itertools.repeat(98765)",
    "huge-answer": "def f(*_): return 'x' * (4 << 20)",
    "deep-answer": "def f(*_):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
}


@pytest.mark.parametrize("code", FAKES.values(), ids=FAKES.keys())
def test_no_verdict_can_be_faked(sandbox: Sandbox, code: str) -> None:
    limits = replace(LIMITS, time_limit_s=1.5)
    printed = sandbox.run(code, "", limits)
    assert "98765" not in printed.output

    called = sandbox.call(code, "f", [41], limits)
    if called.reason is None:
        assert plain_value(called.result) != 98765

    checks = ["assert f(41) == 98765", "assert f(f(41)) == 98766"]
    checked = sandbox.check(code, "", checks, [], limits)
    assert True not in json.loads(checked.result)  # shorter than the checks after a time-out


def plain_value(text: str) -> object:
    try:
        return plain.decode(text)
    except ValueError:
        return None
