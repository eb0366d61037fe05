"""The kernel calls that Python 3.11 has no function for. Each raises OSError when refused."""

import ctypes
import os
import signal
import struct

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
SECCOMP_MODE_FILTER = 2
MAX_CAPABILITIES = 64
CAPABILITY_VERSION = 0x20080522
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: object) -> int:
    result = _libc[name](*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    _call("unshare", flags)


def setns(descriptor: int, kind: int) -> None:
    _call("setns", descriptor, kind)


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    kind_bytes = kind.encode() if kind else None
    _call(
        "mount", source.encode(), target.encode(), kind_bytes, ctypes.c_ulong(flags), data.encode()
    )


def unmount(target: str) -> None:
    _call("umount2", target.encode(), MNT_DETACH)


def pivot_root(new_root: str, put_old: str) -> None:
    _call("pivot_root", new_root.encode(), put_old.encode())


def die_with_parent() -> None:
    """SIGKILL to this process when the thread that forked it ends. A change of user undoes it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def hide_memory() -> None:
    """Other processes of the same user can neither trace this one nor read its /proc files."""
    _prctl(PR_SET_DUMPABLE, 0)


def allow_no_new_privileges() -> None:
    """No program that this process might execute gains rights; needed by seccomp and Landlock."""
    _prctl(PR_SET_NO_NEW_PRIVS, 1)


def forget_capabilities() -> None:
    """No capability is left that a later execution could give back."""
    for capability in range(MAX_CAPABILITIES):
        if _libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability), *_zeros(3)) < 0:
            break  # the kernel knows no more
        _prctl(PR_CAPBSET_DROP, capability)


def drop_capabilities() -> None:
    header = struct.pack("Ii", CAPABILITY_VERSION, 0)
    _call("capset", header, bytes(24))  # effective, permitted, inheritable: none


def install_filter(program: bytes) -> None:
    """Makes the BPF program decide over every further system call of this process."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), header, *_zeros(2))


def landlock_version() -> int:
    """The version of Landlock's interface; 0 where the kernel has none."""
    found = _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    return max(found, 0)


def landlock_ruleset(attributes: bytes) -> int:
    size = ctypes.c_size_t(len(attributes))
    return _call("syscall", LANDLOCK_CREATE_RULESET, attributes, size, 0)


def landlock_allow(ruleset: int, folder: int, rights: int) -> None:
    rule = struct.pack("=Qi", rights, folder)
    _call("syscall", LANDLOCK_ADD_RULE, ruleset, LANDLOCK_PATH_BENEATH, rule, 0)


def landlock_restrict(ruleset: int) -> None:
    _call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)


def _prctl(option: int, argument: int) -> None:
    _call("prctl", option, ctypes.c_ulong(argument), *_zeros(3))


def _zeros(count: int) -> list[ctypes.c_ulong]:
    return [ctypes.c_ulong(0)] * count
