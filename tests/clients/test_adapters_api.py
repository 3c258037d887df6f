"""Adapters through the API of the running binary: composition, keys, and the routes that vLLM's and llama.cpp's clients use."""

import json
import shutil
import urllib.error
import urllib.request

import openai
import pytest

from lorry_server import FIXTURES, serving

BASE = "smollm2:135m"
KINDS = ["lora_qv", "lora_all"]
ADAPTERS = FIXTURES / "smollm2-135m" / "adapters"
CODE = "def fibonacci(n):\n"
CONFIG = """
[server]
admin_key = "admin"
[[server.keys]]
name = "one"
key = "one"
adapters = ["lora_q*"]
"""

pytestmark = pytest.mark.skipif(
    not all((ADAPTERS / kind).is_dir() for kind in KINDS),
    reason="skipped: the fixture adapters are not beside the repository",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    for kind in KINDS:
        shutil.copytree(ADAPTERS / kind, folder / "adapters" / kind)
    (folder / "lorry.toml").write_text(CONFIG)
    arguments = ["--model", BASE, "--adapters", folder / "adapters", "--config", folder / "lorry.toml"]
    with serving(*arguments) as server:
        yield server


def client_of(server, key):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server, "admin")


def complete(client, model=BASE, **options):
    return client.completions.create(
        model=model, prompt=CODE, max_tokens=12, temperature=0, logprobs=3, extra_body=options
    )


def said(completion):
    choice = completion.choices[0]
    return choice.text, choice.logprobs.token_logprobs


def call(server, method, path, body=None, key="admin"):
    """Status and body of a plain HTTP request."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Authorization": f"Bearer {key}"}, method=method)
    try:
        with urllib.request.urlopen(request) as reply:
            status, text = reply.status, reply.read().decode()
    except urllib.error.HTTPError as refusal:
        status, text = refusal.code, refusal.read().decode()
        assert json.loads(text)["error"]["message"]
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text


def test_strength_0_is_the_base_and_strength_1_the_adapter(client):
    base, adapter = complete(client), complete(client, KINDS[0])
    assert said(base) != said(adapter)
    assert said(complete(client, adapters=[{"name": KINDS[0], "scale": 0}])) == said(base)
    assert said(complete(client, adapters=[{"name": KINDS[0]}])) == said(adapter)
    assert said(complete(client, adapter=KINDS[0])) == said(adapter)


def test_a_composition_names_its_members(client):
    members = [{"name": KINDS[0], "scale": 0.5}, {"name": KINDS[1], "scale": 0.5}]
    reply = complete(client, adapters=members)
    assert [(member["name"], member["scale"]) for member in reply.adapters] == [(kind, 0.5) for kind in KINDS]
    assert all(member["generation"] for member in reply.adapters)
    assert said(reply) not in [said(complete(client)), said(complete(client, KINDS[0]))]


def test_an_unknown_member_is_not_found_by_its_place(client):
    with pytest.raises(openai.NotFoundError) as refusal:
        complete(client, adapters=[{"name": KINDS[0]}, {"name": "nobody"}])
    assert (refusal.value.code, refusal.value.param) == ("model_not_found", "adapters[1].name")


def test_a_key_opens_its_adapters_and_the_base_alone(server):
    one = client_of(server, "one")
    assert [model.id for model in one.models.list()] == [BASE, f"{BASE}-{KINDS[0]}"]
    assert complete(one, KINDS[0]).choices[0].text
    assert complete(one).choices[0].text
    for options in [{"model": KINDS[1]}, {"adapters": [{"name": KINDS[1]}]}]:
        with pytest.raises(openai.NotFoundError):
            complete(one, **options)
    with pytest.raises(openai.AuthenticationError) as refusal:
        complete(client_of(server, "nobody's"))
    assert refusal.value.code == "invalid_api_key"


def test_default_strengths_of_llama_cpp_reach_the_base(server, client):
    _, adapters = call(server, "GET", "/lora-adapters")
    assert [adapter["path"] for adapter in adapters] == ["", ""]
    chosen = next(adapter["id"] for adapter in adapters if adapter["name"] == KINDS[0])
    base, adapter = said(complete(client)), said(complete(client, KINDS[0]))
    try:
        assert call(server, "POST", "/lora-adapters", [{"id": chosen, "scale": 1}]) == (200, {"success": True})
        assert said(complete(client)) == adapter
        assert said(complete(client, lora=[{"id": chosen, "scale": 0}])) == base
    finally:
        call(server, "POST", "/lora-adapters", [])
    assert said(complete(client)) == base


def test_the_status_tells_the_measured_change(server, client):
    complete(client, KINDS[0])
    status, adapter = call(server, "GET", f"/v1/adapters/{KINDS[0]}")
    assert (status, adapter["phase"], adapter["coverage"]["num_sites"]) == (200, "ready", 60)
    assert call(server, "GET", "/v1/adapters/nobody")[0] == 404


def test_vllm_and_put_install_replace_and_take_out(server, client):
    load = {"lora_name": "fresh", "lora_path": KINDS[0]}
    added = (200, "Success: LoRA adapter 'fresh' added successfully.")
    assert call(server, "POST", "/v1/load_lora_adapter", load) == added
    assert call(server, "POST", "/v1/load_lora_adapter", load) == added
    assert said(complete(client, "fresh")) == said(complete(client, KINDS[0]))
    assert call(server, "POST", "/v1/load_lora_adapter", {**load, "lora_path": KINDS[1]})[0] == 400

    status, replaced = call(server, "PUT", "/v1/adapters/fresh", {"path": KINDS[1]})
    assert (status, len(replaced["previous_generations"])) == (200, 1)
    assert said(complete(client, "fresh")) == said(complete(client, KINDS[1]))
    assert call(server, "POST", "/v1/adapters/fresh/rollback")[0] == 200
    assert said(complete(client, "fresh")) == said(complete(client, KINDS[0]))

    removed = (200, "Success: LoRA adapter 'fresh' removed successfully.")
    assert call(server, "POST", "/v1/unload_lora_adapter", {"lora_name": "fresh"}) == removed
    assert call(server, "POST", "/v1/unload_lora_adapter", {"lora_name": "fresh"})[0] == 404
    assert call(server, "DELETE", "/v1/adapters/fresh")[0] == 204
    with pytest.raises(openai.NotFoundError):
        complete(client, "fresh")


def test_without_an_admin_key_changes_are_off():
    with serving("--model", BASE, "--adapters", "") as server:
        status, refusal = call(server, "PUT", "/v1/adapters/x", {"path": "y"})
        assert status == 403
        assert "server.admin_key" in refusal["error"]["message"]
