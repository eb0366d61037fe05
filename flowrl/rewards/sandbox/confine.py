"""What a forked process gives up before it runs a program; for good.

level        files it can read             files it can write        other processes
namespaces   standard library, NumPy       a scratch folder, 64 MB   are not visible
landlock     the same, with what is        none                      exist, and can be neither
             installed below these                                   read, traced nor signalled

Both: no network; limits of memory, processor time, file size, descriptors and threads; a filter of
system calls, under which no process starts another; no capabilities, no new privileges, and for a
root user another user number. Landlock does not hide that a file exists or how large it is.
"""

import os
import resource
import struct

from . import jail, linux, syscalls

LEVELS = ("landlock", "namespaces")  # from the weaker to the stronger
MAX_DESCRIPTORS = 64
MAX_THREADS = 64
STACK_BYTES = 64 << 20

LANDLOCK_READ = 0b1100  # of files and folders
LANDLOCK_FILES = 0x1FFF
# Rights that versions 2, 3 and 5 added: refer, truncate, ioctl on devices.
LANDLOCK_NEWER = ((2, 1 << 13), (3, 1 << 14), (5, 1 << 15))
LANDLOCK_TCP = 0b11
LANDLOCK_SCOPES = 0b11  # abstract sockets and signals, version 6


def confine(level: str, limits: dict[str, int], address_space: int, read_only: list[str]) -> None:
    """Confines this process, which has just been forked, to the level.

    limits: memory_bytes beyond the address_space that the zygote had, cpu_s, file_bytes.
    """
    has_users = os.geteuid() == 0  # another user than this can be changed to
    if level == "namespaces":
        jail.add_scratch()
        user, num_others = jail.RUNNER, 0
    else:
        os.chdir("/")
        user = jail.NOBODY if has_users else os.geteuid()
        num_others = _count_tasks(user)
    _limit("AS", address_space + limits["memory_bytes"])
    _limit("CPU", limits["cpu_s"])
    _limit("FSIZE", limits["file_bytes"])
    _limit("NOFILE", MAX_DESCRIPTORS)
    _limit("NPROC", num_others + MAX_THREADS)
    _limit("CORE", 0)
    _limit("MEMLOCK", 0)
    # Programs that recurse deeply raise it themselves, up to what the address space allows.
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, hard))
    # Before the change of user, who may not even see where the library lies.
    ruleset = _ruleset(read_only) if level == "landlock" else None
    if has_users:
        linux.forget_capabilities()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    elif level == "namespaces":
        linux.forget_capabilities()
    linux.drop_capabilities()
    linux.die_with_parent()  # after the change of user, which undoes it
    linux.allow_no_new_privileges()
    if ruleset is not None:
        linux.landlock_restrict(ruleset)
        os.close(ruleset)
    linux.install_filter(syscalls.build_filter(os.getpid()))


def _limit(name: str, value: int) -> None:
    kind = getattr(resource, f"RLIMIT_{name}")
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _count_tasks(user: int) -> int:
    """Threads that run as the user, since the kernel counts them together with a program's."""
    count = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == user:
                count += len(os.listdir(f"/proc/{pid}/task"))
        except FileNotFoundError:  # it ended meanwhile
            continue
    return count


def _ruleset(read_only: list[str]) -> int:
    version = linux.landlock_version()
    files = LANDLOCK_FILES
    for since, right in LANDLOCK_NEWER:
        files |= right if version >= since else 0
    tcp = LANDLOCK_TCP if version >= 4 else 0
    scopes = LANDLOCK_SCOPES if version >= 6 else 0
    # A kernel refuses a structure with fields that it does not know, unless they are zero.
    ruleset = linux.landlock_ruleset(struct.pack("=QQQ", files, tcp, scopes))
    for folder in read_only:
        _allow(ruleset, folder, LANDLOCK_READ)
    _allow(ruleset, os.devnull, 0b110)  # read and write
    return ruleset


def _allow(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH)
    linux.landlock_allow(ruleset, descriptor, rights)
    os.close(descriptor)
