"""The server is held to its own /openapi.json: by schemathesis, which makes up requests from it, and with one request for
each kind of reply. `SCHEMATHESIS_SECONDS` is how long it may make them up; `make contract` gives it five minutes."""

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import schemathesis
from schemathesis import checks

from lorry_server import REPOSITORY, serving

CLIENTS = Path(__file__).parent
SECONDS = int(os.environ.get("SCHEMATHESIS_SECONDS", "40"))
GGUF_UINT32, GGUF_ALIGNMENT = 4, 32
BLOCK_COUNT, FIRST_TENSOR, LATER_BLOCK = b"llama.block_count", b"token_embd.weight", re.compile(rb"blk\.[1-9]")
ADMIN_KEY = "admin"

BASE = "qwen2.5-coder:0.5b"
ADAPTER = "conala"
MESSAGES = [{"role": "user", "content": "Reverse the list `xs`."}]
FUNCTION = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TOOLS = {"tools": [{"type": "function", "function": FUNCTION}], "tool_choice": "required"}
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "ok", "schema": SCHEMA}}
ANTHROPIC = {"anthropic-version": "2023-06-01"}


def shallow(folder):
    """A copy of the smallest model without its blocks but the first: it writes nonsense, and many times as fast."""
    [model] = (Path(os.environ.get("LORRY_HOME", Path.home() / ".cache/lorry")) / "models").glob("SmolLM2-135M-*.gguf")
    weights = model.read_bytes()
    magic_and_version, num_tensors, num_keys = struct.unpack_from("<QQQ", weights)
    place = weights.index(struct.pack("<Q", len(FIRST_TENSOR)) + FIRST_TENSOR)
    thirty, one = (BLOCK_COUNT + struct.pack("<II", GGUF_UINT32, count) for count in (30, 1))
    keys = weights[24:place].replace(thirty, one)
    tensors = []
    for _ in range(num_tensors):
        (name_len,) = struct.unpack_from("<Q", weights, place)
        (num_dims,) = struct.unpack_from("<I", weights, place + 8 + name_len)
        # Its dimensions, its type, and where it is in the data.
        end = place + 8 + name_len + 4 + 8 * num_dims + 4 + 8
        if not LATER_BLOCK.match(weights, place + 8):
            tensors.append(weights[place:end])
        place = end
    head = struct.pack("<QQQ", magic_and_version, len(tensors), num_keys) + keys + b"".join(tensors)
    with (folder / "shallow.gguf").open("wb") as file:
        file.write(head + bytes(-len(head) % GGUF_ALIGNMENT))
        file.write(weights[place + -place % GGUF_ALIGNMENT :])
    return folder / "shallow.gguf"


