"""The sandbox as its user sees it: start it at a level, run programs, learn how they ended."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from flowrl.rewards.sandbox import plain
from flowrl.rewards.sandbox.confine import LEVELS

logger = logging.getLogger(__name__)

# The folder that this package is in is on the path, last, only while the zygote imports it.
START = (
    "import sys; sys.path.append(sys.argv.pop(1)); from sandbox import zygote; sys.path.pop(); "
    "zygote.main()"
)
START_TIMEOUT_S = 60.0
# Beyond a run's own limit, for the fork, the confinement and a busy machine.
REPLY_GRACE_S = 10.0
NONCE_BYTES = 16
ERROR_CHARACTERS = 2000
MAX_REPLY_BYTES = 1 << 16
# The whole environment of every program. More than one thread in the zygote could not be forked.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}

PROBE = """
import os
def is_refused(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        return True
    return False
files = [{host_file!r}, "/etc/passwd", "/proc/self/environ"]
print(all([is_refused(open, name) for name in files]) and is_refused(os.fork))
"""


class SandboxError(RuntimeError):
    """The sandbox cannot be started, or ended; says nothing of a program."""


@dataclass(frozen=True)
class Limits:
    """What one run may take."""

    time_limit_s: float = 6.0  # by the clock; of processor time, a second more
    memory_limit_mb: int = 1024
    output_limit_mb: int = 16  # each of standard output, standard error, and any file

    @property
    def output_bytes(self) -> int:
        return self.output_limit_mb << 20


@dataclass(frozen=True)
class Finished:
    """How a run ended.

    reason: None if the program ended by itself and without an error, else "time_limit",
    "memory_limit", "output_limit", "forbidden" (a system call that only an attempt to get out
    makes) or "runtime_error"; of checks also "test_error": they ended without a verdict.
    """

    reason: str | None
    output: str
    error: str  # the end of standard error
    result: str  # what `call` and `check` give back; "" if there is none


class Isolation(NamedTuple):
    """The strongest level that works here, or None; why the stronger ones do not."""

    level: str | None
    problem: str


class Sandbox:
    """A zygote at one level, which runs one program at a time. A context manager.

    It ends with the thread that made it. Raises SandboxError if the level does not work here; that
    is tried, with programs that attempt what must be refused.
    """

    def __init__(self, level: str) -> None:
        assert level in LEVELS, level
        if sys.platform != "linux":
            raise SandboxError(f"the sandbox needs Linux, and this is {sys.platform}")
        self.level = level
        with contextlib.ExitStack() as stack:
            self._socket, self._process = _start(level, stack)
            self._probe()
            self._stack = stack.pop_all()

    def run(self, code: str, stdin: str, limits: Limits) -> Finished:
        """The program as a main module, with the text as its standard input."""
        with contextlib.ExitStack() as stack:
            streams = _streams(stack, stdin)
            task = _file(stack, json.dumps({"code": code}))
            self._send([("run", [*streams, task])], limits)
            return _finish(self._receive(limits)[0], streams, limits)

    def call(self, code: str, function: str, arguments: list[Any], limits: Limits) -> Finished:
        """One call of a function, or of a method of class Solution; result: `plain.encode`d."""
        # Else a program could write what is taken for a value before the function is called.
        nonce = os.urandom(NONCE_BYTES).hex()
        task = {"code": code, "function": function, "nonce": nonce}
        task["arguments"] = plain.encode(arguments)
        with contextlib.ExitStack() as stack:
            streams = _streams(stack)
            descriptors = [*streams, _file(stack, json.dumps(task)), _file(stack)]
            self._send([("call", descriptors)], limits)
            finished = _finish(self._receive(limits)[0], streams, limits)
            written = _read(descriptors[-1], limits.output_bytes)
        if finished.reason is None and not written.startswith(nonce):
            return replace(finished, reason="runtime_error", error="it ended before it returned")
        return replace(finished, result=written.removeprefix(nonce))

    def check(
        self,
        code: str,
        setup: str,
        checks: list[str],
        functions: list[str],
        limits: Limits,
        prompt: str = "",
    ) -> Finished:
        """Checks of a program's functions, run in another process than the program.

        Args:
            setup: Python text before the checks: imports, helpers.
            checks: assertions or other code that raises if the program is wrong.
            functions: names that are the program's even if the prompt or Python define them.
            prompt: Python text that the program completes or follows. The program finds what it
                defines; the checks find it too, as it is there and not as the program changed it.

        Returns, as result, a JSON list of which checks passed, shorter than `checks` if they did
        not all end. The limits are those of all checks together. Functions take and return plain
        values (see `plain.encode`) only.
        """
        tests = {"prompt": prompt, "setup": setup, "checks": checks, "functions": functions}
        with contextlib.ExitStack() as stack:
            pipes = stack.enter_context(contextlib.ExitStack())
            (request_out, request_in), (answer_out, answer_in) = _pipe(pipes), _pipe(pipes)
            streams, judge_streams = _streams(stack), _streams(stack)
            result = _file(stack)
            task = _file(stack, json.dumps({"code": code, "prompt": prompt}))
            program = [*streams, task, request_out, answer_in]
            judge = [*judge_streams, _file(stack, json.dumps(tests)), answer_out, request_in]
            processes = [("serve", program), ("judge", [*judge, result])]
            self._send(processes, limits)
            pipes.close()  # else neither process would see that the other has ended
            end, judge_end = self._receive(limits)
            finished = _finish(end, streams, limits)
            judged = _finish(judge_end, judge_streams, limits)
            passed = [mark == "1" for mark in _read(result, len(checks))]
            finished = replace(finished, result=json.dumps(passed))
            if judge_end["exit"] is None:
                return replace(finished, reason="time_limit")
            if judge_end["exit"] != 0 or len(passed) < len(checks):
                return replace(finished, reason="test_error", error=judged.error)
            # A program that waits for the next call is killed when there is none.
            reason = None if end["exit"] is None else finished.reason
        return replace(finished, reason=reason)

    def close(self) -> None:
        """Ends the zygote and with it every program."""
        self._stack.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, processes: list[tuple[str, list[int]]], limits: Limits) -> None:
        """Starts the processes, which run until the last one ends."""
        request = {
            "processes": [[mode, len(descriptors)] for mode, descriptors in processes],
            "wall_s": limits.time_limit_s,
            "limits": {
                "cpu_s": math.ceil(limits.time_limit_s) + 1,
                "memory_bytes": limits.memory_limit_mb << 20,
                "file_bytes": limits.output_bytes,
            },
        }
        descriptors = [descriptor for _, given in processes for descriptor in given]
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise SandboxError(f"the sandbox ended: {error}") from error

    def _receive(self, limits: Limits) -> list[dict[str, Any]]:
        """How each of the processes ended."""
        self._socket.settimeout(limits.time_limit_s + REPLY_GRACE_S)
        try:
            reply = self._socket.recv(MAX_REPLY_BYTES)
        except OSError as error:  # a time-out is one
            raise SandboxError(f"the sandbox does not answer: {error}") from error
        if not reply:
            raise SandboxError("the sandbox ended; the log of the kernel may say why")
        return json.loads(reply)

    def _probe(self) -> None:
        """Programs that try what must be refused: a kernel may accept a filter and ignore it."""
        limits = Limits(time_limit_s=10.0)
        probe = self.run(PROBE.format(host_file=__file__), "", limits)
        if probe.output != "True\n":
            raise SandboxError(
                f"a program got out of the sandbox, or could not run: {probe.output}{probe.error}"
            )
        if self.run("import socket\nsocket.socket()", "", limits).reason != "forbidden":
            raise SandboxError("a program in the sandbox may open sockets")


def open_sandbox(required: str = "landlock") -> Sandbox:
    """A sandbox at the strongest level that works here.

    Raises ValueError, with what is missing, if that is weaker than required.
    """
    if required not in LEVELS:
        raise ValueError(f"isolation {required!r} is unknown; choose one of {LEVELS}")
    problems = []
    for level in reversed(LEVELS[LEVELS.index(required) :]):
        try:
            sandbox = Sandbox(level)
        except SandboxError as error:
            problems.append(f"{level}: {error}")
            continue
        if problems:
            logger.warning("programs run at isolation level %s only (%s)", level, problems[0])
        return sandbox
    raise ValueError(
        f"programs cannot be isolated at level {required!r} or better ({'; '.join(problems)}); "
        "allow unprivileged user namespaces, or run a kernel with Landlock (Linux 5.13)"
    )


def isolation_level() -> Isolation:
    """The strongest level that works here, by trying it."""
    problems = []
    for level in reversed(LEVELS):
        try:
            Sandbox(level).close()
        except SandboxError as error:
            problems.append(f"{level}: {error}")
        else:
            return Isolation(level, "; ".join(problems))
    return Isolation(None, "; ".join(problems))


def _start(
    level: str, stack: contextlib.ExitStack
) -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    numpy = importlib.util.find_spec("numpy")
    assert numpy is not None and numpy.submodule_search_locations is not None
    folder = Path(numpy.submodule_search_locations[0])
    libraries = folder.with_name("numpy.libs")  # of NumPy's wheels
    packages = [folder, libraries] if libraries.is_dir() else [folder]
    settings = {
        "level": level,
        "library": sysconfig.get_path("stdlib"),
        "site": str(folder.parent),
        "packages": list(map(str, packages)),
        "parent_pid": os.getpid(),
    }
    own, others = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack.callback(own.close)
    errors = _file(stack)
    package_folder = str(Path(__file__).resolve().parents[1])
    # -P -s -S: nothing but the standard library is on the path; -B: nothing is written.
    options = ["-P", "-s", "-S", "-B", "-X", "utf8"]
    command = [sys.executable, *options, "-c", START, package_folder, json.dumps(settings)]
    with others:
        process = subprocess.Popen(
            command, stdin=others.fileno(), stdout=errors, stderr=errors, env=ENVIRONMENT
        )
    stack.callback(process.wait)
    stack.callback(process.kill)
    own.settimeout(START_TIMEOUT_S)
    try:
        is_ready = own.recv(MAX_REPLY_BYTES) != b""
    except OSError as error:
        raise SandboxError(f"not started within {START_TIMEOUT_S:g} s") from error
    if not is_ready:
        process.wait()
        lines = _read(errors, MAX_REPLY_BYTES).strip().splitlines()
        raise SandboxError(lines[-1] if lines else f"it exited with {process.returncode}")
    return own, process


def _file(stack: contextlib.ExitStack, text: str = "") -> int:
    """A descriptor of a file in memory, at the start of its content."""
    descriptor = os.memfd_create("flowrl")
    stack.callback(os.close, descriptor)
    rest = memoryview(text.encode("utf-8", "surrogatepass"))
    while rest:
        rest = rest[os.write(descriptor, rest) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def _streams(stack: contextlib.ExitStack, stdin: str = "") -> list[int]:
    return [_file(stack, stdin), _file(stack), _file(stack)]


def _pipe(stack: contextlib.ExitStack) -> tuple[int, int]:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends


def _read(descriptor: int, num_bytes: int) -> str:
    return os.pread(descriptor, num_bytes, 0).decode("utf-8", "replace")


def _finish(end: dict[str, Any], streams: list[int], limits: Limits) -> Finished:
    error = _read(streams[2], limits.output_bytes)[-ERROR_CHARACTERS:]
    if not end["is_confined"] and end["exit"] is not None:
        raise SandboxError(f"a process could not be confined: {error}")
    is_full = any(os.fstat(stream).st_size >= limits.output_bytes for stream in streams[1:])
    reason = _reason(end, is_full, error.rstrip().rpartition("\n")[2], limits)
    output = _read(streams[1], limits.output_bytes) if reason is None else ""
    return Finished(reason, output, error, "")


def _reason(end: dict[str, Any], is_full: bool, last_line: str, limits: Limits) -> str | None:
    if end["exit"] is None:
        return "time_limit"
    if is_full:
        return "output_limit"
    if end["exit"] == -signal.SIGSYS:
        return "forbidden"
    if end["exit"] == -signal.SIGKILL:  # by the kernel
        return "time_limit" if end["cpu_s"] >= limits.time_limit_s else "memory_limit"
    if end["exit"] != 0:
        return "memory_limit" if last_line.startswith("MemoryError") else "runtime_error"
    return None
