"""The adapters of `adapters/` as they are served, against transformers and PEFT in float32."""

import json
import statistics
import urllib.request
from pathlib import Path

import pytest

from lorry_server import REPOSITORY, serving

BASE = "qwen2.5-coder:0.5b"
REFERENCE = json.loads((Path(__file__).parent / "adapter_reference.json").read_text(encoding="utf-8"))
# In nats, the mean over all positions: what 8-bit activations cost the base's own log-probabilities.
BOUND = 0.0401


@pytest.fixture(scope="module")
def server():
    with serving("--model", BASE, "--adapters", REPOSITORY / "adapters") as server:
        yield server


def served_logprobs(server, model, ids):
    fields = {"model": model, "prompt": ids, "echo": True, "max_tokens": 0, "logprobs": 1}
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_every_adapter_that_ships_has_a_reference():
    assert sorted(REFERENCE) == sorted(path.parent.name for path in REPOSITORY.glob("adapters/*/adapter_config.json"))


@pytest.mark.parametrize("name", REFERENCE)
def test_log_probabilities_are_those_of_peft(server, name):
    differences = []
    for case in REFERENCE[name]:
        served = served_logprobs(server, f"{BASE}-{name}", case["ids"])
        differences += [abs(got - wanted) for got, wanted in zip(served, case["logprobs"], strict=True)]
    print(f"{name}: mean |dlogp| {statistics.mean(differences):.4f} over {len(differences)} positions")
    assert statistics.mean(differences) <= BOUND
