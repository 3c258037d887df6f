"""Beam search against transformers' own, and what it costs."""

import json
import re
import urllib.request
from pathlib import Path

import pytest

from lorry_server import serving

REFERENCE = json.loads((Path(__file__).parent / "beam_reference.json").read_text())
NUM_BEAMS, MAX_TOKENS = REFERENCE["num_beams"], REFERENCE["max_tokens"]


@pytest.fixture(scope="module")
def server():
    with serving("--model", "smollm2:135m", "--adapters", "") as server:
        yield server


def complete(server, **fields):
    request = urllib.request.Request(f"{server.url}/v1/completions", json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=300) as reply:
        return json.load(reply)


def computed_tokens(server):
    """Prompt tokens that went through the model since the start."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=60) as reply:
        metrics = reply.read().decode()
    count = lambda name: float(re.search(rf"^vllm:{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)[1])
    return count("prompt_tokens") - count("prefix_cache_hits")


@pytest.mark.parametrize("case", REFERENCE["cases"], ids=range(len(REFERENCE["cases"])))
def test_the_beams_are_those_of_transformers(server, case):
    reply = complete(server, prompt=case["prompt"], max_tokens=MAX_TOKENS, n=NUM_BEAMS, use_beam_search=True)
    texts = [choice["text"] for choice in reply["choices"]]
    # The base computes with 8-bit activations: scores move a little, and close beams change places.
    assert case["texts"][0] in texts[:2]
    assert len(set(texts) & set(case["texts"])) >= 7
    scores = [choice["score"] for choice in reply["choices"]]
    assert scores == sorted(scores, reverse=True)
    assert scores == pytest.approx(case["scores"], abs=0.06)


def test_one_beam_is_greedy(server):
    prompt = {"prompt": "def fibonacci(n):\n    ", "max_tokens": 16, "temperature": 0}
    assert complete(server, use_beam_search=True, **prompt)["choices"][0]["text"] == (
        complete(server, **prompt)["choices"][0]["text"]
    )


def test_a_step_computes_one_row_for_each_beam(server):
    prompt = list(range(1000, 1200))
    before = computed_tokens(server)
    complete(server, prompt=prompt, max_tokens=MAX_TOKENS, n=NUM_BEAMS, use_beam_search=True, ignore_eos=True)
    computed = computed_tokens(server) - before
    assert len(prompt) + NUM_BEAMS < computed <= len(prompt) + NUM_BEAMS * (MAX_TOKENS - 1)
