#!/usr/bin/env python3
"""What only a card can show, as JSON lines: `gpu.py test` runs the promises and the fidelity of the CUDA kernels on it, `gpu.py bench`
measures the engine on random weights in the shape of real models. `make gpu-binaries` builds what it runs, also for a machine
without Rust; `make test-gpu` and `make bench-gpu` call it.

Needs Python alone. Each command ends within nine minutes: what does not fit any more is reported as left out."""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BINARIES = ROOT / "target" / "gpu"
SECONDS = 9 * 60
TESTS = ["promises_gpu", "fidelity_gpu"]
# The largest comes last: it takes longest to make, and its adapters would not leave room for others.
SHAPES = ["0.5b", "7b", "32b"]
LARGEST = SHAPES[-1]
ROWS = "1,8,16,32,64"
# A test's name is printed before what it prints itself, on the same line, and its result after that.
STARTED = re.compile(r"^test (\S+) \.\.\. ")
RESULT = re.compile(r"^(ok|FAILED|ignored)\b")
FIDELITY = re.compile(r"^\w+: \S+ of \S+$")


def say(**line):
    print(json.dumps(line), flush=True)


def card():
    """What the driver says of the card, for whoever reads the figures."""
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    try:
        found = subprocess.run(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        say(card=found.stdout.strip() or found.stderr.strip())
    except (OSError, subprocess.TimeoutExpired) as error:
        say(card=f"nvidia-smi: {error}")


def lines(command, seconds, **variables):
    """The lines of a command, which is ended when its time is over; the last item is its exit status."""
    environment = {**os.environ, **variables}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **pipes) as process:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        yield from process.stdout
        timer.cancel()
        yield process.wait()


def test(deadline):
    """Every test of the promises and of fidelity, each with how it went; gives the number of binaries that failed."""
    failed = 0
    for binary in TESTS:
        left = deadline - time.monotonic()
        if left < 10:
            say(binary=binary, left_out="no time")
            failed += 1
            continue
        *said, status = lines([BINARIES / binary, "--nocapture", "--test-threads=1"], left, LORRY_TEST_GPU="1")
        name = None
        for line in map(str.rstrip, said):
            if started := STARTED.match(f"{line} "):
                name, line = started[1], line[started.end() :]
            if name and (result := RESULT.match(line)):
                say(test=name, result=result[1])
                name = None
            elif FIDELITY.match(line):
                say(fidelity=line)
        say(binary=binary, exit=status, **({"last_lines": said[-12:]} if status else {}))
        failed += status != 0
    return failed


def bench(deadline, device, shapes):
    """Decode of 1 to 64 rows and prefill of 512 tokens for each shape, and 32 rows over 0, 1, 8 and 32 adapters; gives the number
    of runs that failed. Of two runs with adapters the first finds them cold."""
    rows = ["--prompt-tokens", "512", "--max-tokens", "64", "--batch", ROWS]
    adapters = ["--prompt-tokens", "64", "--max-tokens", "64", "--batch", "32", "--num-adapters", "0,1,8,32"]
    failed = 0
    for shape in shapes:
        for options in [rows] if shape == LARGEST else [rows, adapters]:
            left = deadline - time.monotonic()
            if left < 20:
                say(shape=shape, options=options, left_out="no time")
                continue
            command = [BINARIES / "lorry", "bench", "--device", device, "--random-weights", shape, "--repeat", "2", *options]
            for line in lines(command, left, RUST_LOG="warn"):
                if isinstance(line, str):
                    print(line.rstrip(), flush=True)
                elif line != 0:
                    say(shape=shape, exit=line)
                    failed += 1
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["test", "bench"])
    parser.add_argument("--device", default="cuda", help="where bench runs: cuda, cuda:N, or cpu to try the script itself")
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    card()
    if arguments.command == "test":
        return 1 if test(deadline) else 0
    failed = bench(deadline, arguments.device, arguments.shapes.split(","))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
