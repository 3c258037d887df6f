"""What a lorry with its default limits does under clients that are slow or hostile: half-open requests, very large prompts,
very many stops. Meanwhile a process of its own asks /health every 10 ms on a new connection.

    python3 benches/hostile.py            all of it, in about two minutes
    python3 benches/hostile.py --quick    less of everything, in seconds

One line of JSON for each attack, the first of which is none: how long /health took, what the clients were told, and the server's resident memory before,
at its most, and after. Ends with 1 where a probe failed or something was not refused as it should be.
"""

import argparse
import asyncio
import collections
import itertools
import json
import multiprocessing
import os
import platform
import re
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LORRY = Path(__file__).resolve().parents[1] / "target" / "release" / "lorry"
HOST = "127.0.0.1"
PROBE_SECONDS = 0.01
# A probe that takes longer has failed.
MAX_PROBE_SECONDS = 5
START_SECONDS = 900
# Between attacks, for memory to be given back.
REST_SECONDS = 2
MIB = 1 << 20
# The clients are other machines: they should not take the processor from the server.
NICENESS = 10


@dataclass(frozen=True)
class Size:
    idle_seconds: int
    half_open: int
    large_prompts: int
    rounds: int
    prompt_bytes: int
    stops: int
    # Of the server; `None` leaves its default.
    body_seconds: int | None


FULL = Size(idle_seconds=10, half_open=2000, large_prompts=64, rounds=4, prompt_bytes=16 * MIB, stops=100_000, body_seconds=None)
QUICK = Size(idle_seconds=1, half_open=100, large_prompts=12, rounds=2, prompt_bytes=16 * MIB, stops=100_000, body_seconds=3)


@dataclass(frozen=True)
class Server:
    port: int
    pid: int

    def memory(self, name: str) -> float:
        """`VmRSS`, resident now, or `VmHWM`, resident at most since `forget_peak`; in MiB."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return round(int(re.search(rf"{name}:\s*(\d+) kB", status)[1]) / 1024, 1)

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextmanager
def serving(lorry: Path, model: str, settings: dict[str, str]):
    """A server without adapters; `settings` are environment variables."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        environment = {**os.environ, "NO_COLOR": "1", "LORRY__EXPERIMENTS__PATH": str(Path(folder) / "experiments.db"), **settings}
        with log.open("wb") as output:
            command = [lorry, "serve", "--model", model, "--adapters", "", "--host", HOST, "--port", "0"]
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (found := re.search(r"serving \S+ on http://\S+:(\d+)", log.read_text(errors="replace"))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{lorry} does not serve:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.1)
            yield Server(int(found[1]), process.pid)
        finally:
            process.terminate()
            process.wait()


def probe(port: int) -> None:
    """Raises `OSError` where /health does not answer that all is well."""
    with socket.create_connection((HOST, port), MAX_PROBE_SECONDS) as stream:
        stream.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        reply = b""
        while more := stream.recv(4096):
            reply += more
    if not reply.startswith(b"HTTP/1.1 200 "):
        raise OSError(f"/health answers {reply[:200]!r}")


def probe_until(stopped, begun, port: int, sender) -> None:
    """Sends (seconds, error, seconds slept too long) of all probes, from the one that sets `begun` on."""
    results = []
    while not stopped.is_set():
        start = time.monotonic()
        error = None
        try:
            probe(port)
        except OSError as caught:
            error = str(caught) or type(caught).__name__
        end = time.monotonic()
        pause = max(0.0, PROBE_SECONDS - (end - start))
        time.sleep(pause)
        results.append((end - start, error, time.monotonic() - end - pause))
        begun.set()
    sender.send(results)


@contextmanager
def probing(port: int):
    """Yields a list that has the results when the block has ended."""
    stopped, begun = multiprocessing.Event(), multiprocessing.Event()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    prober = multiprocessing.Process(target=probe_until, args=(stopped, begun, port, sender))
    prober.start()
    results = []
    try:
        begun.wait()
        yield results
    finally:
        stopped.set()
        results += receiver.recv()
        prober.join()


def post(path: str, length: int) -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n".encode()


