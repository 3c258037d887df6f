"""lorry and its peers as processes: servers on the loopback, and benchmarks that print their own figures."""

import contextlib
import json
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import adapters

START_SECONDS = 300


@dataclass
class Server:
    url: str
    # What a request is given to reach the base, and each adapter.
    base: dict
    adapters: list[dict]


@dataclass
class Lorry:
    binary: Path
    model: str

    @contextlib.contextmanager
    def serve(self, root: Path | None, config: Path | None = None) -> Iterator[Server]:
        """Serves the PEFT folders of `root`."""
        with _folder(root) as folder:
            command = [self.binary, "serve", "--model", self.model, "--adapters", folder]
            command += ["--config", config] if config else []
            with _running(command) as url:
                yield Server(url, {"model": self.model}, [{"model": path.name} for path in adapters.folders(folder)])

    def bench(self, prompt_tokens: int, max_tokens: int, batch: int, repeat: int) -> dict[str, float]:
        """Medians of the figures of `lorry bench`, without adapters."""
        with _folder(None) as folder:
            command = [self.binary, "bench", "--model", self.model, "--adapters", folder]
            for option, value in [
                ("--prompt-tokens", prompt_tokens),
                ("--max-tokens", max_tokens),
                ("--batch", batch),
                ("--repeat", repeat),
            ]:
                command += [option, str(value)]
            lines = [json.loads(line) for line in _output(command).splitlines()]
        # The first line may be what the machine can do at most.
        reports = [line for line in lines if "batch" in line]
        figures = [name for name, value in reports[0].items() if isinstance(value, float)]
        return {name: statistics.median(report[name] for report in reports) for name in figures}


@dataclass
class LlamaCpp:
    gguf: Path
    server: Path
    bench: Path | None
    batched_bench: Path | None
    threads: int

    @contextlib.contextmanager
    def serve(self, files: list[Path], num_slots: int, slot_tokens: int) -> Iterator[Server]:
        """Serves adapters in GGUF, all loaded and none applied unless a request asks for it."""
        command = [self.server, "--model", self.gguf, "--threads", str(self.threads)]
        command += ["--parallel", str(num_slots), "--ctx-size", str(num_slots * slot_tokens)]
        if files:
            command += ["--lora", ",".join(map(str, files)), "--lora-init-without-apply"]
        with _running(command) as url:
            base = {"model": "base", "cache_prompt": False}
            yield Server(url, base, [{**base, "lora": [{"id": i, "scale": 1.0}]} for i in range(len(files))])

    def sequence(self, prompt_tokens: int, max_tokens: int, depth: int, repeat: int) -> float:
        """Median rate of one sequence: of its prompt, or of tokens generated after `depth` others."""
        command = [self.bench, "--model", self.gguf, "--threads", str(self.threads), "--output", "json"]
        command += ["-p", str(prompt_tokens), "-n", str(max_tokens), "-d", str(depth), "-r", str(repeat)]
        return statistics.median(json.loads(_output(command))[0]["samples_ts"])

    def batch(self, prompt_tokens: int, max_tokens: int, num_sequences: int, repeat: int) -> float:
        """Median rate at which `num_sequences` generate together."""
        command = [self.batched_bench, "--model", self.gguf, "--threads", str(self.threads)]
        command += ["--ctx-size", str(num_sequences * (prompt_tokens + max_tokens)), "--output-format", "jsonl"]
        command += ["-npp", str(prompt_tokens), "-ntg", str(max_tokens), "-npl", str(num_sequences)]
        rates = []
        for _ in range(repeat):
            lines = [line for line in _output(command).splitlines() if line.startswith("{")]
            rates.append(json.loads(lines[-1])["speed_tg"])
        return statistics.median(rates)

    def version(self) -> str:
        shown = subprocess.run([self.server, "--version"], capture_output=True, text=True, check=True)
        return (shown.stdout + shown.stderr).splitlines()[0].removeprefix("version:").strip()


def _output(command: list) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


@contextlib.contextmanager
def _folder(path: Path | None) -> Iterator[Path]:
    """`path`, or an empty folder for the time of use."""
    if path:
        yield path
    else:
        with tempfile.TemporaryDirectory() as empty:
            yield Path(empty)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def _running(command: list) -> Iterator[str]:
    """The URL of a server that answers `/health`; it ends with the block."""
    port = _free_port()
    command, url = [*command, "--host", "127.0.0.1", "--port", str(port)], f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    text = log.read().decode(errors="replace")
                    raise SystemExit(f"{' '.join(map(str, command))} does not serve:\n{text[-2000:]}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False
