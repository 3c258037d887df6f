"""Forty things that editors, SDKs and agents rely on, each one call or a pair, over plain HTTP; named by their numbers in
the list of what clients send and read. Those of llama.cpp's and Mistral's routes are in
`test_forty_checks_llama_cpp.py`."""

import json
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from lorry_server import MAX_START_SECONDS, serving, starting

BASE = "qwen2.5-coder:0.5b"
ADAPTER = f"{BASE}-conala"
INTENT = [{"role": "user", "content": "check if all elements in list `mylist` are the same"}]
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=300) as client:
        yield client


def complete(http, path="/v1/completions", **body):
    reply = http.post(path, json={"model": BASE, "max_tokens": 16, "temperature": 0, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(http, **body):
    return complete(http, **body)["choices"][0]["text"]


def chat(http, **body):
    return complete(http, "/v1/chat/completions", **{"messages": INTENT, **body})


def events(http, path, **body):
    """The data of each event, and the seconds from sending until it came; and the seconds until the body ended."""
    seen, began = [], time.monotonic()
    with http.stream("POST", path, json={"model": BASE, "temperature": 0, "stream": True, **body}) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert "content-encoding" not in reply.headers
        for line in filter(None, reply.iter_lines()):
            assert line.startswith("data: "), line
            seen.append((line.removeprefix("data: "), time.monotonic() - began))
    return seen, time.monotonic() - began


def chunks(http, path="/v1/completions", **body):
    seen, _ = events(http, path, **body)
    assert seen[-1][0] == "[DONE]"
    return [json.loads(data) for data, _ in seen[:-1]]


def metric(http, name, labels=""):
    found = re.search(rf"^{name}{re.escape(labels)} (\S+)$", http.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def assert_error(reply, status, param=None, code=None):
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert error["message"] and {"type", "param", "code"} <= error.keys()
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    return error


def test_01_a_completion_as_zed_reads_it(http):
    reply = http.post("/v1/completions", json={"model": BASE, "prompt": PREFIX, "max_tokens": 8, "stop": ["\n\n"]}).json()
    assert isinstance(reply["id"], str) and isinstance(reply["created"], int) and reply["object"] == "text_completion"
    assert reply["model"] == BASE and reply["choices"][0]["finish_reason"] in ("stop", "length")
    assert isinstance(reply["choices"][0]["text"], str)
    usage = reply["usage"]
    assert usage["prompt_tokens"] + usage["completion_tokens"] == usage["total_tokens"]


def test_02_a_stream_says_what_the_plain_reply_says_and_ends_after_done(http):
    seen, ended = events(http, "/v1/completions", prompt=PREFIX, max_tokens=24)
    parsed = [json.loads(data) for data, _ in seen[:-1]]
    assert "".join(chunk["choices"][0]["text"] for chunk in parsed) == text_of(http, prompt=PREFIX, max_tokens=24)
    assert parsed[-1]["choices"][0]["finish_reason"] and seen[-1][0] == "[DONE]"
    assert ended >= seen[-1][1]


def test_03_each_token_is_sent_as_it_comes(http):
    seen, ended = events(http, "/v1/completions", prompt="def fibonacci(n):\n", max_tokens=64)
    assert len(seen) > 32
    assert seen[0][1] < ended / 2


def test_04_a_suffix_is_filled_up_to_as_in_a_prompt_laid_out_by_the_client(http):
    filled = text_of(http, prompt=PREFIX, suffix=SUFFIX)
    assert filled.startswith("a + b")
    laid_out = f"<|fim_prefix|>{PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
    assert text_of(http, prompt=laid_out) == filled


def test_05_a_closed_connection_cancels(http):
    cancelled = '{adapter="base",finish_reason="cancelled"}'
    before = metric(http, "lorry_requests_total", cancelled)
    with http.stream("POST", "/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 4000, "stream": True,
                                                      "ignore_eos": True}) as reply:
        next(reply.iter_lines())
    until(lambda: sum_of(http, "vllm:num_requests_running") == 0)
    until(lambda: metric(http, "lorry_requests_total", cancelled) == before + 1)


def test_06_stops_are_exact_and_never_seen_in_part(http):
    whole = text_of(http, prompt="def fibonacci(n):\n", max_tokens=64)
    # Across tokens, whatever those are.
    stop = whole[20:29]
    stops = [f"never {number}" for number in range(11)] + [stop]
    reply = complete(http, prompt="def fibonacci(n):\n", max_tokens=64, stop=stops)["choices"][0]
    expected = whole[: whole.index(stop)]
    assert (reply["text"], reply["finish_reason"]) == (expected, "stop")
    streamed = chunks(http, prompt="def fibonacci(n):\n", max_tokens=64, stop=stops)
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == expected


def test_07_no_sentinel_leaks(http):
    def fill(number):
        return text_of(http, prompt=f"def f{number}(x):\n    y = x + {number}\n    return ", suffix="\n", max_tokens=24)

    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(fill, range(50)))
    assert not [text for text in texts if re.search(r"<\|\w+\|>|<EOT>", text)]


@pytest.mark.parametrize("headers", [
    {"Authorization": ""}, {"Authorization": "Bearer x"}, {"api-key": "x"}, {"x-api-key": "x"},
    {"Accept": "application/json"}, {"Content-Type": "text/plain"},
])
def test_08_what_is_known_of_no_server_is_taken_lightly(http, headers):
    body = {"model": BASE, "prompt": "a", "max_tokens": 1, "stream": True, "user": None, "x_of_a_client": {"a": 1}}
    reply = http.post("/v1/completions", content=json.dumps(body), headers=headers)
    assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n")


def test_09_a_prompt_with_one_character_more_is_found_in_the_cache(http):
    prompt = "".join(f"def add_{number}(x):\n    return x + {number}\n\n" for number in range(60))
    complete(http, prompt=prompt, max_tokens=1)
    usage = complete(http, prompt=f"{prompt}d", max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 2


def test_13_a_streamed_chat_begins_with_its_role(http):
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi."}]},
    ]
    parsed = chunks(http, "/v1/chat/completions", messages=messages, max_tokens=8)
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant" and parsed[0]["choices"][0]["delta"]["content"]
    last = parsed[-1]["choices"][0]
    assert last["delta"] == {} and last["finish_reason"] in ("stop", "length")


def test_14_usage_comes_last_where_it_is_asked_for(http):
    *parsed, last = chunks(http, prompt="a", max_tokens=4, stream_options={"include_usage": True})
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in parsed)
    refused = http.post("/v1/completions", json={"prompt": "a", "stream_options": {"include_usage": True}})
    assert_error(refused, 400, "stream_options")