async def send(port: int, *parts: bytes) -> str:
    """What the server says to this: a status with its code, or how it closes."""
    try:
        reader, writer = await asyncio.open_connection(HOST, port)
    except OSError as error:
        return f"no connection: {error.strerror}"
    reply = b""
    try:
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
        except OSError:
            # It may have been answered nevertheless.
            pass
        while more := await reader.read(65536):
            reply += more
    except OSError:
        pass
    finally:
        writer.close()
    if not reply:
        return "closed"
    head, _, body = reply.partition(b"\r\n\r\n")
    error = json.loads(body).get("error", {}) if body.startswith(b"{") else {}
    return " ".join(filter(None, [head.split()[1].decode(), error.get("code") or error.get("param")]))


async def nothing(port: int, size: Size) -> list[str]:
    """What the others are measured against: the machine has other things to do as well."""
    await asyncio.sleep(size.idle_seconds)
    return []


async def half_open(port: int, size: Size) -> list[str]:
    cut_header = b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-more"
    cut_body = post("/v1/completions", 1000) + b'{"prompt": "def'
    requests = [send(port, cut_header if index % 2 else cut_body) for index in range(size.half_open)]
    return await asyncio.gather(*requests)


async def large_prompts(port: int, size: Size) -> list[str]:
    head, tail = b'{"max_tokens": 1, "prompt": "', b'"}'
    body = head + b"def f(x): " * (size.prompt_bytes // 10)
    body = body[: size.prompt_bytes - len(tail)] + tail
    request = (post("/v1/completions", len(body)), body)
    rounds = [await asyncio.gather(*(send(port, *request) for _ in range(size.large_prompts))) for _ in range(size.rounds)]
    return list(itertools.chain.from_iterable(rounds))


async def many_stops(port: int, size: Size) -> list[str]:
    stops = [f"stop {index}" for index in range(size.stops)]
    body = json.dumps({"prompt": "def f(x):", "max_tokens": 1, "stop": stops}).encode()
    return [await send(port, post("/v1/completions", len(body)), body)]


# Each with what its clients may be told.
ATTACKS = {
    nothing: set(),
    half_open: {"closed", "408 request_timeout", "503 overloaded"},
    large_prompts: {"400 context_length_exceeded", "503 overloaded"},
    many_stops: {"400 stop"},
}


def attack_from_afar(attack, port: int, size: Size, told) -> None:
    os.nice(NICENESS)
    told.send(asyncio.run(attack(port, size)))


def run(attack, server: Server, size: Size) -> dict:
    """The attack from a process of its own, and what came of it."""
    server.forget_peak()
    before = server.memory("VmRSS")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    attacker = multiprocessing.Process(target=attack_from_afar, args=(attack, server.port, size, sender))
    with probing(server.port) as probes:
        begun = time.monotonic()
        attacker.start()
        told = receiver.recv()
        seconds = time.monotonic() - begun
        attacker.join()
        time.sleep(REST_SECONDS)
    taken, overslept = ([1000 * result[index] for result in probes] for index in (0, 2))
    return {
        "attack": attack.__name__,
        "seconds": round(seconds, 1),
        "told": dict(collections.Counter(told)),
        "probes": len(probes),
        "failed": [error for _, error, _ in probes if error],
        "health_ms": {
            "p50": round(statistics.median(taken), 1),
            "p99": round(statistics.quantiles(taken, n=100)[98], 1),
            "max": round(max(taken), 1),
        },
        # How long the prober itself had to wait for a processor: no server is quicker.
        "overslept_ms": {"p99": round(statistics.quantiles(overslept, n=100)[98], 1), "max": round(max(overslept), 1)},
        "rss_mib": {"before": before, "peak": server.memory("VmHWM"), "after": server.memory("VmRSS")},
    }


def allow_open_files() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536) if most > 0 else 65536, most))


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lorry", type=Path, default=LORRY, help="the binary")
    parser.add_argument("--model", default="smollm2:135m", help="what is served")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    allow_open_files()
    is_as_it_should_be = True
    settings = {"LORRY__SERVER__BODY_TIMEOUT_SECONDS": str(size.body_seconds)} if size.body_seconds else {}
    with serving(arguments.lorry, arguments.model, settings) as server:
        print(json.dumps({"processor": processor(), "model": arguments.model}))
        for attack, expected in ATTACKS.items():
            report = run(attack, server, size)
            print(json.dumps(report), flush=True)
            is_as_it_should_be &= not report["failed"] and report["told"].keys() <= expected
        # It has survived.
        body = json.dumps({"prompt": "def f(x):", "max_tokens": 1}).encode()
        urllib.request.urlopen(f"http://{HOST}:{server.port}/v1/completions", body).read()
    return 0 if is_as_it_should_be else 1


if __name__ == "__main__":
    sys.exit(main())
