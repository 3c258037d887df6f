#!/usr/bin/env python3
"""A soak: lorry under a steady load while adapters are registered, replaced and removed over its API.

Starts a server of its own with the shipped adapters, warms it up with as many requests at once as it takes, so that what a step
of so many rows needs is there before the memory is judged, and puts 80 % of --knee on it with `lorry loadgen` (attack.py finds the
knee, with the same --kinds and --max-tokens). What must hold:

- no request fails or is dropped, and neither does a change of an adapter or a request for one that has just come;
- after the first window, the server's resident memory, by the medians of fifths of windows, stays within 2 % of what it was at the end
  of that window (in single seconds there are two copies of what is just being exchanged: they are reported);
- the 99th percentile of the time to the end of a reply is, after the first window, at most 1.3 times that of the first.

Writes a JSON report and ends with 1 if one of them does not hold.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import attack
import targets

sys.path.insert(0, str(attack.REPOSITORY / "tests" / "clients"))
from lorry_server import BINARY, serving  # noqa: E402

SHARE_OF_KNEE = 0.8
MAX_MEMORY_CHANGE = 0.02
MAX_P99_RATIO = 1.3
# What the load asks for, beside the base; `swapped` is one adapter and then another, all the time.
STEADY, SWAPPED, FLEETING = ["conala", "bash", "fim-python"], "swapped", "fleeting"
VARIANTS = ["conala", "bash"]
SECONDS_BETWEEN_CHANGES = 1.0
SECONDS_BETWEEN_SAMPLES = 1.0
# Small, so that it is full, and its memory touched, within the first window.
KV_CACHE_MIB = 128
# More than run at once at 80 % of the knee; the warm-up has as many.
MAX_SEQUENCES = 32
ADMIN_KEY = "soak"


@dataclass
class Churn:
    """What the changes of adapters came to."""

    changes: dict = field(default_factory=lambda: {"registered": 0, "replaced": 0, "removed": 0})
    faults: list = field(default_factory=list)


def call(url, method, path, body=None):
    """The status of a reply."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=attack.TIMEOUT_SECONDS) as reply:
            reply.read()
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def install(url, name, source):
    return call(url, "PUT", f"/v1/adapters/{name}", {"path": source})


def churn(url, is_over, outcome):
    def expect(wanted, status, what):
        if status != wanted:
            outcome.faults.append(f"{what} answered {status}, not {wanted}")

    ask = {"model": FLEETING, "prompt": "values = ", "max_tokens": 1}
    turn = 0
    try:
        while not is_over.wait(SECONDS_BETWEEN_CHANGES):
            turn += 1
            expect(200, install(url, SWAPPED, VARIANTS[turn % 2]), "a replacement")
            outcome.changes["replaced"] += 1
            expect(201, install(url, FLEETING, "docstring"), "a registration")
            outcome.changes["registered"] += 1
            expect(200, call(url, "POST", "/v1/completions", ask), "a request for a new adapter")
            expect(204, call(url, "DELETE", f"/v1/adapters/{FLEETING}"), "a removal")
            outcome.changes["removed"] += 1
            expect(404, call(url, "POST", "/v1/completions", ask), "a request for a removed adapter")
    except Exception as error:
        # A soak in which nothing changes any more shows nothing.
        outcome.faults.append(f"the changes ended: {error!r}")


