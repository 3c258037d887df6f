#!/usr/bin/env python3
"""The kernels as PTX, what the binary carries: compiled here, where no card is needed, and checked for every supported card.

`build` writes kernels.ptx.gz, `check` says whether it is what the sources give, and whether each kernel fits into the cards.
NVRTC and ptxas come from Python packages (requirements.txt). Only what the file holds is compared, since zlibs differ.
"""

import argparse
import ctypes
import gzip
import hashlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COMMITTED = FOLDER / "kernels.ptx.gz"
# What drivers from 550 take.
MAX_PTX_VERSION = (8, 4)
OLDEST_CARD = "80"
CARDS = ("sm_80", "sm_89", "sm_90", "sm_120")
OPTIONS = (f"--gpu-architecture=compute_{OLDEST_CARD}", "--std=c++17", "--fmad=false", f"--include-path={FOLDER}")

# Of one multiprocessor, and of one block without asking for more.
REGISTERS = 65536
MAX_REGISTERS_PER_THREAD = 255
MAX_SHARED_BYTES = 48 << 10


class Refused(Exception):
    """What is wrong, for the one who ran this."""


@dataclass
class Usage:
    """What one kernel takes on one card."""

    registers: int = 0
    shared_bytes: int = 0
    stack_bytes: int = 0
    spill_bytes: int = 0


def packaged(pattern: str) -> Path:
    """A file of NVIDIA's packages."""
    try:
        import nvidia
    except ImportError as error:
        raise Refused(f"NVIDIA's packages are missing: pip install -r {FOLDER / 'requirements.txt'}") from error
    found = sorted(path for root in nvidia.__path__ for path in Path(root).rglob(pattern))
    if not found:
        raise Refused(f"{pattern} is in none of NVIDIA's packages: pip install -r {FOLDER / 'requirements.txt'}")
    return found[0]


def source_hash() -> str:
    """SHA-256 over the sources in the order of their names: name, zero, text, zero (src/cuda/ptx.rs does the same)."""
    digest = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")], key=lambda path: path.name):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compile_kernels() -> str:
    """PTX of kernels.cu; its first line names the hash of the sources."""
    rtc = ctypes.CDLL(str(packaged("libnvrtc.so.*")))
    program = ctypes.c_void_p()

    def text(kind: str) -> str:
        size = ctypes.c_size_t()
        getattr(rtc, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(rtc, f"nvrtcGet{kind}")(program, buffer)
        return buffer.value.decode()

    source = (FOLDER / "kernels.cu").read_bytes()
    if rtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernels.cu", 0, None, None):
        raise Refused("NVRTC does not start")
    try:
        options = (ctypes.c_char_p * len(OPTIONS))(*(option.encode() for option in OPTIONS))
        if rtc.nvrtcCompileProgram(program, len(OPTIONS), options):
            raise Refused(text("ProgramLog"))
        return f"// sources {source_hash()}\n{text('PTX')}"
    finally:
        rtc.nvrtcDestroyProgram(ctypes.byref(program))


def launch_bounds(ptx: str) -> dict[str, int]:
    """The threads of each kernel's blocks."""
    version = tuple(map(int, re.search(r"^\.version (\d+)\.(\d+)", ptx, re.MULTILINE).groups()))
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    if version > MAX_PTX_VERSION or target != f"sm_{OLDEST_CARD}":
        raise Refused(f"PTX {version} for {target}: what every supported driver takes is {MAX_PTX_VERSION} for sm_{OLDEST_CARD}")
    kernels = re.findall(r"\.entry (\w+)\(", ptx)
    bounds = re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+), 1, 1\s", ptx)
    if unbounded := set(kernels) - {name for name, _ in bounds}:
        raise Refused(f"these kernels do not say how many threads their blocks have: {sorted(unbounded)}")
    return {name: int(threads) for name, threads in bounds}


def usage_on(card: str, ptx: Path) -> dict[str, Usage]:
    """What ptxas says of each kernel."""
    command = [packaged("bin/ptxas"), "-v", "--gpu-name", card, "--output-file", "/dev/null", ptx]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise Refused(f"ptxas for {card}: {run.stdout}{run.stderr}")
    kernels, usage = {}, Usage()
    for line in run.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            usage = kernels[entry.group(1)] = Usage()
        if stack := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            usage.stack_bytes, stores, loads = map(int, stack.groups())
            usage.spill_bytes = stores + loads
        if registers := re.search(r"Used (\d+) registers", line):
            usage.registers = int(registers.group(1))
        if shared := re.search(r"(\d+) bytes smem", line):
            usage.shared_bytes = int(shared.group(1))
    return kernels


def faults(name: str, threads: int, card: str, usage: Usage) -> list[str]:
    """Why the kernel does not fit into the card."""
    of_kernel = f"{name} on {card}:"
    broken = []
    if threads % 32 or not 0 < threads <= 1024:
        broken.append(f"{of_kernel} blocks of {threads} threads, which are not whole warps up to 1024")
    if usage.spill_bytes:
        broken.append(f"{of_kernel} {usage.spill_bytes} bytes of registers are spilled")
    # A warp takes registers in units of 8 a thread.
    if usage.registers > MAX_REGISTERS_PER_THREAD or -(-usage.registers // 8) * 8 * threads > REGISTERS:
        broken.append(f"{of_kernel} {usage.registers} registers a thread are too many for {threads} threads")
    if usage.shared_bytes > MAX_SHARED_BYTES:
        broken.append(f"{of_kernel} {usage.shared_bytes} bytes of shared memory, {MAX_SHARED_BYTES} is the limit")
    return broken


def check_cards(ptx: str) -> None:
    """Prints what each kernel takes on each card.

    Raises Refused if one does not fit.
    """
    bounds = launch_bounds(ptx)
    broken = []
    with tempfile.NamedTemporaryFile(suffix=".ptx", mode="w") as file:
        file.write(ptx)
        file.flush()
        cards = {card: usage_on(card, Path(file.name)) for card in CARDS}
    print(f"{'registers · shared bytes · stack bytes':40} threads" + "".join(f"{card:>18}" for card in CARDS))
    for name, threads in sorted(bounds.items()):
        row = f"{name:40} {threads:7}"
        for card, kernels in cards.items():
            usage = kernels.get(name)
            if usage is None:
                raise Refused(f"ptxas for {card} says nothing of {name}")
            row += f"{f'{usage.registers} · {usage.shared_bytes} · {usage.stack_bytes}':>18}"
            broken += faults(name, threads, card, usage)
        print(row)
    if broken:
        raise Refused("\n".join(broken))


def build() -> None:
    ptx = compile_kernels()
    launch_bounds(ptx)
    # No time in it, so that the same sources give the same file.
    COMMITTED.write_bytes(gzip.compress(ptx.encode(), 9, mtime=0))
    print(f"{COMMITTED.name}: {len(ptx)} bytes of PTX in {COMMITTED.stat().st_size}")


def check() -> None:
    ptx = compile_kernels()
    check_cards(ptx)
    if not COMMITTED.exists() or gzip.decompress(COMMITTED.read_bytes()) != ptx.encode():
        raise Refused(f"{COMMITTED.name} is not what the sources give: run `make ptx` and commit it")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = {"build": build, "check": check}
    parser.add_argument("verb", choices=verbs)
    try:
        verbs[parser.parse_args().verb]()
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
