"""A real Neovim with what llama.vim and minuet send, and as they read the replies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorry_server import serving

NEOVIM = Path(sys.executable).with_name("nvim")
SCRIPT = Path(__file__).with_name("neovim_completions.lua")


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.mark.parametrize("plugin", ["llama.vim", "minuet"])
def test_a_completion_arrives_in_the_buffer(server, plugin):
    run = subprocess.run(
        [NEOVIM, "--clean", "--headless", "-l", SCRIPT, plugin],
        env={**os.environ, "LORRY_URL": server.url}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("def add(a, b):\n    return a + b")
    assert run.stdout.endswith("print(add(1, 2))\n")
