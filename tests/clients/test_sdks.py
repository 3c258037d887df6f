"""The libraries and agents that clients are made of, in JavaScript, unmodified, against the default base."""

import os
import subprocess

import pytest

from lorry_server import REPOSITORY, serving

SDKS = REPOSITORY / "tests" / "sdks"


@pytest.fixture(scope="module")
def server():
    with serving("--adapters", REPOSITORY / "adapters") as server:
        yield server


@pytest.mark.parametrize("test", sorted(SDKS.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_client_works_unmodified(server, test):
    environment = {**os.environ, "LORRY_URL": server.url}
    run = subprocess.run(
        ["node", "--test", test], cwd=SDKS, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