def resident_mib(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def watch_memory(pid, is_over, samples):
    """Adds `(seconds, MiB)`."""
    start = time.monotonic()
    while not is_over.wait(SECONDS_BETWEEN_SAMPLES):
        samples.append((time.monotonic() - start, resident_mib(pid)))


def by_window(timed, window):
    """Of `(seconds, value)` the values of each window that has any, by its number."""
    windows = {}
    for seconds, value in sorted(timed, key=lambda one: one[0]):
        windows.setdefault(int(seconds // window), []).append(value)
    return windows


def judge_memory(samples, window, faults):
    """Against the last fifth of the first window."""
    fifths = {number: statistics.median(fifth) for number, fifth in by_window(samples, window / 5).items()}
    reference, later = fifths.get(4), [mib for number, mib in fifths.items() if number > 4]
    if reference is None or not later:
        faults.append("the soak was too short to judge the memory")
        return None
    change = max(abs(mib / reference - 1) for mib in later)
    if change > MAX_MEMORY_CHANGE:
        faults.append(f"resident memory went from {reference:.0f} MiB to between {min(later):.0f} and {max(later):.0f} MiB")
    report = [{"min_mib": min(w), "median_mib": statistics.median(w), "max_mib": max(w)} for w in by_window(samples, window).values()]
    return {"settled_mib": reference, "min_mib": min(later), "max_mib": max(later), "max_change": change, "windows": report}


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


def judge_latency(lines, window, faults):
    """`lines` are those of the log of `lorry loadgen`."""
    windows = by_window([(line["at_s"], line) for line in lines if line["error"] is None], window)
    p99 = {key: lambda lines, key=key: percentile([line[key] for line in lines], 0.99) for key in ("ttft_ms", "e2e_ms")}
    first, rest = windows.get(0, []), [line for number, lines in windows.items() if number > 0 for line in lines]
    if not first or not rest:
        faults.append("the soak was too short to judge the latency")
        return None
    ratio = p99["e2e_ms"](rest) / p99["e2e_ms"](first)
    if ratio > MAX_P99_RATIO:
        faults.append(f"the p99 after the first window is {ratio:.2f} times that of the first")
    report = [{"requests": len(w), **{f"{key}_p99": of(w) for key, of in p99.items()}} for w in windows.values()]
    return {"e2e_p99_ratio": ratio, "windows": report}


def warm_up(url, kinds, models, max_tokens):
    mix = targets.requests(kinds, models, 2 * MAX_SEQUENCES, max_tokens)
    with ThreadPoolExecutor(MAX_SEQUENCES) as pool:
        statuses = set(pool.map(lambda request: call(url, "POST", request["path"], request["body"]), mix))
    if statuses != {200}:
        raise SystemExit(f"the warm-up was answered with {statuses}")


def load(url, rate, kinds, models, arguments, folder):
    """What `lorry loadgen` reports, and its log."""
    count = attack.count_of(rate, arguments.seconds)
    mix, log = folder / "targets.jsonl", folder / "requests.jsonl"
    with mix.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in targets.requests(kinds, models, count, arguments.max_tokens))
    command = [BINARY, "loadgen", "--url", url, "--mix", mix, "--log", log, "--rates", rate, "--duration-s", arguments.seconds]
    command += ["--timeout-s", attack.TIMEOUT_SECONDS]
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout), [json.loads(line) for line in log.read_bytes().splitlines()]


def soak(arguments):
    faults, samples, outcome, is_over = [], [], Churn(), threading.Event()
    rate = SHARE_OF_KNEE * arguments.knee
    kinds = targets.read_kinds(arguments.parser, arguments.kinds)
    models = [arguments.base, *STEADY, SWAPPED]
    environment = {
        "LORRY__SERVER__ADMIN_KEY": ADMIN_KEY,
        "LORRY__ENGINE__KV_CACHE_MIB": str(KV_CACHE_MIB),
        "LORRY__ENGINE__MAX_SEQUENCES": str(MAX_SEQUENCES),
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        root = folder / "adapters"
        shutil.copytree(attack.REPOSITORY / "adapters", root, ignore=shutil.ignore_patterns(".lorry"))
        with serving("--model", arguments.base, "--adapters", root, environment=environment) as server:
            if (status := install(server.url, SWAPPED, VARIANTS[0])) != 201:
                raise SystemExit(f"{SWAPPED} cannot be installed: {status}")
            warm_up(server.url, kinds, models, arguments.max_tokens)
            threads = [
                threading.Thread(target=churn, args=(server.url, is_over, outcome)),
                threading.Thread(target=watch_memory, args=(server.process.pid, is_over, samples)),
            ]
            for thread in threads:
                thread.start()
            try:
                report, lines = load(server.url, rate, kinds, models, arguments, folder)
            finally:
                is_over.set()
                for thread in threads:
                    thread.join()
    failed = {kind: errors["count"] for kind, errors in report["errors"].items()} | {"dropped": report["num_dropped"]}
    faults += [f"{count} requests failed: {kind}" for kind, count in failed.items() if count]
    faults += outcome.faults
    return {
        "rate": rate,
        "seconds": arguments.seconds,
        "window_seconds": arguments.window,
        "changes": outcome.changes,
        "memory": judge_memory(samples, arguments.window, faults),
        "latency": judge_latency(lines, arguments.window, faults),
        "load": report,
        "faults": faults,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--knee", type=float, required=True, help="requests per second")
    parser.add_argument("--base", default="qwen2.5-coder:0.5b", help="that the adapters are for (default: %(default)s)")
    parser.add_argument("--kinds", default=",".join(targets.KINDS), help="as of targets.py (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of each reply (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=1800, help="(default: %(default)s)")
    parser.add_argument("--window", type=int, default=300, help="seconds to warm up and compare with (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the report")
    arguments = parser.parse_args()
    arguments.parser = parser
    report = soak(arguments)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    raise SystemExit(bool(report["faults"]))


if __name__ == "__main__":
    main()
