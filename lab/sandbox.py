"""Runs generated Python programs, which nobody has read, without letting them touch anything.

Each program gets a fresh interpreter, which gives up its rights before it sees the program:

- Landlock: it may read Python's own library and the system's, and write nothing but /dev/null.
- seccomp: it may make the system calls that computing takes, and no others. It cannot start a process or a thread,
  open a socket, send a signal, change a file's rights or trace another process.
- rlimits: CPU time, memory, size of files, processes.
- All capabilities are dropped, so that root is bound by the same limits. The user stays the same: another one could
  often not read Python's own library.

The parent stops it after a time on the clock, and the kernel does if the parent dies. As its one process can be neither
left nor multiplied, that is the end of everything the program did. Where one of these guards is not to be had, nothing
is run: `Sandbox()` tries each of them first.

Linux only, from 6.2 on: before, Landlock let files be truncated.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import termios
import types
from dataclasses import dataclass
from pathlib import Path

MEMORY_BYTES = 1 << 30
MAX_REPORT_BYTES = 4096
MIN_LANDLOCK_ABI = 3

READABLE = (sys.base_prefix, "/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom")
WRITABLE = "/dev/null"

# What CPython calls to compute, read files, tell the time and end. Names that an architecture lacks are ignored.
ALLOWED_SYSCALLS = """
    read readv pread64 preadv write writev pwrite64 lseek close dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2 socketpair
    open openat stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat
    getdents getdents64 getcwd chdir fchdir umask
    mmap munmap mremap mprotect madvise brk
    futex sched_yield sched_getaffinity set_robust_list rseq arch_prctl set_tid_address restart_syscall
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending sigaltstack getitimer setitimer alarm pause
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times getrusage getrlimit
    getpid getppid gettid getuid geteuid getgid getegid getpgrp getpgid getsid getgroups uname sysinfo getrandom
    exit exit_group
