"""compare.py as far as it comes without peers: a quick round on the smallest base, with another lorry as the other server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import servers

PEERS = Path(__file__).parent
ROOT = PEERS.parents[1]
MODEL = "smollm2:135m"
GGUF = Path(os.environ.get("LORRY_HOME", "~/.cache/lorry")).expanduser() / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_quick_round_fills_the_table(tmp_path):
    reference = tmp_path / "reference.json"
    positions = [{"pos": 0, "target_logprob": -3.0}, {"pos": 1, "target_logprob": -4.0}]
    reference.write_text(json.dumps({"cases": [{"ids": [504, 2262, 314], "positions": positions}]}))
    small = ["--adapters", "2", "--rank", "4", "--clients", "2", "--prompt-words", "8"]
    lorry = ROOT / "target" / "release" / "lorry"
    with servers.Lorry(lorry, MODEL).serve(None) as other:
        command = [sys.executable, PEERS / "compare.py", "--quick", "--lorry", lorry, "--model", MODEL, "--gguf", GGUF, *small]
        command += ["--openai-url", other.url, "--openai-models", MODEL, "--reference", reference]
        run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in run.stdout.splitlines() if line.startswith("|")]
    figures = {cells[0]: cells[1:] for cells in table}
    assert figures.pop("work") == ["lorry", "share of the limit", "other", "ratio"]
    own_base = {work: figures.pop(work) for work in list(figures) if " / " in work}
    assert len(own_base) == 3 and all(float(lorry) > 0 and llama == "–" for lorry, llama in own_base.values())
    rows = {work: cells for work, cells in figures.items() if len(cells) == 4 and not work.startswith("---")}
    assert len(rows) == 12 and all(float(cells[0]) > 0 for cells in rows.values()), run.stdout
    compared = [work for work, cells in rows.items() if cells[2:] != ["–", "–"]]
    assert [work for work, cells in rows.items() if cells[1] != "–"] == [work for work in rows if work.startswith(("prefill", "decode"))]
    assert compared == ["2 clients, no adapter, tok/s", "2 clients, no adapter, TTFT p50, s"]
    assert "mean absolute difference" in run.stdout
