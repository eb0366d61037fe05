"""The seccomp filter: which system calls a program may make, as a BPF program.

What is not listed fails with ENOSYS, on which libraries fall back. Starting processes, and
signalling others, fails with EPERM. What only an attempt to get out calls ends it with SIGSYS.
"""

import errno
import platform
import struct

MACHINE = "x86_64"
AUDIT_ARCH = 0xC000003E
X32_BIT = 0x40000000

# Beside files, which the mount namespace or Landlock guards, only what concerns the process itself.
# Not here on purpose: chmod, chown, utimes, xattr and truncate, which Landlock does not cover;
# memfd_create and shared memory, which no memory limit covers; setsid, setpgid and prctl.
ALLOWED = """
read:0 write:1 readv:19 writev:20 pread64:17 pwrite64:18 lseek:8 close:3 close_range:436 fstat:5
stat:4 lstat:6 newfstatat:262 statx:332 open:2 openat:257 access:21 faccessat:269 faccessat2:439
readlink:89 readlinkat:267 getcwd:79 chdir:80 getdents64:217 dup:32 dup2:33 dup3:292
pipe:22 pipe2:293 poll:7 ppoll:271 select:23 pselect6:270 mmap:9 munmap:11 mprotect:10 mremap:25
madvise:28 brk:12 futex:202 set_robust_list:273 rseq:334 membarrier:324 set_tid_address:218
rt_sigaction:13 rt_sigprocmask:14 rt_sigreturn:15 sigaltstack:131 alarm:37 getitimer:36
setitimer:38 pause:34 nanosleep:35 clock_nanosleep:230 clock_gettime:228 clock_getres:229
gettimeofday:96 time:201 times:100 getrusage:98 getpid:39 getppid:110 gettid:186 getuid:102
geteuid:107 getgid:104 getegid:108 getgroups:115 getresuid:118 getresgid:120 getpgrp:111
getpgid:121 getsid:124 sched_yield:24 sched_getaffinity:204 getcpu:309 uname:63 sysinfo:99
getrandom:318 getrlimit:97 setrlimit:160 wait4:61 waitid:247 exit:60 exit_group:231
restart_syscall:219 ftruncate:77 fallocate:285 fsync:74 fdatasync:75 unlink:87 unlinkat:263
rename:82 renameat:264 renameat2:316 mkdir:83 mkdirat:258 rmdir:84 symlink:88 symlinkat:266 umask:95
"""
REFUSED = "fork:57 vfork:58 execve:59 execveat:322 tkill:200"
FATAL = """
socket:41 socketpair:53 connect:42 bind:49 listen:50 accept:43 accept4:288 sendto:44 sendmsg:46
sendmmsg:307 recvfrom:45 recvmsg:47 recvmmsg:299 ptrace:101 process_vm_readv:310
process_vm_writev:311 process_madvise:440 pidfd_open:434 pidfd_getfd:438 pidfd_send_signal:424
kcmp:312 mount:165 umount2:166 pivot_root:155 chroot:161 unshare:272 setns:308 fsopen:430
fsmount:432 fsconfig:431 fspick:433 open_tree:428 move_mount:429 mount_setattr:442
open_by_handle_at:304 bpf:321 perf_event_open:298 userfaultfd:323 io_uring_setup:425
io_uring_enter:426 io_uring_register:427 init_module:175 finit_module:313 delete_module:176
kexec_load:246 kexec_file_load:320 reboot:169 add_key:248 request_key:249 keyctl:250 swapon:167
swapoff:168 acct:163 quotactl:179 settimeofday:164 clock_settime:227 clock_adjtime:305 adjtimex:159
sethostname:170 setdomainname:171 iopl:172 ioperm:173
"""
CLONE, KILL, TGKILL, IOCTL, FCNTL, PRLIMIT = 56, 62, 234, 16, 72, 302
CLONE_THREAD = 0x10000
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what opening a file asks for.
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# DUPFD, GETFD, SETFD, GETFL, SETFL, GETLK, SETLK, SETLKW, DUPFD_CLOEXEC. Not SETOWN and SETSIG, by
# which the kernel sends any signal, SIGKILL too, to any process of the same user.
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
REFUSE = 0x00050000 | errno.EPERM
UNKNOWN = 0x00050000 | errno.ENOSYS

# Offsets in struct seccomp_data. Of 64-bit arguments the lower half: the kernel reads no more of
# those compared here.
NUMBER, ARCH, FIRST_ARGUMENT, SECOND_ARGUMENT = 0, 4, 16, 24
LOAD, JUMP_EQUAL, JUMP_GREATER_EQUAL, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def is_supported() -> bool:
    """Whether the numbers above are those of this machine."""
    return platform.machine() == MACHINE and struct.calcsize("P") == 8


def build_filter(own_pid: int) -> bytes:
    """The filter of a program whose process sees itself as own_pid, which it may signal."""
    code = [
        _step(LOAD, ARCH),
        *_return_unless(JUMP_EQUAL, AUDIT_ARCH, KILL_PROCESS),
        _step(LOAD, NUMBER),
        _step(JUMP_GREATER_EQUAL, X32_BIT, 0, 1),
        _step(RETURN, KILL_PROCESS),
    ]
    for names, action in ((ALLOWED, ALLOW), (REFUSED, REFUSE), (FATAL, KILL_PROCESS)):
        for entry in names.split():
            number = int(entry.partition(":")[2])
            code += [_step(JUMP_EQUAL, number, 0, 1), _step(RETURN, action)]
    code += _when(CLONE, FIRST_ARGUMENT, JUMP_ANY_BIT, [CLONE_THREAD])
    code += _when(KILL, FIRST_ARGUMENT, JUMP_EQUAL, [own_pid])
    code += _when(TGKILL, FIRST_ARGUMENT, JUMP_EQUAL, [own_pid])
    code += _when(PRLIMIT, FIRST_ARGUMENT, JUMP_EQUAL, [0, own_pid])
    code += _when(IOCTL, SECOND_ARGUMENT, JUMP_EQUAL, IOCTLS)
    code += _when(FCNTL, SECOND_ARGUMENT, JUMP_EQUAL, FCNTLS)
    return b"".join([*code, _step(RETURN, UNKNOWN)])


def _when(
    number: int, argument: int, jump: int, values: list[int] | tuple[int, ...]
) -> list[bytes]:
    """Allows a call if the argument matches a value, else refuses it; other calls pass by."""
    tests = [step for value in values for step in (_step(jump, value, 0, 1), _step(RETURN, ALLOW))]
    body = [_step(LOAD, argument), *tests, _step(RETURN, REFUSE)]
    return [_step(JUMP_EQUAL, number, 0, len(body)), *body]


def _return_unless(jump: int, value: int, action: int) -> list[bytes]:
    return [_step(jump, value, 1, 0), _step(RETURN, action)]


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)