def test_nothing_that_schemathesis_sends_is_answered_with_a_failure_or_off_the_schema(tmp_path):
    for folder in ("adapters", "icl"):
        (tmp_path / folder).mkdir()
    environment = {
        "LORRY__SERVER__ADMIN_KEY": ADMIN_KEY,
        "LORRY__ICL__DIR": str(tmp_path / "icl"),
        # So that many requests fit into the time.
        "LORRY__ENGINE__CONTEXT_LENGTH": "48",
        "LORRY__ENGINE__MAX_QUEUED": "4",
    }
    with serving("--model", shallow(tmp_path), "--adapters", tmp_path / "adapters", environment=environment) as server:
        command = [Path(sys.executable).with_name("st"), "--config-file", CLIENTS / "schemathesis.toml", "run"]
        # What covers every field in turn would take all of a short time for the first route.
        phases = "examples,fuzzing,stateful" if SECONDS < 120 else "examples,coverage,fuzzing,stateful"
        run = subprocess.run(
            [*command, f"{server.url}/openapi.json", "--no-color", "--max-time", str(SECONDS), "--phases", phases],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(CLIENTS), "ADMIN_KEY": ADMIN_KEY},
            capture_output=True,
            text=True,
        )
        print(run.stdout)
        assert run.returncode == 0, run.stdout + run.stderr + server.log()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The default base with the shipped adapters, an experiment, and a folder for stores."""
    folder = tmp_path_factory.mktemp("lorry")
    (folder / "icl").mkdir()
    # Some of the tests change it.
    shutil.copytree(REPOSITORY / "adapters", folder / "adapters")
    config = folder / "lorry.toml"
    config.write_text(
        f"""
        [icl]
        dir = "{folder / "icl"}"
        [[experiments.run]]
        name = "one"
        alias = "coder"
        arms = [{{name = "base", model = "{BASE}", weight = 1}},
                {{name = "tuned", model = "{ADAPTER}", weight = 1, canary = true}}]
        bounds = {{min_samples = 1, max_error_rate = 0.5}}
        """
    )
    environment = {"LORRY__SERVER__ADMIN_KEY": ADMIN_KEY}
    with serving("--config", config, "--adapters", folder / "adapters", environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def hold(document, status, method, path, body=None, headers={}, **path_parameters):
    """Sends it, and holds the reply against the document; the reply."""
    case = document[path][method].Case(
        path_parameters=path_parameters,
        headers={"authorization": f"Bearer {ADMIN_KEY}", **headers},
        body=schemathesis.core.NOT_SET if body is None else body,
        media_type=None if body is None else "application/json",
    )
    reply = case.call()
    assert reply.status_code == status, reply.text
    case.validate_response(
        reply,
        checks=[
            checks.CHECKS.get_one(name)
            for name in (
                "status_code_conformance",
                "content_type_conformance",
                "response_headers_conformance",
                "response_schema_conformance",
            )
        ],
    )
    return reply


GENERATIONS = [
    ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, "max_tokens": 4}),
    ("/v1/completions", {"prompt": "def f(x):\n    return ", "suffix": "\n", "model": ADAPTER, "max_tokens": 4}),
    ("/v1/completions", {"prompt": "a", "model": "coder", "user": "ann", "max_tokens": 4}),
    ("/v1/completions", {"prompt": "a", "prediction": {"type": "content", "content": "b"}, "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": MESSAGES, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 4}),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 40, **TOOLS}),
    ("/v1/chat/completions", {"messages": MESSAGES, "response_format": FORMAT, "adapters": [{"name": ADAPTER, "scale": 0.5}]}),
    ("/v1/fim/completions", {"prompt": "def f(x):\n    return ", "suffix": "\n", "max_tokens": 4}),
    ("/v1/responses", {"input": "Say hello.", "max_output_tokens": 4}),
    ("/v1/responses", {"input": "Weather in Paris?", "tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4, "system": "Be brief.", "stop_sequences": ["["]}),
    ("/v1/compare", {"messages": MESSAGES, "on_error": "skip", "max_tokens": 4, "arms": [{"name": "a"}, {"name": "b", "model": "none"}]}),
    ("/infill", {"input_prefix": "def f(x):\n", "input_suffix": "\n", "n_predict": 4, "return_tokens": True}),
    ("/completion", {"prompt": "a", "n_predict": 4, "response_fields": ["content", "timings/prompt_n"]}),
    ("/api/generate", {"prompt": "Say hello.", "options": {"num_predict": 4}}),
    ("/api/chat", {"messages": MESSAGES, "format": "json", "options": {"num_predict": 4}}),
]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body"), GENERATIONS, ids=[f"{path} {index}" for index, (path, _) in enumerate(GENERATIONS)])
def test_a_generated_reply_is_as_described(document, path, body, stream):
    reply = hold(document, 200, "POST", path, {"temperature": 0, **body, "stream": stream})
    media_type = ("application/x-ndjson" if path.startswith("/api/") else "text/event-stream") if stream else "application/json"
    assert reply.headers["content-type"][0].startswith(media_type)


def test_several_choices_of_a_gap_are_as_described(document):
    body = {"input_prefix": "def f(x):\n", "n_cmpl": 2, "n_predict": 4}
    assert len(hold(document, 200, "POST", "/infill", body).json()) == 2


def test_a_kept_response_is_as_described(document):
    response = hold(document, 200, "POST", "/v1/responses", {"input": "Say hello.", "max_output_tokens": 4}).json()
    for method, status in (("GET", 200), ("DELETE", 200), ("GET", 404), ("DELETE", 404)):
        hold(document, status, method, "/v1/responses/{id}", id=response["id"])


def test_what_is_asked_about_models_is_as_described(document):
    for path in ("/v1/models", "/v1/adapters", "/api/tags", "/api/ps", "/api/version", "/props", "/lora-adapters", "/health"):
        hold(document, 200, "GET", path)
    for path in ("/v1/health", "/v1beta/server_setting", "/v1beta/models", "/v1/experiments", "/v1/icl", "/metrics", "/"):
        hold(document, 200, "GET", path)
    hold(document, 200, "GET", "/", headers={"accept": "text/html"})
    hold(document, 304, "GET", "/", headers={"accept": "text/html", "if-none-match": "*"})
    hold(document, 200, "GET", "/assets/{name}", name="main.js")
    for headers in ({}, ANTHROPIC):
        hold(document, 200, "GET", "/v1/models", headers=headers)
        hold(document, 200, "GET", "/v1/models/{id}", headers=headers, id=ADAPTER)
        hold(document, 404, "GET", "/v1/models/{id}", headers=headers, id="none")
    hold(document, 200, "POST", "/api/show", {"model": ADAPTER})


def test_what_is_asked_about_tokens_is_as_described(document):
    for body in ({"content": "aé", "with_pieces": True}, {"prompt": "aé", "return_token_strs": True}, {"messages": MESSAGES}):
        tokens = hold(document, 200, "POST", "/tokenize", body).json()["tokens"]
    hold(document, 200, "POST", "/detokenize", {"tokens": tokens})
    hold(document, 200, "POST", "/apply-template", {"messages": MESSAGES})
    hold(document, 200, "POST", "/v1/messages/count_tokens", {"messages": MESSAGES})


def test_the_life_of_an_adapter_is_as_described(document):
    one = {"name": "copy"}
    hold(document, 201, "PUT", "/v1/adapters/{name}", {"path": ADAPTER}, **one)
    hold(document, 200, "POST", "/v1/adapters/{name}/load", **one)
    hold(document, 200, "GET", "/v1/adapters/{name}", **one)
    hold(document, 412, "PUT", "/v1/adapters/{name}", {"path": "docstring"}, {"if-none-match": "*"}, **one)
    hold(document, 200, "PUT", "/v1/adapters/{name}", {"path": "docstring"}, **one)
    hold(document, 200, "POST", "/v1/adapters/{name}/rollback", **one)
    hold(document, 204, "DELETE", "/v1/adapters/{name}", **one)
    hold(document, 404, "GET", "/v1/adapters/{name}", **one)
    hold(document, 200, "POST", "/v1/load_lora_adapter", {"lora_name": "copy", "lora_path": ADAPTER})
    hold(document, 200, "POST", "/v1/unload_lora_adapter", {"lora_name": "copy"})
    hold(document, 200, "POST", "/lora-adapters", [])


def test_stores_votes_and_experiments_are_as_described(document):
    hold(document, 200, "PUT", "/v1/icl/{name}", {"examples": [{"instruction": "a", "code": "b"}]}, name="ops")
    hold(document, 200, "GET", "/v1/icl/{name}", name="ops")
    hold(document, 200, "DELETE", "/v1/icl/{name}", name="ops")
    hold(document, 404, "GET", "/v1/icl/{name}", name="ops")
    hold(document, 200, "POST", "/v1/feedback", {"id": "cmp-1", "kind": "winner", "arm": "base", "user": "ann"})
    hold(document, 200, "POST", "/v1/events", {"type": "select", "completion_id": "cmp-1"})
    assert len(hold(document, 200, "GET", "/v1/feedback/{id}", id="cmp-1").json()["votes"]) == 2
    hold(document, 200, "GET", "/v1/experiments/{name}", name="one")
    hold(document, 200, "POST", "/v1/experiments/{name}/reset", name="one")
    hold(document, 404, "GET", "/v1/experiments/{name}", name="none")
    promotions = "/v1/experiments/{name}/promotions"
    hold(document, 200, "GET", promotions, name="one")
    hold(document, 400, "POST", promotions, {"adapter": ADAPTER}, name="one")
    hold(document, 404, "POST", promotions, {"adapter": ADAPTER}, name="none")
