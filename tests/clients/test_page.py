"""The page of the real server in a real browser: those of the tests in `tests/page` that need no made-up models."""

import os
import subprocess

import pytest

from lorry_server import REPOSITORY, serving

PAGE = REPOSITORY / "tests" / "page"


@pytest.fixture(scope="module")
def server():
    with serving("--adapters", REPOSITORY / "adapters") as server:
        yield server


@pytest.mark.parametrize("test", sorted(PAGE.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_page_works_with_the_real_server(server, test):
    environment = {**os.environ, "LORRY_URL": server.url}
    run = subprocess.run(["node", "--test", test], cwd=PAGE, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
