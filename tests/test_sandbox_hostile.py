"""Programs that attack their host, at both levels: no result, no harm, in time."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flowrl.rewards import RewardPool, RewardRequest, auto
from flowrl.rewards.sandbox.client import Limits, Sandbox, isolation_level, open_sandbox
from flowrl.rewards.sandbox.confine import LEVELS

LIMITS = Limits(time_limit_s=10.0, memory_limit_mb=256, output_limit_mb=1)
SHORT = replace(LIMITS, time_limit_s=0.5)  # for programs that do not end by themselves
SECRET = "a secret of the parent 8c1f"


@pytest.fixture(scope="module", params=LEVELS)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(request.param) as opened:
        yield opened


def descendants(pid: int) -> set[int]:
    """Processes that a process started, and those that they started."""
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    direct = set(map(int, children.stdout.split()))
    return direct.union(*map(descendants, direct))


# Each tries without end or without mercy; what must become of it stands beside it.
ENDED = {
    "infinite-loop": ("while True: pass", "time_limit"),
    "sleep": ("import time; time.sleep(60)", "time_limit"),
    "loop-in-c": ("print(9**9**9)", "time_limit"),
    "ignores-signals": (
        "import signal\n"
        "for number in range(1, 65):\n"
        "    try: signal.signal(number, lambda *_: None)\n"
        "    except (OSError, ValueError): pass\n"
        "while True: pass",
        "time_limit",
    ),
    "catches-everything": (
        "import time\nwhile True:\n    try: time.sleep(1)\n    except BaseException: pass",
        "time_limit",
    ),
    "raises-its-limit": (
        "import resource\n"
        "for kind in range(16):\n"
        "    try: resource.setrlimit(kind, (-1, -1))\n"
        "    except (OSError, ValueError): pass\n"
        "bytearray(1 << 30)",
        "memory_limit",
    ),
    "exit-handler-without-end": (
        "import atexit\nprint(3)\natexit.register(lambda: [None for _ in iter(int, 1)])",
        "time_limit",
    ),
    "thread-without-end": (
        "import threading, time\nprint(3)\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "time_limit",
    ),
    "fork-bomb": ("import os\nwhile True: os.fork()", "runtime_error"),
    "fork-bomb-that-persists": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "time_limit",
    ),
    "spawn": ("import subprocess; subprocess.run(['/bin/sh', '-c', 'echo 3'])", "runtime_error"),
    "execute": ("import os; os.execv('/bin/echo', ['echo', '3'])", "runtime_error"),
    "daemon": (
        "import os\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    if os.fork() == 0:\n"
        "        while True: pass\n"
        "print(3)",
        "runtime_error",
    ),
    "new-session": ("import os; os.setsid()", "runtime_error"),
    "thread-bomb": (
        "import threading, time\n"
        "threading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        "runtime_error",
    ),
    "memory-bomb": ("x = [b'0' * (1 << 20) for _ in range(1 << 20)]", "memory_limit"),
    "memory-in-one": ("x = bytearray(1 << 40)", "memory_limit"),
    "shared-memory": (
        "import mmap\nmaps = [mmap.mmap(-1, 16 << 20) for _ in range(1000)]",
        "runtime_error",
    ),
    "memory-file": ("import os; os.memfd_create('x')", "runtime_error"),
    "output-without-end": ("while True: print('x' * 1000)", "output_limit"),
    "one-line-without-end": (
        "import sys\nwhile True: sys.stdout.write('x' * 4096)",
        "output_limit",
    ),
    "errors-without-end": ("import sys\nwhile True: sys.stderr.write('x' * 4096)", "output_limit"),
    "output-through-its-input": (
        "import os\nwhile True: os.write(0, b'x' * 4096)",
        "runtime_error",
    ),
    "recursion": ("def f(): f()\nf()", "runtime_error"),
    "recursion-in-c": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(_): return list(map(f, [0]))\nf(0)",
        "runtime_error",
    ),
    "crash": ("import ctypes; ctypes.string_at(0)", "runtime_error"),
    "abort": ("import os; os.abort()", "runtime_error"),
    "syntax": ("def f(:", "runtime_error"),
    "null": ("print(3)\0", "runtime_error"),
    "surrogate": ("print('\ud800')\n\udcff", "runtime_error"),
    "deep-source": ("(" * 100_000 + ")" * 100_000, "runtime_error"),
    "socket": ("import socket; socket.socket()", "forbidden"),
    "socket-pair": ("import socket; socket.socketpair()", "forbidden"),
    "socket-by-number": ("import ctypes; ctypes.CDLL(None).syscall(41, 2, 1, 0)", "forbidden"),
    "trace-parent": ("import ctypes; ctypes.CDLL(None).ptrace(16, 1, 0, 0)", "forbidden"),
    "read-parent-memory": (
        "import ctypes; ctypes.CDLL(None).process_vm_readv(1, None, 0, None, 0, 0)",
        "forbidden",
    ),
    "mount": ("import ctypes; ctypes.CDLL(None).mount(None, b'/', None, 32, None)", "forbidden"),
    "new-namespace": ("import ctypes; ctypes.CDLL(None).unshare(0x10000000)", "forbidden"),
    "io-ring": ("import ctypes; ctypes.CDLL(None).syscall(425, 1, None)", "forbidden"),
    "32-bit-calls": (
        "import ctypes; ctypes.CDLL(None).syscall(0x40000000 | 41, 2, 1, 0)",
        "forbidden",
    ),
}


@pytest.mark.parametrize(("code", "reason"), ENDED.values(), ids=ENDED.keys())
def test_ends_in_time_and_with_its_reason(sandbox: Sandbox, code: str, reason: str) -> None:
    start = time.monotonic()
    finished = sandbox.run(code, "", SHORT if reason == "time_limit" else LIMITS)
    assert time.monotonic() - start < 15.0
    assert (finished.reason, finished.output) == (reason, "")
    assert len(descendants(sandbox._process.pid)) <= 1  # the zygote
    assert sandbox.run("print(3)", "", LIMITS).output == "3\n"


# Each prints what it got; all that is there must be refused.
READS = {
    "secret": "open({secret!r}).read()",
    "repository": "open({repository!r}).read()",
    "passwords": "open('/etc/shadow').read() + open('/etc/passwd').read()",
    "home": "os.listdir(os.path.expanduser('~root')) + os.listdir('/root/.ssh')",
    "parent-environment": "open(f'/proc/{{os.getppid()}}/environ').read()",
    "environment-of-all": "[open(f'/proc/{{pid}}/environ').read() for pid in range(1, 99)]",
    "own-links": "os.listdir('/proc/self/fd')",
    "root": "os.listdir('/proc/1/root/')",
    "dots": "open('../../../../../../../../etc/passwd').read()",
    "link": "os.symlink({secret!r}, 'link') or open('link').read()",
    "rename": "os.rename({secret!r}, 'mine') or open('mine').read()",
    "hard-link": "os.link({secret!r}, 'mine') or open('mine').read()",
    "descriptors": "[os.read(number, 9) for number in range(3, 64)]",
    "devices": "open('/dev/sda', 'rb').read(9) + open('/dev/mem', 'rb').read(9)",
    "terminal": "open('/dev/tty').read()",
    "packages": "[__import__('torch')]",
    "flowrl": "[__import__('flowrl')]",
}


@pytest.mark.parametrize("expression", READS.values(), ids=READS.keys())
def test_reads_nothing_of_the_host(sandbox: Sandbox, expression: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o666)
    expression = expression.format(secret=str(secret), repository=__file__)
    finished = sandbox.run(f"import os\nprint({expression})", "", LIMITS)
    assert (finished.reason, finished.output) == ("runtime_error", ""), finished.error
    assert secret.read_text() == SECRET


WRITES = {
    "overwrite": "open({secret!r}, 'w')",
    "append": "open({secret!r}, 'a')",
    "truncate": "os.truncate({secret!r}, 0)",
    "truncate-by-number": "1 / (1 + ctypes.CDLL(None).syscall(76, {secret!r}.encode(), 0))",
    "remove": "os.remove({secret!r})",
    "mode": "os.chmod({secret!r}, 0)",
    "mode-by-number": "1 / (1 + ctypes.CDLL(None).syscall(90, {secret!r}.encode(), 0))",
    "owner": "os.chown({secret!r}, 1, 1)",
    "times": "os.utime({secret!r}, (0, 0))",
    "attribute": "os.setxattr({secret!r}, 'user.x', b'x')",
    "new-file": "open({folder!r} + '/new', 'w')",
    "new-folder": "os.mkdir({folder!r} + '/new')",
    "new-link": "os.symlink('/', {folder!r} + '/new')",
    "library": "open(os.__file__, 'a')",
    "beside-library": "open(os.path.dirname(os.__file__) + '/new.py', 'w')",
    "shared": "open('/dev/shm/new', 'w')",
    "variables": "open('/var/tmp/new', 'w')",
}


def state_of(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns


@pytest.mark.parametrize("expression", WRITES.values(), ids=WRITES.keys())
def test_writes_nothing_of_the_host(sandbox: Sandbox, expression: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    before = state_of(secret)
    expression = expression.format(secret=str(secret), folder=str(tmp_path))
    finished = sandbox.run(f"import ctypes, os\n{expression}", "", LIMITS)
    assert finished.reason == "runtime_error"
    assert (secret.read_text(), state_of(secret)) == (SECRET, before)
    assert os.listdir(tmp_path) == ["secret"]


def test_a_scratch_folder_is_private_small_and_gone_afterwards() -> None:
    with Sandbox("namespaces") as sandbox:
        code = "import os\nprint(os.getcwd(), os.listdir())\nopen('x', 'w').write('x')"
        for _ in range(2):
            finished = sandbox.run(code, "", LIMITS)
            assert (finished.reason, finished.output) == (None, "/scratch []\n")
        large = Limits(time_limit_s=5.0, memory_limit_mb=256, output_limit_mb=256)
        for code in (
            "with open('x', 'wb') as file:\n    while True: file.write(b'x' * (1 << 20))",
            "for i in range(10**6): open(f'{i}', 'wb').close()",
        ):
            finished = sandbox.run(code, "", large)
            assert finished.reason == "runtime_error"
            assert "No space left on device" in finished.error


def test_a_file_is_limited(sandbox: Sandbox) -> None:
    code = "open('x', 'wb').write(b'x' * (2 << 20))"
    assert sandbox.run(code, "", LIMITS).reason == "runtime_error"


KILLS = {
    "parent": "os.kill(os.getppid(), 9)",
    "zygote": "os.kill(1, 9)",
    "group": "os.killpg(0, 9)",
    "own-group": "os.kill(0, 9)",
    "all": "os.kill(-1, 9)",
    "client": "os.kill({client}, 9)",
    "client-by-number": "1 / (1 + ctypes.CDLL(None).syscall(62, {client}, 9))",
    "thread-of-client": "1 / (1 + ctypes.CDLL(None).syscall(234, {client}, {client}, 9))",
    "queue-to-client": "1 / (1 + ctypes.CDLL(None).syscall(129, {client}, 9, b' ' * 128))",
    "owner-of-a-pipe": (
        "[fcntl.fcntl(os.pipe()[0], command, value)"
        " for command, value in ((10, 9), (8, {client}), (4, 0o20000))]"
    ),
    "limit-of-client": "resource.prlimit({client}, resource.RLIMIT_CPU, (1, 1))",
}


@pytest.mark.parametrize("expression", KILLS.values(), ids=KILLS.keys())
def test_signals_nobody(sandbox: Sandbox, expression: str) -> None:
    zygote = descendants(sandbox._process.pid)
    attempt = expression.format(client=os.getpid())
    finished = sandbox.run(f"import ctypes, fcntl, os, resource\n{attempt}", "", LIMITS)
    # In a process namespace the program itself is 1, which is spared its own signals.
    if not (sandbox.level == "namespaces" and expression == KILLS["zygote"]):
        assert finished.reason == "runtime_error", finished
    assert descendants(sandbox._process.pid) == zygote
    assert sandbox.run("print(3)", "", LIMITS).output == "3\n"


def test_a_program_may_end_itself(sandbox: Sandbox) -> None:
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nos._exit(7)"
    assert sandbox.run(code, "", LIMITS).reason in ("runtime_error", "memory_limit")


def test_no_environment_and_no_root(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWRL_TEST_SECRET", SECRET)
    code = "import os\nprint(sorted(os.environ), 0 in os.getresuid(), 0 in os.getresgid())"
    names = ["LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONHASHSEED"]
    with Sandbox(sandbox.level) as later:
        assert later.run(code, "", LIMITS).output == f"{names} False False\n"


def test_no_process_outlives_the_client(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from flowrl.rewards.sandbox.client import Sandbox, Limits\n"
        f"sandbox = Sandbox({LEVELS[-1]!r})\n"
        "print(sandbox._process.pid, flush=True)\n"
        "sandbox.run('while True: pass', '', Limits(time_limit_s=60.0))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    launcher = int(process.stdout.readline())
    deadline = time.monotonic() + 10
    while len(descendants(launcher)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    started = {launcher, *descendants(launcher)}
    assert len(started) == 3  # launcher, zygote, program
    process.kill()
    process.wait()
    process.stdout.close()
    while any(map(is_alive, started)):
        assert time.monotonic() < deadline + 10
        time.sleep(0.05)


def test_a_late_request_takes_its_sandbox_along() -> None:
    """The pool's own limit, of a row that asks for more time than the pool gives."""
    info = {"code": {"time_limit_s": 60.0, "total_time_limit_s": 60.0}}
    sleep, echo = (f"```python\n{code}\n```" for code in ("while True: pass", "print(input())"))
    truth = {"inputs": ["3"], "outputs": ["3"]}
    with RewardPool("code", num_workers=1, timeout_s=1.5) as pool:
        worker = pool._idle.get()
        assert worker._process is not None
        started = descendants(worker._process.pid)
        pool._idle.put(worker)
        assert len(started) == 2  # launcher and zygote: the sandbox is warm
        requests = [RewardRequest("", sleep, truth, info), RewardRequest("", echo, truth)]
        results = pool.score(requests)
        deadline = time.monotonic() + 10
        while any(map(is_alive, started)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert [result.failure for result in results] == ["timeout", None]
    assert results[1].score == 1.0


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_no_listener_of_the_host_is_reached(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        code = f"import socket\nsocket.socket().connect(('127.0.0.1', {port}))"
        assert sandbox.run(code, "", LIMITS).reason == "forbidden"
        with pytest.raises(TimeoutError):
            server.accept()


def test_the_level_is_told_and_a_weaker_one_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isolation_level().level in LEVELS
    with open_sandbox() as opened:
        assert opened.level == isolation_level().level
    with pytest.raises(ValueError, match="unknown; choose one of"):
        open_sandbox("none")


def test_a_kernel_without_the_means_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowrl.rewards.sandbox.client.START", "raise OSError('no such calls')")
    with pytest.raises(ValueError, match="namespaces: OSError: no such calls; landlock: OSError"):
        open_sandbox()
    assert isolation_level().level is None
    # Rows of mixed origin need it only if there is a program among them.
    monkeypatch.setattr("flowrl.rewards.code._sandboxes", {})
    auto.warm_up()
    auto.check_rows([("math", None), ("x", {"reward": "numeric", "code": None})])
    with pytest.raises(ValueError, match="cannot be isolated at level 'landlock'"):
        auto.check_rows([("math", None), ("taco", {"code": {"max_tests": 3}})])
    with pytest.raises(ValueError, match=r"extra_info\['code'\] is 5"):
        auto.check_rows([("taco", {"code": 5})])
    with pytest.raises(ValueError, match="no reward is known for data_source 'x'"):
        auto.check_rows([("x", None)])


def test_the_sandbox_is_there_before_the_first_program(monkeypatch: pytest.MonkeyPatch) -> None:
    sandboxes: dict[str, Sandbox] = {}
    monkeypatch.setattr("flowrl.rewards.code._sandboxes", sandboxes)
    auto.warm_up()
    sandboxes.pop("landlock").close()
    auto.check_rows([("x", {"reward": "code", "code": {"isolation": "landlock"}})])


def test_without_namespaces_it_is_landlock_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = "flowrl.rewards.sandbox.client"
    refuse = "def refuse(flags): raise PermissionError(1, 'unshare')\nzygote.linux.unshare = refuse"
    monkeypatch.setattr(
        f"{client}.START",
        "import sys; sys.path.append(sys.argv.pop(1)); from sandbox import zygote; sys.path.pop()\n"
        f"{refuse}\nzygote.main()",
    )
    before = descendants(os.getpid())
    with open_sandbox() as opened:
        assert opened.level == "landlock"
    assert "programs run at isolation level landlock only (namespaces: Perm" in caplog.text
    with pytest.raises(ValueError, match="at level 'namespaces' or better"):
        open_sandbox("namespaces")
    deadline = time.monotonic() + 5
    while any(map(is_alive, descendants(os.getpid()) - before)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("confine", "message"),
    [
        ("lambda *_: None", "got out of the sandbox"),
        ("lambda *_: open('/no/such/file')", "could not be confined: (.|\n)*/no/such/file"),
    ],
    ids=["without effect", "with an error"],
)
def test_a_sandbox_that_does_not_confine_is_refused(
    monkeypatch: pytest.MonkeyPatch, confine: str, message: str
) -> None:
    start = (
        "import sys; sys.path.append(sys.argv.pop(1)); from sandbox import zygote; sys.path.pop(); "
        f"zygote.confine = {confine}; zygote.main()"
    )
    monkeypatch.setattr("flowrl.rewards.sandbox.client.START", start)
    with pytest.raises(ValueError, match=message):
        open_sandbox("landlock")