def test_15_the_base_and_every_adapter_are_listed_with_what_clients_look_for(http):
    cards = http.get("/v1/models").json()["data"]
    assert cards[0]["id"] == BASE and len(cards) > 1
    for card in cards:
        assert card["owned_by"] and card["max_model_len"] == card["context_length"] == card["meta"]["n_ctx"]
        assert card["meta"]["n_ctx_train"] >= card["meta"]["n_ctx"] > 0 and "status" not in card
        assert http.get(f"/v1/models/{card['id']}").json()["id"] == card["id"]
    assert_error(http.get("/v1/models/no/such"), 404)



def test_16_a_server_whose_model_is_loading_says_so_until_it_serves():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    seen, deadline = [], time.monotonic() + MAX_START_SECONDS
    with starting(port=port) as (process, _), httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        while 200 not in seen and time.monotonic() < deadline:
            assert process.poll() is None
            try:
                reply = client.get("/health")
            except httpx.ConnectError:
                continue
            if reply.status_code == 503:
                assert reply.json()["error"]["message"] == "Loading model"
            seen.append(reply.status_code)
    assert seen[0] == 503 and seen[-1] == 200


@pytest.mark.parametrize("method, path, content, status, param", [
    ("POST", "/v1/completions", "{", 400, None),
    ("POST", "/v1/completions", '{"prompt": "a", "max_tokens": "many"}', 400, "max_tokens"),
    ("POST", "/v1/completions", '{"prompt": "a", "model": "none"}', 404, "model"),
    ("POST", "/v1/chat/completions", '{"model": ""}', 400, "messages"),
    ("GET", "/v1/nothing", None, 404, None),
    ("GET", "/v1/completions", None, 405, None),
])
def test_17_every_error_has_one_shape(http, method, path, content, status, param):
    assert_error(http.request(method, path, content=content), status, param)


