"""The clean interpreter from which every program's process is forked.

It is sent, over a socket, limits and descriptors: a message a run, and never text of a program or
of a test. It closes what it was sent, waits, kills what is late, and replies how the processes
ended.
"""

import ctypes
import fcntl
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from . import harness, jail, linux, syscalls
from .confine import confine

Task = Callable[[dict[str, object]], None]

# Imported once, here, where the shared libraries of the machine can still be read, and because an
# import costs more than a run.
PRELOADED = """
    abc array ast asyncio atexit base64 binascii bz2 calendar cmath cProfile codecs
    collections.abc concurrent.futures contextlib copy csv ctypes dataclasses datetime decimal
    difflib dis encodings.idna enum fractions functools gc glob graphlib hashlib heapq hmac
    inspect io ipaddress itertools json linecache locale logging lzma math mmap multiprocessing
    numbers operator os pathlib pickle platform pprint queue random re resource secrets select
    shutil signal socket statistics string struct subprocess sys tempfile textwrap threading
    time timeit traceback types typing unicodedata unittest uuid warnings weakref zlib zoneinfo
""".split()  # noqa: SIM905  one name a line would fill two pages
NUMPY = (
    *("numpy", "numpy.random", "numpy.linalg", "numpy.fft", "numpy.polynomial", "numpy.ma"),
    "numpy.testing",  # of checks
)
MAX_DESCRIPTORS = 32
MAX_MESSAGE_BYTES = 1 << 16
FIRST_FREE = 64  # above every descriptor that a program's process is given


def main() -> None:
    """Serves the socket on descriptor 0 until it closes; in a forked child, does its task."""
    settings = json.loads(sys.argv[1])
    level, library, packages = (settings[key] for key in ("level", "library", "packages"))
    client = socket.socket(fileno=0)
    linux.die_with_parent()
    if os.getppid() != settings["parent_pid"]:
        os._exit(1)
    if not syscalls.is_supported():
        raise OSError(f"the filter of system calls is written for {syscalls.MACHINE} only")
    if level == "landlock" and linux.landlock_version() == 0:
        raise OSError("the kernel has no Landlock, or it is not enabled")
    _preload(settings["site"])
    names = harness.preamble()
    address_space = _address_space()
    gc.collect()
    gc.freeze()  # so that a program's collections need not visit, and copy, what is shared
    namespace = jail.enter(library, packages) if level == "namespaces" else None
    linux.hide_memory()
    client.send(b'{"ready": true}')
    fork = Fork(level, [library, *packages], address_space, namespace)
    task = _serve(client, fork)
    if task is not None:  # a forked child
        task(names)


@dataclass(frozen=True)
class Fork:
    """What a forked process needs to know to confine itself."""

    level: str
    read_only: list[str]
    address_space: int
    namespace: int | None  # the zygote's process namespace, if programs get their own


def _serve(client: socket.socket, fork: Fork) -> Task | None:
    """One run after the other; None when the client has gone, and the task in a forked child.

    The child unwinds to `main`, so that nothing of this loop is on a program's stack.
    """
    zygote_pid = os.getpid()
    while True:
        body, descriptors, _, _ = socket.recv_fds(client, MAX_MESSAGE_BYTES, MAX_DESCRIPTORS)
        if not body:
            return None
        request = json.loads(body)
        deadline = time.monotonic() + request["wall_s"]
        started, first = [], 0
        for mode, num_descriptors in request["processes"]:
            is_confined, confirm = os.pipe()
            if fork.namespace is not None:
                linux.unshare(linux.CLONE_NEWPID)  # of the next child
            pid = os.fork()
            if pid == 0:
                if fork.namespace is None and os.getppid() != zygote_pid:
                    os._exit(1)
                client.detach()
                _place([*descriptors[first : first + num_descriptors], confirm])
                confine(fork.level, request["limits"], fork.address_space, fork.read_only)
                os.write(num_descriptors, b"1")
                os.close(num_descriptors)
                return harness.MODES[mode]
            if fork.namespace is not None:
                linux.setns(fork.namespace, linux.CLONE_NEWPID)
            os.close(confirm)
            started.append((pid, is_confined))
            first += num_descriptors
        for descriptor in descriptors:
            os.close(descriptor)
        _wait(started[-1][0], deadline)
        # The last first: a judge whose program is killed would end by itself, as if in time.
        reply = [_reap(*process) for process in reversed(started)]
        client.send(json.dumps(reply[::-1]).encode())


def _place(descriptors: list[int]) -> None:
    """Makes the descriptors 0, 1, 2, ... and closes all others."""
    copies = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, FIRST_FREE) for descriptor in descriptors]
    for number, copy in enumerate(copies):
        os.dup2(copy, number)
    os.closerange(len(copies), os.sysconf("SC_OPEN_MAX"))


def _wait(pid: int, deadline: float) -> None:
    """Returns when the process has ended, or at the deadline."""
    descriptor = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))
    os.close(descriptor)


def _reap(pid: int, is_confined: int) -> dict[str, object]:
    """How the process ended, exit None if it did not and was killed; its processor time."""
    ended, status, usage = os.wait4(pid, os.WNOHANG)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        _, _, usage = os.wait4(pid, 0)
    code = os.waitstatus_to_exitcode(status) if ended else None
    confirmed = os.read(is_confined, 1) == b"1"
    os.close(is_confined)
    return {"exit": code, "cpu_s": usage.ru_utime + usage.ru_stime, "is_confined": confirmed}


def _preload(site: str) -> None:
    sys.path.append(site)  # it stays there: a program sees of it what the jail shows
    for name in (*PRELOADED, *NUMPY):
        importlib.import_module(name)
    # pthread_exit loads it, and would end a program that cannot.
    ctypes.CDLL("libgcc_s.so.1")
    # The kernel should rather end a program than the trainer when memory is short.
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
