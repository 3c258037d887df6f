"""Adapters that do not fit are refused one by one, each with its cause; the others are served."""

import shutil
import urllib.request

import openai
import pytest

from lorry_server import FIXTURES, serving

BASE = "smollm2:135m"
GOOD = "lora_qv"
BAD = sorted(path.name for path in (FIXTURES / "bad_adapters").glob("*") if path.is_dir())

pytestmark = pytest.mark.skipif(not BAD, reason="skipped: the bad adapters are not beside the repository")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for name in BAD:
        shutil.copytree(FIXTURES / "bad_adapters" / name, folder / name)
    shutil.copytree(FIXTURES / "smollm2-135m" / "adapters" / GOOD, folder / GOOD)
    with serving("--model", BASE, "--adapters", folder) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.mark.parametrize("name", BAD)
def test_the_log_says_why_an_adapter_is_refused(server, name):
    expected = (FIXTURES / "bad_adapters" / name / "EXPECT.txt").read_text().strip()
    refusals = [line for line in server.log().splitlines() if f"adapter {name} refused: " in line]
    assert len(refusals) == 1, server.log()
    assert expected in refusals[0].split(" refused: ", 1)[1]


@pytest.mark.parametrize("name", BAD)
def test_a_refused_adapter_is_an_unknown_model(client, name):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model=name, prompt="x", max_tokens=1)


def test_the_server_is_healthy_and_serves_the_base_and_the_good_adapter(server, client):
    with urllib.request.urlopen(f"{server.url}/health") as reply:
        assert reply.status == 200
    assert [model.id for model in client.models.list()] == [BASE, f"{BASE}-{GOOD}"]
    for model in (BASE, GOOD):
        assert client.completions.create(model=model, prompt="def f(", max_tokens=4).usage.completion_tokens > 0
