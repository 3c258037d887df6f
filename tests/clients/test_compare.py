"""Comparisons and in-context examples with the default base, its chat template and the committed adapter."""

import json
import subprocess
import urllib.error
import urllib.request

import pytest

from lorry_server import BINARY

BASE = "qwen2.5-coder:0.5b"
INTENT = "check if all elements in list `mylist` are the same"
EXAMPLES = {"store": "python", "k": 3, "select": "bm25"}
ARMS = [
    {"name": "zero-shot"},
    {"name": "examples", "icl": EXAMPLES},
    {"name": "fixed", "model": f"{BASE}+icl:python@16"},
    {"name": "tuned", "adapter": "conala"},
    {"name": "tuned, with examples", "adapter": "conala", "icl": EXAMPLES},
    {"name": "paper", "adapter": "conala", "icl": EXAMPLES, "prompt_format": "paper-v2", "temperature": 0.7},
]


def post(server, path, body):
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=300) as reply:
        return reply.read().decode()


def shared(**fields):
    return {"messages": [{"role": "user", "content": INTENT}], "max_tokens": 32, "temperature": 0, **fields}


def plain(server, arm, seed, **fields):
    request = {**shared(**fields), **arm, "seed": seed, "logprobs": True}
    del request["name"]
    return json.loads(post(server, "/v1/chat/completions", request))


@pytest.fixture(scope="module")
def compared(server):
    return json.loads(post(server, "/v1/compare", shared(arms=ARMS)))


@pytest.mark.parametrize("index", range(len(ARMS)), ids=[arm["name"] for arm in ARMS])
def test_an_arm_equals_its_plain_request(server, compared, index):
    arm = compared["arms"][index]
    alone = plain(server, ARMS[index], compared["seed"])
    choice = alone["choices"][0]
    assert arm["text"] == choice["message"]["content"]
    assert arm["finish_reason"] == choice["finish_reason"]
    tokens = choice["logprobs"]["content"]
    assert arm["logprob"] == pytest.approx(sum(token["logprob"] for token in tokens), rel=1e-6)
    assert arm["usage"]["prompt_tokens"] == alone["usage"]["prompt_tokens"]
    for key in ("model", "adapter", "adapters"):
        assert arm[key] == alone[key]
    if arm["icl"]:
        assert arm["icl"]["examples"] == alone["icl"]["examples"]


def test_more_examples_make_a_longer_prompt_and_the_reply_names_them(compared):
    prompts = {arm["name"]: arm["usage"]["prompt_tokens"] for arm in compared["arms"]}
    assert prompts["zero-shot"] < prompts["examples"] < prompts["fixed"]
    assert prompts["tuned"] < prompts["tuned, with examples"]
    fixed = compared["arms"][2]["icl"]
    assert (fixed["store"], fixed["k"], fixed["examples"]) == ("python", 16, list(range(16)))
    assert compared["arms"][0]["icl"] is None


def test_a_fixed_set_is_computed_once(server):
    ask = lambda content: {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
    arm = {"name": "fixed", "model": f"{BASE}+icl:bash@12"}
    first = plain(server, arm, 1, **ask("reverse a string"))
    second = plain(server, arm, 1, **ask("the sum of all even numbers in `xs`"))
    saved = second["icl"]["cached_tokens"]
    assert saved == second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert saved > first["usage"]["prompt_tokens"] - 32 and first["icl"]["cached_tokens"] < saved


def test_a_stream_tells_each_arm_by_its_number(server, compared):
    text = post(server, "/v1/compare", shared(arms=ARMS[:4], seed=compared["seed"], stream=True))
    *events, done = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
    events = [json.loads(event) for event in events]
    assert (done, events[-1]["event"]) == ("[DONE]", "done")
    for index, arm in enumerate(compared["arms"][:4]):
        of_arm = [event for event in events if event.get("arm") == index]
        assert [event["event"] for event in of_arm][0] == "start" and of_arm[-1]["event"] == "finish"
        assert "".join(event["text"] for event in of_arm if event["event"] == "delta") == arm["text"]
        assert of_arm[-1]["agreement"] == arm["agreement"]


def test_an_unknown_adapter_is_named_by_its_arm(server):
    arms = [{"name": "base"}, {"name": "lost", "adapter": "nobody"}]
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(server, "/v1/compare", shared(arms=arms))
    error = json.load(refused.value)["error"]
    assert (refused.value.code, error["param"]) == (404, "arms[1].adapter")
    skipped = json.loads(post(server, "/v1/compare", shared(arms=arms, on_error="skip")))
    assert skipped["arms"][0]["text"] and skipped["arms"][1]["error"] == error


def lorry_compare(server, *arguments):
    command = [BINARY, "compare", "--url", server.url, "--chat", "-p", INTENT, "--max-tokens", "16", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_terminal_shows_a_table_of_the_arms(server):
    shown = lorry_compare(server, "--arm", "base=", "--arm", f"shots={BASE},icl=python@3", "--arm", "lost=nobody")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0].split()[:2] == ["arm", "model"]
    assert [line.split()[:2] for line in lines[1:4]] == [["base", BASE], ["shots", BASE], ["lost", "error"]]
    as_json = lorry_compare(server, "--json", "--arm", "base=", "--arm", "tuned=conala")
    base, tuned = json.loads(as_json.stdout)["arms"]
    assert base["text"] in shown.stdout and tuned["adapter"]["name"] == "conala"


def test_the_terminal_says_why_a_comparison_was_refused(server):
    refused = lorry_compare(server, "--arm", "only=")
    assert refused.returncode == 1 and "2 to 16 arms" in refused.stderr