def test_17_a_body_too_large_has_it_too(http):
    assert_error(http.post("/v1/completions", content=b" " * (40 << 20)), 413)


def test_18_a_prompt_beyond_the_context_is_refused_at_once_and_a_gap_is_cut(http):
    text = "x = 1\n" * 40_000
    began = time.monotonic()
    error = assert_error(http.post("/v1/completions", json={"prompt": text}), 400, code="context_length_exceeded")
    assert error["n_prompt_tokens"] > error["n_ctx"] > 0
    assert time.monotonic() - began < 5


def test_19_characters_come_whole(http):
    prompt = "Repeat: 日本語 🎉🚀 naïve café\nRepeat: 日本語 🎉🚀 naïve café\nRepeat:"
    for chunk in chunks(http, prompt=prompt, max_tokens=24):
        assert "\ufffd" not in chunk["choices"][0]["text"]


def test_20_completions_and_long_chats_go_side_by_side(http):
    long = [{"role": "user", "content": "Explain this code:\n" + "x = x + 1\n" * 300}]

    def fill(number):
        return text_of(http, prompt=f"def f{number}(x):\n    return x + ", suffix="\n", max_tokens=8)

    with ThreadPoolExecutor(36) as pool:
        chats = [pool.submit(chat, http, messages=long, max_tokens=16) for _ in range(4)]
        fills = [pool.submit(fill, number) for number in range(32)]
        until(lambda: sum_of(http, "vllm:num_requests_running") > 1, seconds=30)
        assert all(len(future.result()["choices"]) == 1 for future in chats)
        assert len([future.result() for future in fills]) == 32


def test_21_a_full_server_says_when_to_come_again():
    with serving("--model", "smollm2:135m", environment={"LORRY__ENGINE__MAX_QUEUED": "1"}) as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            body = {"prompt": "a", "max_tokens": 2000, "stream": True, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body) as first:
                # Dropping the iterator would close the connection, and the place would be free.
                lines = first.iter_lines()
                next(lines)
                began = time.monotonic()
                refused = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
                assert time.monotonic() - began < 1
                assert_error(refused, 503)
                assert int(refused.headers["retry-after"]) >= 1
            until(lambda: http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code == 200)


def test_22_an_adapter_is_a_model_alone_and_beside_others(http):
    def answer(model):
        return chat(http, model=model, max_tokens=24)["choices"][0]["message"]["content"]

    alone = [answer(ADAPTER), answer(BASE)]
    assert alone[0] != alone[1]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, [ADAPTER, BASE] * 4)) == alone * 4
    unknown = http.post("/v1/completions", json={"model": "no-such-adapter", "prompt": "a"})
    assert_error(unknown, 404, "model", "model_not_found")


def test_23_an_adapter_is_a_field_in_other_servers_words(http):
    conala = next(adapter["id"] for adapter in http.get("/lora-adapters").json() if adapter["name"] == "conala")
    by_model = chat(http, model=ADAPTER, max_tokens=24)["choices"]
    by_id = chat(http, lora=[{"id": conala, "scale": 1.0}], max_tokens=24)["choices"]
    by_name = chat(http, adapter="conala", max_tokens=24)["choices"]
    assert by_model == by_id == by_name
    of_nothing = chat(http, lora=[{"id": conala, "scale": 0.0}], max_tokens=24)["choices"]
    assert of_nothing == chat(http, max_tokens=24)["choices"]


def test_24_a_seed_gives_the_same_alone_and_in_a_batch(http):
    def draw(_):
        return complete(http, prompt="def f", temperature=1.0, seed=7)

    alone = draw(0)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(draw, range(8)))
    assert {reply["choices"][0]["text"] for reply in together} == {alone["choices"][0]["text"]}
    assert {reply["system_fingerprint"] for reply in together} == {alone["system_fingerprint"]}


