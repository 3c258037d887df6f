"""The load test, short: its requests are ones that the server takes, an attack finds and plots a knee, a soak judges."""

import base64
import json
import shutil
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree

import pytest

from lorry_server import REPOSITORY

LOADTEST = REPOSITORY / "deploy" / "loadtest"
sys.path.insert(0, str(LOADTEST))
import soak
import targets

KINDS = len(targets.KINDS)
BASE, ADAPTER = "qwen2.5-coder:0.5b", "conala"


def run(script, *arguments):
    command = [sys.executable, LOADTEST / script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_each_kind_goes_to_each_model_and_no_prompt_comes_twice():
    requests = lines(run("targets.py", "--models", "a,b", "--count", 4 * KINDS).stdout)
    bodies = [request["body"] for request in requests]
    is_fim, is_chat, has_examples = ([key in body for body in bodies] for key in ("suffix", "messages", "icl"))
    for model in ("a", "b"):
        at = [index for index, body in enumerate(bodies) if body["model"] == model]
        assert [sum(flags[index] for index in at) for flags in (is_fim, is_chat, has_examples)] == [2, 4, 2]
    prompts = [json.dumps(body.get("prompt") or body["messages"]) for body in bodies]
    assert len(set(prompts)) == len(prompts)


def test_a_target_of_each_kind_is_a_request_that_the_server_takes(server):
    options = ["--models", f"{BASE},{ADAPTER}", "--count", 2 * KINDS, "--max-tokens", 5]
    for target in lines(run("targets.py", "--url", server.url, "--form", "vegeta", *options).stdout):
        assert set(target) == {"method", "url", "header", "body"}
        request = urllib.request.Request(
            target["url"],
            base64.b64decode(target["body"]),
            {name: value for name, [value] in target["header"].items()},
            method=target["method"],
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert reply.read().endswith(b"data: [DONE]\n\n")


def attack(server, folder, *options):
    common = ["--url", server.url, "--models", f"{BASE},{ADAPTER}", "--rates", "1,2", "--seconds", 2, "--max-tokens", 4]
    done = run("attack.py", *common, "--out", folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    *reports, knee = lines((folder / "reports.jsonl").read_text())
    assert [report["rate"] for report in reports] == [1, 2]
    assert all(report["errors"] == {} for report in reports), reports
    assert sum(report["num_succeeded"] for report in reports) > 0
    # An objective that holds always.
    assert knee == {"knee_request_s": 2, "is_reached": False, "sustained_share": 0.95}
    assert xml.etree.ElementTree.parse(folder / "knee.svg").getroot().tag.endswith("svg")
    return reports


def test_lorry_attacks_over_rates_and_the_knee_is_plotted(server, tmp_path):
    reports = attack(server, tmp_path, "--slo-ttft-ms", 1e6)
    log = lines((tmp_path / "requests.jsonl").read_text())
    assert len(log) == sum(report["num_requests"] for report in reports)
    assert all(line["output_tokens"] == 4 for line in log), log


@pytest.mark.skipif(shutil.which("vegeta") is None, reason="vegeta is not there")
def test_vegeta_attacks_over_rates_and_the_knee_is_plotted(server, tmp_path):
    reports = attack(server, tmp_path, "--tool", "vegeta", "--slo-e2e-ms", 1e6)
    assert [report["num_succeeded"] for report in reports] == [2, 4]


def test_an_attack_without_an_objective_or_with_a_strange_one_is_refused(tmp_path):
    for options in ([], ["--tool", "vegeta", "--slo-ttft-ms", 1], ["--slo-e2e-ms", 1, "--kinds", "poem"]):
        done = run("attack.py", "--models", "m", "--out", tmp_path / "out", *options)
        assert done.returncode == 2, options
        assert not (tmp_path / "out").exists()


def test_a_soak_changes_adapters_under_load_and_no_request_fails(tmp_path):
    options = ["--knee", 2.5, "--seconds", 12, "--window", 6, "--max-tokens", 4, "--out", tmp_path / "soak.json"]
    done = run("soak.py", *options)
    assert (tmp_path / "soak.json").exists(), done.stdout + done.stderr
    report = json.loads((tmp_path / "soak.json").read_text())
    assert all(report["changes"].values()), report
    # So short a soak may find memory and times elsewhere.
    assert [fault for fault in report["faults"] if "memory" not in fault and "p99" not in fault] == []
    assert report["memory"] and len(report["latency"]["windows"]) == 2, report


def test_a_soak_finds_memory_that_grows_and_replies_that_slow_down():
    def judge(mib, e2e):
        faults = []
        soak.judge_memory([(second, mib(second)) for second in range(30)], 10, faults)
        log = [{"at_s": second, "error": None, "ttft_ms": 1, "e2e_ms": e2e(second)} for second in range(30)]
        soak.judge_latency(log, 10, faults)
        return faults

    # What happens in the first window warms up.
    assert judge(lambda second: 500 + min(second, 8) * 10, lambda second: 100 + second) == []
    [fault] = judge(lambda second: 500 + second, lambda second: 100)
    assert "resident memory" in fault
    [fault] = judge(lambda second: 500, lambda second: 100 if second < 10 else 131)
    assert "p99" in fault
    assert judge(lambda second: 500, lambda second: 100) == []
    # For a second, what is exchanged is there twice.
    faults = []
    report = soak.judge_memory([(second, 530 if second % 60 == 17 else 500) for second in range(900)], 300, faults)
    assert faults == [] and report["max_change"] == 0 and report["windows"][2]["max_mib"] == 530
