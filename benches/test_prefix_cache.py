"""prefix_cache.py with short prompts, against the real server: what was found in the cache, and no figure of time."""

import json
import subprocess
import sys
from pathlib import Path

PREFIX_CACHE = Path(__file__).parent / "prefix_cache.py"


def test_a_quick_round_finds_in_the_cache_what_was_computed_before_a_restart_too():
    run = subprocess.run([sys.executable, PREFIX_CACHE, "--quick"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert all(seconds > 0 for seconds in report["seconds"].values())
    found = report["prompt_and_cached_tokens"]
    assert list(found) == ["cold", "again", "at_once", "restarted"]
    assert found["cold"][0][1] < 16
    for name in ["again", "at_once", "restarted"]:
        [(num_tokens, num_cached)] = found[name]
        # Whole blocks come from the disk.
        assert num_tokens - 16 - 1 <= num_cached < num_tokens, name
