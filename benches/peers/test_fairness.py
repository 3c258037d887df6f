"""fairness.py on the smallest base, for a few seconds."""

import json
import subprocess
import sys

from test_compare import GGUF, MODEL, PEERS, ROOT


def test_every_load_is_served_alone_and_crowded():
    little = ["--model", MODEL, "--gguf", GGUF, "--rounds", "1", "--seconds", "4"]
    command = [sys.executable, PEERS / "fairness.py", "--lorry", ROOT / "target" / "release" / "lorry", *little]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = json.loads(run.stdout)
    for load in ("completions beside chats", "quiet adapters beside a flood"):
        assert all(figures[load][kind]["requests"] > 1 for kind in ("alone", "beside")), figures
    assert figures["weights 3 and 1"]["ratio"] > 0, figures