""".split()

# Of `fcntl` and `ioctl` by number: others have the kernel send signals to any process of the user.
FCNTL_COMMANDS = (fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL)
IOCTL_COMMANDS = (
    termios.TCGETS,
    termios.TIOCGWINSZ,
    termios.FIONBIO,
    termios.FIONREAD,
    termios.FIOCLEX,
    termios.FIONCLEX,
)

# Of each guard: a program that breaks through if the guard is missing, and is refused if it holds.
PROBES = {
    "processes (seccomp)": "import os\nif os.fork() == 0: os._exit(0)",
    "threads (seccomp)": "import threading\nthreading.Thread(target=print).start()",
    "network (seccomp)": "import socket\nsocket.socket()",
    "signals (seccomp)": "import os\nos.kill(os.getppid(), 0)",
    "signals by way of files (seccomp)": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "rights of files (seccomp)": "import os\nos.chmod('.', 0o700)",
    "writing (Landlock)": "open('file', 'w')",
    "reading (Landlock)": "import os\nos.listdir('/')",
    "memory (rlimit)": f"bytearray({MEMORY_BYTES})",
    "limits (seccomp, capabilities)": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
}


class SandboxUnavailable(Exception):
    """A guard cannot be had on this machine, so nothing is run."""


@dataclass(frozen=True)
class Outcome:
    passed: bool
    """Whether the program ran to its end without an exception."""
    error: str = ""
    """What stopped it; empty if it passed."""


class Sandbox:
    """Runs programs under guard; several threads may share one."""

    def __init__(self, cpu_seconds: int = 10, wall_seconds: int = 60) -> None:
        """Tries every guard. Raises `SandboxUnavailable` if one does not hold.

        `wall_seconds` is for programs that sleep: a busy machine takes long to give a program its `cpu_seconds`.
        """
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = wall_seconds
        refusal = "generated code cannot be run safely on this machine"
        plain = self.run("import math, re, collections, datetime, itertools, hashlib, typing, heapq")
        if not plain.passed:
            raise SandboxUnavailable(f"{refusal}: {plain.error}")
        for guard, program in PROBES.items():
            if self.run(program).passed:
                raise SandboxUnavailable(f"{refusal}: {guard} is not guarded")

    def run(self, program: str) -> Outcome:
        """Runs `program` to its end, or until a guard stops it."""
        with tempfile.TemporaryDirectory(prefix="lorry-sandbox-") as folder, tempfile.TemporaryFile() as source:
            source.write(program.encode(errors="surrogatepass"))
            source.seek(0)
            # -I: neither the caller's environment nor its folder; -B: no byte code is written.
            command = [sys.executable, "-I", "-B", str(Path(__file__).resolve()), str(self.cpu_seconds)]
            with subprocess.Popen(
                command,
                cwd=folder,
                env={},
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as child:
                try:
                    child.wait(self.wall_seconds)
                except subprocess.TimeoutExpired:
                    return Outcome(False, f"stopped after {self.wall_seconds} s")
                finally:
                    child.kill()
                # Read only now: a program that floods its report blocks, instead of filling this process's memory.
                report = os.read(child.stdout.fileno(), MAX_REPORT_BYTES)
        return _outcome(child.returncode, report)


def _outcome(status: int, report: bytes) -> Outcome:
    if status < 0:
        return Outcome(False, f"stopped by {signal.Signals(-status).name}")
    try:
        error = json.loads(report)["error"]
    except (ValueError, KeyError, TypeError):
        return Outcome(False, report.decode(errors="replace").strip() or "ended itself early")
    return Outcome(not error, error)


def _run_guarded(cpu_seconds: int) -> None:
    """The child: gives up its rights, runs the program from its standard input and reports on its standard output."""
    # Here, not above: who only calls `Sandbox` gets an error that says what is missing.
    import landlock
    import pyseccomp

    _end_with_parent()
    program = sys.stdin.buffer.read().decode(errors="surrogatepass")
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)

    _limit_resources(cpu_seconds)
    _drop_capabilities()
    _restrict_files(landlock)
    _restrict_syscalls(pyseccomp)
    # Until here, what goes wrong is the guards' fault, and the parent hears of it.
    for stream in (0, 1, 2):
        os.dup2(null, stream)

    # Only the standard library: a score must not depend on what else is installed.
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    sys.path[:] = [folder for folder in sys.path if folder not in installed]
    # Not `__main__`: what a script does only when it is called is no part of the answer.
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
        error = ""
    except BaseException as exception:
        error = f"{type(exception).__name__}: {exception}"[:200]
    os.write(report, json.dumps({"error": error}).encode())
    # Not `sys.exit`: what the program left to be done at the end is not done.
    os._exit(0)


def _end_with_parent() -> None:
    pr_set_pdeathsig = 1
    if ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL) != 0:
        raise OSError("the kernel does not tie this process to its parent")


def _limit_resources(cpu_seconds: int) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
    ):
        resource.setrlimit(limit, (value, value))


def _drop_capabilities() -> None:
    """Empties the sets of capabilities: root becomes a user that happens to own root's files."""
    version_3, this_process = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, this_process)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capabilities cannot be dropped")


def _restrict_files(landlock: types.ModuleType) -> None:
    if landlock.landlock_abi_version() < MIN_LANDLOCK_ABI:
        raise OSError("this kernel's Landlock does not guard against truncation: Linux 6.2 or later is needed")
    rules = landlock.Ruleset()
    access = landlock.FSAccess
    for path in filter(os.path.exists, READABLE):
        rules.allow(path, rules=access.READ_FILE | (access.READ_DIR if os.path.isdir(path) else access(0)))
    rules.allow(WRITABLE, rules=access.READ_FILE | access.WRITE_FILE)
    rules.apply()


def _restrict_syscalls(pyseccomp: types.ModuleType) -> None:
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    for name in ALLOWED_SYSCALLS:
        rules.add_rule(pyseccomp.ALLOW, name)
    for name, commands in (("fcntl", FCNTL_COMMANDS), ("ioctl", IOCTL_COMMANDS)):
        for command in commands:
            rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(1, pyseccomp.EQ, command))
    # Reading one's limits, not setting them: the third argument points to new ones.
    rules.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(2, pyseccomp.EQ, 0))
    rules.load()


if __name__ == "__main__":
    _run_guarded(cpu_seconds=int(sys.argv[1]))