def test_25_a_gap_is_filled_soberly_when_no_temperature_is_named(http):
    body = {"model": BASE, "prompt": PREFIX, "suffix": SUFFIX, "max_tokens": 12}
    drawn = [http.post("/v1/completions", json={**body, "seed": seed}).json()["choices"][0]["text"] for seed in range(8)]
    assert all(text.startswith("a + b") for text in drawn)
    assert http.post("/v1/completions", json={"prompt": "def f", "ignore_eos": True}).json()["usage"]["completion_tokens"] == 16


def test_26_a_key_is_asked_for_where_one_is_set(tmp_path):
    config = tmp_path / "lorry.toml"
    config.write_text('[[server.keys]]\nname = "team"\nkey = "secret"\nadapters = ["*"]\n')
    with serving("--config", config, "--model", "smollm2:135m") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert_error(http.get("/v1/models"), 401, code="invalid_api_key")
            assert_error(http.get("/v1/models", headers={"Authorization": "Bearer wrong"}), 401, code="invalid_api_key")
            for headers in ({"Authorization": "Bearer secret"}, {"api-key": "secret"}, {"x-api-key": "secret"}):
                assert http.get("/v1/models", headers=headers).status_code == 200, headers
            # Whether a server is there is asked before there is a key.
            for path in ("/health", "/", "/api/version"):
                assert http.get(path).status_code == 200, path


def test_28_prompts_and_choices_are_in_the_prompts_order(http):
    choices = complete(http, prompt=["def a", "def b"], n=2, max_tokens=4)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in choices]
    assert texts[0] == texts[1] == text_of(http, prompt="def a", max_tokens=4) and texts[2] == texts[3]
    assert complete(http, prompt=[[750, 264]], max_tokens=4)["choices"][0]["text"] == text_of(http, prompt=[750, 264], max_tokens=4)


def test_29_log_probabilities_fit_the_text(http):
    choice = complete(http, prompt="def f", logprobs=2, max_tokens=6)["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] and logprobs["text_offset"][0] == 0
    assert all(len(top) == 2 for top in logprobs["top_logprobs"]) and max(logprobs["token_logprobs"]) <= 0
    content = chat(http, logprobs=True, top_logprobs=1, max_tokens=4)["choices"][0]["logprobs"]["content"]
    assert all(bytes(token["bytes"]).decode("utf-8", "replace") == token["token"] for token in content)
    assert_error(http.post("/v1/completions", json={"prompt": "a", "logprobs": 99}), 400, "logprobs")


def test_30_three_requests_at_once_draw_three_texts(http):
    prompt = "".join(f"# note {number}\n" for number in range(40)) + "def "

    def draw(_):
        return complete(http, prompt=prompt, temperature=1.0)

    with ThreadPoolExecutor(3) as pool:
        assert len({reply["choices"][0]["text"] for reply in pool.map(draw, range(3))}) > 1


def test_33_json_is_what_a_schema_says_even_when_drawn_wildly(http):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["name", "arity"],
        "properties": {"name": {"type": "string", "maxLength": 20}, "arity": {"type": "integer", "minimum": 0, "maximum": 9}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "function", "schema": schema}}
    for seed in range(4):
        reply = chat(http, response_format=form, temperature=1.2, seed=seed, max_tokens=80)["choices"][0]
        assert reply["finish_reason"] == "stop"
        value = json.loads(reply["message"]["content"])
        assert value.keys() == {"name", "arity"} and 0 <= value["arity"] <= 9
    plain = chat(http, response_format={"type": "json_object"}, temperature=1.2, seed=1, max_tokens=400)["choices"][0]
    if plain["finish_reason"] == "stop":
        assert isinstance(json.loads(plain["message"]["content"]), dict)
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    refused = http.post("/v1/chat/completions", json={"messages": INTENT, "response_format": bad})
    assert assert_error(refused, 400)["param"].startswith("response_format")


def test_34_the_layout_of_another_family_is_rendered_in_the_models_own(http):
    filled = text_of(http, prompt=PREFIX, suffix=SUFFIX)
    assert text_of(http, prompt=f"<fim_prefix>{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>") == filled
    assert text_of(http, prompt=f"<PRE> {PREFIX} <SUF>{SUFFIX} <MID>") == filled


