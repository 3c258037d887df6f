"""hostile.py with less of everything, against the real server: what its clients are told, and no figure of time."""

import json
import subprocess
import sys
from pathlib import Path

HOSTILE = Path(__file__).parent / "hostile.py"


def test_a_quick_round_is_refused_by_name_and_the_server_survives_it():
    run = subprocess.run([sys.executable, HOSTILE, "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    machine, *attacks = map(json.loads, run.stdout.splitlines())
    assert "cores" in machine["processor"]
    told = {attack["attack"]: attack["told"] for attack in attacks}
    assert told["nothing"] == {} and told["many_stops"] == {"400 stop": 1}
    assert told["half_open"] == {"closed": 50, "408 request_timeout": 50}
    assert sum(told["large_prompts"].values()) == 24
    for attack in attacks:
        assert attack["probes"] > 0 and not attack["failed"]
        assert 0 < attack["rss_mib"]["before"] <= attack["rss_mib"]["peak"]
