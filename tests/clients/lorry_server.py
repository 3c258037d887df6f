"""Runs the release binary for the time of a `with` block."""

import os
import re
import subprocess
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BINARY = REPOSITORY / "target" / "release" / "lorry"
FIXTURES = REPOSITORY.parent / "shared" / "fixtures"

# A model that is not in the cache yet is fetched first.
MAX_START_SECONDS = 900
MAX_STOP_SECONDS = 40


@dataclass(frozen=True)
class Server:
    url: str
    log_path: Path
    process: subprocess.Popen

    def log(self):
        return self.log_path.read_text(errors="replace")


@contextmanager
def serving(*arguments, environment={}):
    """`lorry serve ARGUMENTS` on a free port; yields when it serves, and stops it whatever happens."""
    with starting(*arguments, environment=environment) as (process, log_path):
        yield Server(wait_until_serving(process, log_path), log_path, process)


@contextmanager
def starting(*arguments, port=0, environment={}):
    """As `serving`, but its model may still be loading; on a free port for 0."""
    with tempfile.TemporaryDirectory() as folder:
        log_path = Path(folder) / "lorry.log"
        # A test that says nothing of votes leaves none in the user's own file.
        # Clients that name no temperature get the same reply every time.
        environment = {
            "LORRY__EXPERIMENTS__PATH": str(Path(folder) / "experiments.db"),
            "LORRY__GENERATION__FIM_TEMPERATURE": "0",
            **environment,
        }
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [BINARY, "serve", "--port", str(port), *map(str, arguments)],
                cwd=REPOSITORY,
                env={**os.environ, "NO_COLOR": "1", "RUST_LOG": "info", **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        try:
            yield process, log_path
        finally:
            process.terminate()
            try:
                process.wait(MAX_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def assert_node_test_passes(test, server):
    """Runs a test for Node.js, which finds the server in LORRY_URL."""
    run = subprocess.run(
        ["node", "--test", test],
        cwd=test.parent,
        env={**os.environ, "LORRY_URL": server.url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def wait_until_serving(process, log_path):
    deadline = time.monotonic() + MAX_START_SECONDS
    while time.monotonic() < deadline:
        log = log_path.read_text(errors="replace")
        if found := re.search(r"serving \S+ on (http://\S+)", log):
            return found[1]
        if process.poll() is not None:
            raise RuntimeError(f"lorry ended with {process.returncode} before it served:\n{log}")
        time.sleep(0.1)
    raise RuntimeError(f"lorry does not serve after {MAX_START_SECONDS} s:\n{log_path.read_text(errors='replace')}")
