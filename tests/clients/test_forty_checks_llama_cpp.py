"""Those of the forty checks in `test_forty_checks.py` that are of llama.cpp's and Mistral's routes, by their numbers."""

import json
import time

import httpx
import pytest

from lorry_server import serving

PREFIX, LINE, SUFFIX = "def add(a, b):\n", "    return ", "\n\nprint(add(1, 2))\n"
LLAMA_VIM = {
    "id_slot": 0, "input_prefix": PREFIX, "input_suffix": SUFFIX, "prompt": LINE, "n_predict": 32, "stop": [], "n_indent": 0,
    "input_extra": [{"text": "def subtract(a, b):\n    return a - b\n" * 8, "time": 1, "filename": "calculate.py"}],
    "top_k": 40, "top_p": 0.90, "samplers": ["top_k", "top_p", "infill"], "stream": False, "cache_prompt": True,
    "t_max_prompt_ms": 500, "t_max_predict_ms": 1000,
    "response_fields": ["content", "timings/prompt_n", "timings/prompt_ms", "timings/predicted_n", "truncated",
                        "tokens_cached"],
}


@pytest.fixture(scope="module")
def http():
    with serving() as server, httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def post(http, path, **body):
    reply = http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply


def test_10_an_infill_of_llama_vim_has_the_fields_it_asks_for_in_compact_json(http):
    reply = post(http, "/infill", **LLAMA_VIM)
    assert reply.text.startswith("{") and '"content":"' in reply.text
    assert set(reply.json()) == set(LLAMA_VIM["response_fields"])
    assert reply.json()["content"].startswith("a + b")


def test_11_a_warm_up_is_answered_and_leaves_its_prompt_in_the_cache(http):
    extra = [{"text": "def multiply(a, b):\n    return a * b\n" * 8, "time": 1, "filename": "multiply.py"}]
    warm_up = {**LLAMA_VIM, "input_prefix": "", "input_suffix": "", "prompt": "", "input_extra": extra, "n_predict": 0,
               "samplers": [], "temperature": 0.0, "t_max_predict_ms": 1, "response_fields": [""]}
    assert post(http, "/infill", **warm_up).json() == {}
    assert post(http, "/infill", **{**LLAMA_VIM, "input_extra": extra}).json()["tokens_cached"] > 64


def test_12_time_and_indentation_end_an_output(http):
    endless = {"input_prefix": "numbers = [\n    1,\n", "input_suffix": "", "n_predict": 2000, "temperature": 0}
    began = time.monotonic()
    reply = post(http, "/infill", **endless, ignore_eos=True, t_max_predict_ms=250).json()
    assert reply["stop_type"] == "limit" and "\n" in reply["content"] and reply["tokens_predicted"] < 2000
    assert reply["timings"]["predicted_ms"] < 5000 and time.monotonic() - began < 20
    block = {"input_prefix": "def total(numbers):\n", "prompt": "    ", "input_suffix": "", "n_predict": 120,
             "temperature": 0}
    content = post(http, "/infill", **block, n_indent=4).json()["content"]
    assert content and all(line.startswith("    ") for line in content.split("\n")[1:] if line.strip())


def test_27_mistrals_route_has_a_string_in_every_chunk(http):
    body = {"model": "", "prompt": PREFIX + LINE, "suffix": SUFFIX, "max_tokens": 16, "temperature": 0}
    whole = post(http, "/v1/fim/completions", **body).json()["choices"][0]["message"]["content"]
    events = post(http, "/v1/fim/completions", **body, stream=True).text.split("\n\n")
    data = [event.removeprefix("data: ") for event in events if event]
    choices = [json.loads(chunk)["choices"][0] for chunk in data[:-1]]
    assert data[-1] == "[DONE]" and choices[-1]["finish_reason"]
    assert "".join(choice["delta"]["content"] for choice in choices) == whole and whole.startswith("a + b")


def test_31_tokens_and_templates_are_those_of_the_requests(http):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    chat = {"messages": [{"role": "user", "content": "naïve <|im_end|> 日本 🎉"}], "tools": [tool]}
    prompt = post(http, "/apply-template", **chat).json()["prompt"]
    assert prompt.startswith("<|im_start|>system") and '"name": "look"' in prompt and "🎉<|im_end|>" in prompt
    counted = post(http, "/v1/chat/completions", **chat, max_tokens=1).json()["usage"]["prompt_tokens"]
    assert post(http, "/tokenize", messages=chat["messages"], tools=chat["tools"]).json()["count"] == counted
    for text in (PREFIX + LINE, "日本語 🎉", "a<|im_end|>b"):
        tokens = post(http, "/tokenize", content=text, add_special=False, parse_special=True).json()["tokens"]
        assert post(http, "/detokenize", tokens=tokens).json()["content"] == text
        assert len(tokens) == post(http, "/v1/completions", prompt=text, max_tokens=1).json()["usage"]["prompt_tokens"]
        assert post(http, "/tokenize", model="", prompt=text).json()["count"] == len(tokens)
    props = http.get("/props").json()
    meta = http.get("/v1/models").json()["data"][0]["meta"]
    assert props["default_generation_settings"]["n_ctx"] == meta["n_ctx"]
    assert "im_start" in props["chat_template"] and props["chat_template_caps"]["supports_tools"]


def test_32_a_completion_ends_in_its_timings(http):
    for length in ("n_predict", "max_tokens"):
        text = post(http, "/completion", prompt=PREFIX, temperature=0, stream=True, **{length: 8}).text
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]
        assert all(isinstance(event["content"], str) for event in events)
        assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
        assert events[-1]["timings"]["predicted_n"] == events[-1]["tokens_predicted"] <= 8