def test_35_tabbys_plugins_complete_an_editors_segments(http):
    for ask in (http.get, http.post):
        assert ask("/v1/health").json()["model"] == BASE
    assert http.get("/v1beta/server_setting").json() == {"disable_client_side_telemetry": True}
    segments = {"prefix": PREFIX, "suffix": SUFFIX, "filepath": "add.py", "clipboard": "x = 1"}
    reply = http.post("/v1/completions", json={"language": "python", "segments": segments, "seed": 1}).json()
    assert "a + b" in reply["choices"][0]["text"] and reply["id"].startswith("cmpl-")
    event = {"type": "select", "completion_id": reply["id"], "choice_index": 0}
    assert http.post("/v1/events", json=event).status_code == 200


def test_36_ollamas_clients_find_what_they_look_for(http):
    assert http.get("/api/version").json()["version"]
    assert BASE in [model["name"] for model in http.get("/api/tags").json()["models"]]
    shown = http.post("/api/show", json={"model": BASE}).json()
    assert ".Suffix" in shown["template"] and "insert" in shown["capabilities"]
    options = {"temperature": 0, "num_predict": 12}
    body = {"model": BASE, "prompt": PREFIX, "suffix": SUFFIX, "options": options}
    lines = [json.loads(line) for line in http.post("/api/generate", json=body).text.splitlines()]
    assert "a + b" in "".join(line["response"] for line in lines)
    assert lines[-1]["done"] and not lines[0]["done"]
    reply = http.post("/api/chat", json={"model": BASE, "messages": INTENT, "stream": False, "options": options}).json()
    assert reply["message"]["role"] == "assistant" and reply["done"]


@pytest.mark.parametrize("path", ["/v1/models", "/models", "/v1/models/", "//v1//models"])
def test_37_a_slash_more_or_less_is_no_other_path(http, path):
    assert http.get(path).json()["data"][0]["id"] == BASE


def test_37_a_page_of_any_origin_may_ask(http):
    for origin in ("vscode-webview://0abc", "http://localhost:3000"):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST",
                   "Access-Control-Request-Headers": "authorization,content-type"}
        reply = http.options("/v1/completions", headers=headers)
        assert reply.status_code in (200, 204)
        assert reply.headers["access-control-allow-origin"] in ("*", origin)
        assert {"authorization", "content-type"} <= set(reply.headers["access-control-allow-headers"].lower().split(","))


def test_38_a_request_is_counted_once_and_keeps_its_id(http):
    total = sum_of(http, "lorry_requests_total")
    reply = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers={"x-request-id": "mine"})
    assert reply.headers["x-request-id"] == "mine"
    assert http.get("/health").headers["x-request-id"]
    until(lambda: sum_of(http, "lorry_requests_total") == total + 1)
    exposition = http.get("/metrics").text
    for name in ("time_to_first_token", "inter_token_latency", "request_queue_time"):
        assert f"vllm:{name}_seconds_bucket" in exposition


def sum_of(http, name):
    return sum(float(value) for value in re.findall(rf"^{name}{{.*}} (\S+)$", http.get("/metrics").text, re.MULTILINE))


def test_39_a_comparison_shows_each_arm_as_it_is_alone(http):
    arms = [{"name": "base", "model": BASE}, {"name": "tuned", "model": ADAPTER}]
    reply = http.post("/v1/compare", json={"messages": INTENT, "arms": arms, "temperature": 0, "max_tokens": 24, "seed": 1})
    assert reply.status_code == 200, reply.text
    compared = [arm["choices"][0]["message"]["content"] if "choices" in arm else arm["text"] for arm in reply.json()["arms"]]
    alone = [chat(http, model=arm["model"], max_tokens=24, seed=1)["choices"][0]["message"]["content"] for arm in arms]
    assert compared == alone


def test_40_a_stream_under_way_ends_well_when_the_server_is_told_to_stop():
    with serving("--model", "smollm2:135m") as server, httpx.Client(base_url=server.url, timeout=60) as http:
        body = {"prompt": "def f", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = filter(None, reply.iter_lines())
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(30) == 0
