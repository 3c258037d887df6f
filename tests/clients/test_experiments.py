"""An experiment on the running server: the split, the votes, and a disk that takes none."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request

import pytest

from lorry_server import REPOSITORY, serving

CONFIG = """
[[experiments.run]]
name = "first"
alias = "coder"
arms = [
    { name = "base", model = "smollm2:135m", weight = 1 },
    { name = "examples", model = "smollm2:135m+icl:python@3", weight = 1 },
    { name = "one-example", model = "smollm2:135m+icl:python@1", shadow = true },
]
"""


def post(server, path, body):
    request = urllib.request.Request(f"{server.url}{path}", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def get(server, path):
    with urllib.request.urlopen(f"{server.url}{path}", timeout=60) as reply:
        return json.load(reply)


def serving_experiment(folder, path):
    config = folder / "lorry.toml"
    config.write_text(CONFIG)
    environment = {"LORRY__EXPERIMENTS__PATH": str(path)}
    return serving("--model", "smollm2:135m", "--adapters", "", "--config", config, environment=environment)


def ask(server, user):
    messages = [{"role": "user", "content": f"print the first {user} primes"}]
    status, reply = post(server, "/v1/chat/completions",
                         {"model": "coder", "user": user, "messages": messages, "max_tokens": 4})
    assert status == 200, reply
    return reply


def test_votes_survive_a_kill_and_the_report_adds_up(tmp_path):
    with serving_experiment(tmp_path, tmp_path / "experiments.db") as server:
        replies = [ask(server, str(user)) for user in range(8)]
        assert len({reply["icl"] and reply["icl"]["k"] for reply in replies}) == 2, "both arms answer"
        for reply in replies:
            assert post(server, "/v1/feedback", {"id": reply["id"], "kind": "accepted"})[0] == 200
        compared = {"prompt": "x", "max_tokens": 4, "arms": [{"name": "a"}, {"name": "b", "seed": 2}]}
        comparison = post(server, "/v1/compare", compared)[1]["id"]
        assert post(server, "/v1/feedback", {"id": comparison, "kind": "winner", "arm": "b"})[0] == 200
        server.process.kill()
        server.process.wait()
    with serving_experiment(tmp_path, tmp_path / "experiments.db") as server:
        assert get(server, f"/v1/feedback/{comparison}")["votes"][0]["arm"] == "b"
        arms = get(server, "/v1/experiments/first")["arms"]
        assert sum(arm["accepted"] for arm in arms[:2]) == 8
        assert sum(arm["requests"] for arm in arms[:2]) == 8 and all(arm["requests"] for arm in arms)


def test_a_full_disk_refuses_votes_and_serving_goes_on(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("skipped: no small disk can be mounted here")
    try:
        with serving_experiment(tmp_path, disk / "experiments.db") as server:
            vote = {"id": ask(server, "1")["id"], "kind": "accepted"}
            assert post(server, "/v1/feedback", vote)[0] == 200
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            status, refused = post(server, "/v1/feedback", {**vote, "kind": "edited", "text": "x" * 100_000})
            assert (status, refused["error"]["code"]) == (503, "storage_unavailable")
            assert "full" in refused["error"]["message"]
            assert ask(server, "2")["choices"], "serving goes on"
            filler.unlink()
            assert post(server, "/v1/feedback", vote)[0] == 200
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_written_refuses_votes_and_serving_goes_on(tmp_path):
    with serving_experiment(tmp_path, "/proc/lorry/experiments.db") as server:
        status, refused = post(server, "/v1/feedback", {"id": ask(server, "1")["id"], "kind": "accepted"})
        assert (status, refused["error"]["code"]) == (503, "storage_unavailable")
        assert "experiments" in refused["error"]["message"]
