"""The targets of the load test are what vegeta reads, and requests that the server takes."""

import base64
import json
import subprocess
import sys
import urllib.request

import pytest

from lorry_server import REPOSITORY, serving

LOADTEST = REPOSITORY / "deploy" / "loadtest"


def generate(*arguments):
    command = [sys.executable, LOADTEST / "targets.py", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_committed_targets_are_those_the_script_writes():
    written = generate("--models", "qwen2.5-coder:0.5b,conala", "--count", "8")
    assert (LOADTEST / "targets.jsonl").read_text() == written


@pytest.mark.parametrize("model", ["qwen2.5-coder:0.5b", "conala"])
def test_targets_name_the_models_in_turn(model):
    targets = [json.loads(line) for line in (LOADTEST / "targets.jsonl").read_text().splitlines()]
    models = [json.loads(base64.b64decode(target["body"]))["model"] for target in targets]
    assert models.count(model) == len(models) / 2


def test_a_target_is_a_request_that_the_server_takes():
    with serving("--model", "smollm2:135m", "--adapters", "") as server:
        lines = generate("--url", server.url, "--models", "smollm2:135m", "--count", "1", "--max-tokens", "5")
        target = json.loads(lines)
        assert set(target) == {"method", "url", "header", "body"}
        request = urllib.request.Request(
            target["url"],
            base64.b64decode(target["body"]),
            {name: value for name, [value] in target["header"].items()},
            method=target["method"],
        )
        with urllib.request.urlopen(request) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] == 5
