"""Sweep's next-edit client, unmodified but for the llama.cpp that it would run beside it: what it lays out and sends is
served, and a forced beginning is there."""

import sys
import types

import httpx
import pytest

from lorry_server import serving

BEFORE = "def total(prices):\n    result = 0\n    for price in prices:\n        result += price\n    return result\n\n\n"
FILE = BEFORE + "def mean(prices):\n    return total(prices) / len(pri\n"


@pytest.fixture(scope="module")
def server():
    with serving() as server:
        yield server


@pytest.fixture
def sweep(server, monkeypatch):
    # Imported, never run, as an endpoint is set.
    llama_cpp, speculative = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_speculative")
    llama_cpp.Llama = speculative.LlamaPromptLookupDecoding = object
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp)
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_speculative", speculative)
    monkeypatch.setenv("NEXT_EDIT_AUTOCOMPLETE_ENDPOINT", server.url)
    from sweep_autocomplete.autocomplete import next_edit_autocomplete

    return next_edit_autocomplete


def test_what_sweep_lays_out_is_answered(server, sweep, monkeypatch):
    answers = []
    post = sweep.get_session().post

    def recorded(*arguments, **options):
        # A base that was never taught next edits goes on to the end.
        options["json"]["max_tokens"] = 64
        response = post(*arguments, **{**options, "timeout": 60})
        answers.append((options["json"], response))
        return response

    monkeypatch.setattr(sweep.get_session(), "post", recorded)
    results = list(
        sweep.fetch_next_edits(
            file_path="prices.py", file_contents=FILE, original_file_contents=FILE, recent_changes="",
            cursor_position=len(FILE) - 1, file_chunks=[], retrieval_chunks=[], recent_user_actions=[],
            editor_diagnostics=[],
        )
    )
    assert results and answers
    for request, response in answers:
        assert response.status_code == 200, response.text
        text = response.json()["choices"][0]["text"]
        assert text.startswith(request["prefix"])
        assert "<|file_sep|>" in request["prompt"] and "<|file_sep|>" not in text


def test_a_forced_beginning_is_echoed_and_gone_on_from(server):
    def text(**body):
        reply = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 8, "temperature": 0, **body}, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["text"]

    begun = "    return a"
    assert text(prompt="def add(a, b):\n", prefix=begun) == begun + text(prompt=f"def add(a, b):\n{begun}")
