"""constrained.py on the smallest base, with little to do; and what it takes for right."""

import json
import subprocess
import sys
from pathlib import Path

import constrained
import servers

PEERS = Path(__file__).parent
LORRY = PEERS.parents[1] / "target" / "release" / "lorry"


def test_every_reply_that_ends_is_right():
    with servers.Lorry(LORRY, "smollm2:135m").serve(None) as server:
        little = ["--clients", "4", "--rounds", "1", "--seconds", "1", "--replies", "12"]
        command = [sys.executable, PEERS / "constrained.py", "--url", server.url, *little]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["replies"] == 12 and result["ended"] > 0 and result["wrong"] == []
    assert result["ratio"] > 0 and len(result["free_tok_s"]) == len(result["half_constrained_tok_s"]) == 1


def test_what_is_wrong_is_told_from_what_is_right():
    right = [
        '{"name": "f", "arity": 2, "kind": null}',
        '{"functions": [{"name": "f", "arity": 0, "kind": "method"}]}',
        "2026-11-26",
        "(1 + 2 = 3) + 4 = 7",
    ]
    wrong = ['{"name": "f", "arity": 12, "kind": null}', '{"functions": []}', "2026-13-26", "(1 + 2) + 4 = 7"]
    for (_, is_right), good, bad in zip(constrained.CONSTRAINTS, right, wrong, strict=True):
        assert is_right(good) and not is_right(bad)
