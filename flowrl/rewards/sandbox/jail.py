"""A root directory with the standard library and nothing else, in namespaces of its own.

The zygote moves in once; every program then gets a process namespace, in which it is alone, and a
fresh scratch folder in memory, of which nothing is left when it ends.
"""

import os

from . import linux

# Inside, the zygote of a root user is 0 and the program is RUNNER; other users have no second
# number to give, and zygote and program are both RUNNER.
RUNNER = 1
NOBODY = 65534
SCRATCH = "/scratch"
SCRATCH_BYTES = 64 << 20
SCRATCH_FILES = 1024
PROC_NAMESPACE = "/proc/self/ns/pid"
READ_ONLY = linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV


def enter(library: str, packages: list[str]) -> int:
    """Moves this process into new namespaces and a new root that shows the given folders.

    Returns, in the child that it forks and which is process 1 of the new process namespace, a
    descriptor of that namespace; the parent waits for the child and exits. Raises OSError if the
    kernel refuses.
    """
    _unshare_with_users()
    linux.unshare(
        linux.CLONE_NEWNS
        | linux.CLONE_NEWPID
        | linux.CLONE_NEWNET
        | linux.CLONE_NEWIPC
        | linux.CLONE_NEWUTS
        | linux.CLONE_NEWCGROUP
    )
    linux.die_with_parent()
    if child := os.fork():
        os.close(0)  # the child's socket: its end must be seen by the client
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    linux.die_with_parent()
    namespace = os.open(PROC_NAMESPACE, os.O_RDONLY)
    _change_root(library, packages)
    return namespace


def add_scratch() -> None:
    """Gives this process, and none else, an empty scratch folder."""
    linux.unshare(linux.CLONE_NEWNS)
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=700,uid={RUNNER},gid={RUNNER}"
    linux.mount("scratch", SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
    os.chdir(SCRATCH)


def _unshare_with_users() -> None:
    """A new user namespace. A root user's gets two users, which takes a helper from outside."""
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        linux.unshare(linux.CLONE_NEWUSER)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{RUNNER} {uid} 1")
        _write("/proc/self/gid_map", f"{RUNNER} {gid} 1")
        return
    ready, is_ready = os.pipe()
    pid = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(is_ready)
        if not os.read(ready, 1):  # there is no new namespace, and soon no parent
            os._exit(1)
        for name in ("uid_map", "gid_map"):
            _write(f"/proc/{pid}/{name}", f"0 0 1\n{RUNNER} {NOBODY} 1")
        os._exit(0)
    linux.unshare(linux.CLONE_NEWUSER)
    os.write(is_ready, b"1")
    _, status = os.waitpid(helper, 0)
    os.close(ready)
    os.close(is_ready)
    if status:
        raise OSError(f"the users 0 and {NOBODY} cannot be mapped into a user namespace")
    os.setgroups([])


def _change_root(library: str, packages: list[str]) -> None:
    # Nothing mounted here may appear outside.
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    sources = {folder: os.path.realpath(folder) for folder in (library, *packages)}
    linux.mount("root", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    os.mkdir("/tmp/old", 0o755)
    linux.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    _show(library, sources[library])
    # What is installed beside the standard library is hidden, but for the packages asked for.
    hidden = [f"{library}/{name}" for name in ("site-packages", "dist-packages")]
    hidden = [folder for folder in hidden if os.path.isdir(folder)]
    for folder in hidden:
        linux.mount("none", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for folder in packages:
        _show(folder, sources[folder])
    os.makedirs("/dev", 0o755, exist_ok=True)
    os.close(os.open("/dev/null", os.O_WRONLY | os.O_CREAT, 0o666))
    linux.mount("/old/dev/null", "/dev/null", None, linux.MS_BIND)
    linux.unmount("/old")
    os.rmdir("/old")
    os.mkdir(SCRATCH, 0o755)
    for folder in ("/", *hidden):
        linux.mount("none", folder, None, linux.MS_REMOUNT | linux.MS_BIND | READ_ONLY)


def _show(folder: str, source: str) -> None:
    """A folder of the old root, whose path without links is source, in the new one."""
    os.makedirs(folder, 0o755, exist_ok=True)
    linux.mount(f"/old{source}", folder, None, linux.MS_BIND)
    # A namespace may add flags to a mount that it got from its parent, and take none away.
    kept = os.statvfs(folder).f_flag & (READ_ONLY | linux.MS_NOEXEC)
    linux.mount("none", folder, None, linux.MS_REMOUNT | linux.MS_BIND | READ_ONLY | kept)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    os.write(descriptor, text.encode())
    os.close(descriptor)
