"""What generated code could do to this machine, and that it cannot. Effects are looked for from outside."""

import os
import resource
import select
import socket
import sys
import threading
from pathlib import Path

import pytest
import sandbox
from sandbox import MEMORY_BYTES, Sandbox, SandboxUnavailable


pytestmark = pytest.mark.usefixtures("guards")


@pytest.fixture(scope="module")
def guarded(guards):
    return Sandbox(cpu_seconds=2, wall_seconds=20)


def sandboxed_processes():
    """Process ids below this one: every interpreter that runs the sandbox's child, and what it forked."""
    parents = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in brackets, may hold anything.
            parents[int(file.parent.name)] = int(file.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    below = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    return sorted(below - {os.getpid()})


def test_a_program_that_ends_well_passes_and_one_that_raises_does_not(guarded):
    assert guarded.run("assert sorted([2, 1]) == [1, 2]").passed
    assert guarded.run("assert 1 + 1 == 3, 'arithmetic'").error == "AssertionError: arithmetic"
    assert guarded.run("def f(:").error.startswith("SyntaxError")


@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_a_program_that_leaves_before_its_tests_does_not_pass(guarded, leave):
    assert not guarded.run(f"{leave}\nassert False").passed


def test_a_fork_bomb_starts_nothing(guarded):
    bomb = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcomes, most = [], 0
    run = threading.Thread(target=lambda: outcomes.append(guarded.run(bomb)))
    run.start()
    while run.is_alive():
        most = max(most, len(sandboxed_processes()))
        run.join(0.05)
    # Looking for libseccomp takes a process for a moment, before the guards are up.
    assert most <= 2
    assert not outcomes[0].passed
    assert sandboxed_processes() == []


@pytest.mark.parametrize(
    "start",
    [
        "os.posix_spawn('/bin/true', ['true'], {})",
        "os.execv('/bin/true', ['true'])",
        "__import__('subprocess').run(['true'])",
        "__import__('multiprocessing').Process(target=print).start()",
        "__import__('threading').Thread(target=print).start()",
        "os.setsid()",
    ],
)
def test_no_other_process_or_thread_is_started(guarded, start):
    assert not guarded.run(f"import os\n{start}").passed


def test_an_endless_loop_is_stopped(guarded):
    assert guarded.run("while True: pass").error == "stopped by SIGKILL"


def test_a_program_that_only_waits_is_stopped():
    assert Sandbox(wall_seconds=3).run("import time\ntime.sleep(1000)").error == "stopped after 3 s"


def test_ten_gigabytes_are_not_given():
    guarded = Sandbox()
    hoard = "hoard = []\nfor _ in range(10 * 1024):\n    hoard.append(b'x' * 2**20)"
    assert guarded.run(hoard).error.startswith("MemoryError")
    assert guarded.run("bytearray(10 * 1024**3)").error.startswith("MemoryError")
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert peak_bytes <= MEMORY_BYTES


@pytest.mark.parametrize(
    "change",
    [
        "open(path, 'w')",
        "open(path, 'a')",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.truncate(path, 0)",
        "os.remove(path)",
        "os.rename(path, path + '-')",
        "os.link(path, path + '-')",
        "os.symlink(path, path + '-')",
        "os.chmod(path, 0)",
        "os.utime(path, (0, 0))",
        "os.mkdir(path + '-')",
        "os.mkfifo(path + '-')",
        "open(path + '-', 'w')",
        "open('beside', 'w')",
    ],
)
def test_no_file_is_changed_anywhere(guarded, tmp_path, change):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    before = victim.stat()
    assert not guarded.run(f"import os\npath = {str(victim)!r}\n{change}").passed
    assert victim.read_text() == "untouched"
    assert (victim.stat().st_mode, victim.stat().st_mtime) == (before.st_mode, before.st_mtime)
    assert list(tmp_path.iterdir()) == [victim]


def test_files_outside_pythons_library_are_not_read(guarded, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("42")
    assert "Permission denied" in guarded.run(f"open({str(secret)!r})").error
    assert "Permission denied" in guarded.run("open('/etc/passwd')").error


def test_no_connection_is_made(guarded):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        attempt = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))"
        assert not guarded.run(attempt).passed
        assert not guarded.run("import socket\nsocket.socket(socket.AF_UNIX)").passed
        assert select.select([listener], [], [], 0) == ([], [], [])


@pytest.mark.parametrize(
    "send",
    [
        "os.kill(os.getppid(), 9)",
        "os.kill(-1, 9)",
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
        "fcntl.fcntl(os.pipe()[0], 10, 9)",
        "ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0 or 1 / 0",
    ],
)
def test_no_other_process_is_reached(guarded, send):
    assert not guarded.run(f"import ctypes, fcntl, os\n{send}").passed


def test_a_flood_of_output_does_not_reach_the_caller():
    flood = """
import os
for fd in range(3, 64):
    try:
        while True:
            os.write(fd, b"x" * 65536)
    except OSError:
        pass
"""
    assert not Sandbox(wall_seconds=3).run(flood).passed
    assert Sandbox().run("print('x' * 10_000_000)").passed


def test_nothing_is_run_when_a_guard_is_missing(monkeypatch):
    monkeypatch.setitem(sandbox.PROBES, "a guard that is not there", "pass")
    with pytest.raises(SandboxUnavailable, match="a guard that is not there is not guarded"):
        Sandbox()


def test_nothing_is_run_without_the_libraries_of_the_guards(monkeypatch, tmp_path):
    bare = tmp_path / "bin" / "python"
    bare.parent.mkdir()
    bare.symlink_to(Path(sys._base_executable).resolve())
    monkeypatch.setattr(sandbox.sys, "executable", str(bare))
    with pytest.raises(SandboxUnavailable, match="No module named"):
        Sandbox()
