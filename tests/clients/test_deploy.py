"""What deploy/ configures does what it says, with Debian's HAProxy and Prometheus and real servers."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import pytest

from lorry_server import REPOSITORY, Server, serving, starting, wait_until_serving

DEPLOY = REPOSITORY / "deploy"
HAPROXY_CONFIG = DEPLOY / "haproxy" / "haproxy.cfg"
ADAPTERS = ["bash", "conala", "conala-ia3", "docstring", "fim-python"]
BASE = "qwen2.5-coder:0.5b"
# Of the servers that ask for one.
ADMIN_KEY = "metrics-of-everything"
# A bound, and no more: machines may be slow.
MAX_WAIT_SECONDS = 120


def needs(*programs):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"skipped: {', '.join(missing)} not installed (make daemons)")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(condition, what):
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"after {MAX_WAIT_SECONDS} s: {what}"
        time.sleep(0.05)


def status_of(url):
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return None


def post(url, path, body, headers={}):
    headers = {"Authorization": f"Bearer {ADMIN_KEY}", **headers}
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=300) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode()


def ask(url, max_tokens=2, **fields):
    return post(url, "/v1/completions", {"prompt": "print", "max_tokens": max_tokens, "ignore_eos": True, **fields})


def samples(replica, pattern):
    """The label's value and the count of each series that the pattern finds in `/metrics`."""
    with urllib.request.urlopen(f"{replica.url}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    return [(label, int(count)) for label, count in re.findall(rf"^{pattern}.*}} (\d+)$", text, re.MULTILINE)]


def requests_ended(replica):
    """By adapter."""
    ended = {}
    for adapter, count in samples(replica, r'lorry_requests_total\{adapter="([^"]+)"'):
        ended[adapter] = ended.get(adapter, 0) + count
    return ended


def refusals(replica):
    return sum(count for _, count in samples(replica, r'lorry_rejected_total\{reason="([^"]+)"'))


def requests_running(replica):
    return sum(count for _, count in samples(replica, r'vllm:num_requests_running\{.*model_name="([^"]+)"'))


@dataclass(frozen=True)
class Pool:
    url: str
    replicas: list[Server]

    def home_of(self, adapter):
        """The replica that a request for it goes to."""
        before = [requests_ended(replica).get(adapter, 0) for replica in self.replicas]
        assert ask(self.url, model=adapter)[0] == 200
        after = [requests_ended(replica).get(adapter, 0) for replica in self.replicas]
        [home] = [at for at, (old, new) in enumerate(zip(before, after)) if new > old]
        return self.replicas[home]


@contextmanager
def haproxy(folder, addresses):
    """HAProxy before these replicas; yields its URL, at once."""
    bind, metrics_bind = (f"127.0.0.1:{free_port()}" for _ in range(2))
    process = subprocess.Popen(
        ["haproxy", "-db", "-f", HAPROXY_CONFIG],
        env={
            **os.environ,
            "HAPROXY_SOCKET": str(folder / "haproxy.sock"),
            "LORRY_BIND": bind,
            "LORRY_METRICS_BIND": metrics_bind,
            **{f"LORRY_REPLICA_{at}": address for at, address in enumerate(addresses, 1)},
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://{bind}"
    finally:
        process.kill()
        process.wait()


@contextmanager
def pool(folder):
    """Two replicas behind HAProxy, which finds both well."""
    environment = {"LORRY__ENGINE__KV_CACHE_MIB": "64", "LORRY__ENGINE__THREADS": "1"}
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(serving("--adapters", REPOSITORY / "adapters", environment=environment)) for _ in range(2)
        ]
        url = stack.enter_context(haproxy(folder, [replica.url.removeprefix("http://") for replica in replicas]))
        wait_until(lambda: status_of(f"{url}/health") == 200, "HAProxy finds no replica")
        yield Pool(url, replicas)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    with pool(tmp_path_factory.mktemp("haproxy")) as two:
        yield two


class SaysItsPort(BaseHTTPRequestHandler):
    """In the place of a replica: all it replies to anything is which one it is."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(self.server.server_port).encode())

    do_GET = do_POST

    def log_message(self, *_):
        pass


@dataclass(frozen=True)
class Ports:
    """Two such behind HAProxy."""

    url: str

    def home_of(self, fields, headers={}):
        """Which of them a request with these comes to."""
        status, port = post(self.url, "/v1/completions", fields, headers)
        assert status == 200, (fields, port)
        return port

    def are_spread(self, fields, headers={}):
        return len({self.home_of(fields, headers) for _ in range(32)}) == 2


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    with ExitStack() as stack:
        replicas = [stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), SaysItsPort)) for _ in range(2)]
        for replica in replicas:
            threading.Thread(target=replica.serve_forever).start()
            stack.callback(replica.shutdown)
        addresses = [f"127.0.0.1:{replica.server_port}" for replica in replicas]
        url = stack.enter_context(haproxy(tmp_path_factory.mktemp("ports"), addresses))
        wait_until(lambda: status_of(f"{url}/health") == 200, "HAProxy finds no replica")
        yield Ports(url)


class Load:
    """One client for each adapter, each of which asks again as soon as it has its reply."""

    def __init__(self, url):
        self.url = url
        self.replies = []
        self.is_over = threading.Event()
        self.clients = [threading.Thread(target=self.ask_on, args=[adapter]) for adapter in ADAPTERS]

    def ask_on(self, adapter):
        while not self.is_over.is_set():
            try:
                self.replies.append(ask(self.url, model=adapter, max_tokens=8))
            except OSError as error:
                self.replies.append((None, repr(error)))

    def wait_for(self, count):
        goal = len(self.replies) + count
        wait_until(lambda: len(self.replies) >= goal, "clients get no replies")

    def failures(self):
        return [reply for reply in self.replies if reply[0] != 200]

    def __enter__(self):
        for client in self.clients:
            client.start()
        return self

    def __exit__(self, *_):
        self.is_over.set()
        for client in self.clients:
            client.join()


@contextmanager
def stream(pool, adapter, max_tokens):
    """A stream that has begun: its connection, and the reply after its first event."""
    connection = http.client.HTTPConnection(pool.url.removeprefix("http://"), timeout=60)
    body = {"model": adapter, "prompt": "print", "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.readline().startswith(b"data: {")
    try:
        yield reply
    finally:
        connection.close()


@needs("haproxy")
def test_the_configuration_of_haproxy_is_valid():
    run = subprocess.run(["haproxy", "-c", "-f", HAPROXY_CONFIG], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@needs("haproxy")
def test_requests_for_an_adapter_go_to_one_replica_however_they_name_it(two):
    before = [requests_ended(replica) for replica in two.replicas]
    ways = lambda adapter: [
        {"model": adapter},
        {"model": f"{BASE}-{adapter}"},
        {"model": f"{BASE.upper().replace(':', '-')}-{adapter}"},
        {"model": f"{adapter}+icl:python@1"},
        {"model": BASE, "adapter": adapter},
        {"model": BASE, "adapters": [{"name": adapter}]},
        {"lora": [{"name": adapter}]},
        {"adapter_id": adapter},
        {"lora_path": adapter},
        {"lora_name": adapter},
    ]
    homes = set()
    for adapter in ADAPTERS:
        for fields in ways(adapter):
            status, reply = ask(two.url, **fields)
            assert status == 200, (fields, reply)
        came = [requests_ended(now).get(adapter, 0) - old.get(adapter, 0) for now, old in zip(two.replicas, before)]
        assert sorted(came) == [0, len(ways(adapter))], (adapter, came)
        homes.add(came.index(0))
    assert len(homes) == 2, "both replicas have adapters"


@needs("haproxy")
def test_requests_for_the_base_are_spread(two):
    for fields in [{"model": BASE}, {}] * 8:
        assert ask(two.url, **fields)[0] == 200
    ended = [requests_ended(replica) for replica in two.replicas]
    assert all(replica.get("base") for replica in ended), ended


@needs("haproxy")
def test_an_empty_name_is_passed_over(ports):
    for adapter in ADAPTERS:
        home = ports.home_of({"model": adapter})
        for field in ["adapter", "adapter_id", "lora_path", "lora_name"]:
            assert ports.home_of({field: "", "model": adapter}) == home, (field, adapter)
            assert ports.home_of({field: adapter, "model": ""}) == home, (field, adapter)
    assert ports.are_spread({"model": ""})


@needs("haproxy")
def test_a_gateway_says_what_the_model_of_a_longer_body_is(ports):
    # The name comes behind what fits into a buffer.
    longer = lambda model: {"prompt": "print " * 40_000, "model": model}
    says = lambda model: {"X-Gateway-Model-Name": model}
    homes = {adapter: ports.home_of({"model": adapter}) for adapter in ADAPTERS}
    for adapter, home in homes.items():
        for model in [adapter, f"{BASE}-{adapter}", f"{BASE.upper().replace(':', '-')}-{adapter}", f"{adapter}+icl:python@1"]:
            assert ports.home_of(longer(model), says(model)) == home, model
    for model in [BASE, ""]:
        assert ports.are_spread(longer(model), says(model)), model
    assert ports.are_spread(longer("conala"))
    # What the body says is what lorry goes by.
    [other, *_] = [adapter for adapter in ADAPTERS if homes[adapter] != homes["conala"]]
    for fields in [{"model": "conala"}, {"adapter": "conala"}, {"model": BASE, "lora": [{"name": "conala"}]}]:
        assert ports.home_of(fields, says(other)) == homes["conala"], fields
    assert ports.are_spread({"model": BASE}, says(other))


@needs("haproxy")
def test_a_stored_response_is_found_whether_the_base_is_named_or_not(two):
    for fields in [{"model": BASE}, {}, {"adapter": "__base_model__"}]:
        status, first = post(two.url, "/v1/responses", {"input": "print", "max_output_tokens": 16, **fields})
        assert status == 200, first
        status, second = post(two.url, "/v1/responses", {"input": "again", "max_output_tokens": 16, "previous_response_id": first["id"]})
        assert status == 200, second
        for reply in [first, second] * 3:
            # What is kept is the caller's own.
            request = urllib.request.Request(f"{two.url}/v1/responses/{reply['id']}", headers={"Authorization": f"Bearer {ADMIN_KEY}"})
            with urllib.request.urlopen(request, timeout=60) as found:
                assert json.load(found)["id"] == reply["id"]


@needs("haproxy")
def test_a_prompt_larger_than_a_buffer_comes_to_the_home_of_its_adapter(two):
    home = two.home_of("conala")
    before = refusals(home)
    status, refusal = post(two.url, "/v1/completions", {"model": "conala", "max_tokens": 1, "prompt": "print " * 60_000})
    assert status == 400, refusal
    assert refusals(home) == before + 1


def read_stream(url, adapter, max_tokens, prompt):
    """Whether a stream began, and the bytes of its last line; `None` for the base, wherever."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    if adapter is not None:
        body["model"] = adapter
    has_begun, last = False, b""
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        has_begun = reply.status == 200
        for line in reply:
            last = line.strip() or last
    except (http.client.HTTPException, OSError) as error:
        last = repr(error).encode()
    finally:
        connection.close()
    return has_begun, last


@needs("haproxy")
def test_a_killed_replica_costs_only_the_streams_that_it_had_begun(tmp_path):
    num_waiting = 12
    with pool(tmp_path) as two, ThreadPoolExecutor(num_waiting) as clients:
        adapter = ADAPTERS[0]
        doomed = two.home_of(adapter)
        with Load(two.url) as load, stream(two, adapter, max_tokens=2000) as cut:
            load.wait_for(10)
            # Longer prompts than are computed in no time, and no two alike.
            prompts = [f"# {number}\n" + "print(1)\n" * 60 for number in range(num_waiting)]
            waiting = [clients.submit(read_stream, two.url, adapter, 2, prompt) for prompt in prompts]
            wait_until(lambda: sum(map(requests_running, two.replicas)) > 9, "they do not come")
            doomed.process.kill()
            with pytest.raises((http.client.IncompleteRead, ConnectionError)) as end:
                while line := cut.read1():
                    assert b"[DONE]" not in line
            print(f"the client of the stream sees {end.value!r}")
            outcomes = [one.result() for one in waiting]
            failed = [last for has_begun, last in outcomes if not has_begun]
            assert failed == [], "what had not begun was sent to the other"
            assert sum(last == b"data: [DONE]" for _, last in outcomes) > num_waiting / 2
            load.wait_for(20)
        assert load.failures() == []


@needs("haproxy")
def test_a_replica_that_stops_ends_its_streams_and_costs_nothing(tmp_path):
    with pool(tmp_path) as two:
        adapter = ADAPTERS[0]
        leaving = two.home_of(adapter)
        with Load(two.url) as load:
            with stream(two, adapter, max_tokens=30) as whole:
                leaving.process.terminate()
                assert b"data: [DONE]" in whole.read()
            load.wait_for(20)
            assert leaving.process.wait(MAX_WAIT_SECONDS) == 0
        assert load.failures() == []


@needs("haproxy")
def test_replicas_are_upgraded_one_after_the_other_without_a_failed_request(tmp_path):
    environment = {"LORRY__ENGINE__KV_CACHE_MIB": "64", "LORRY__ENGINE__THREADS": "1"}
    arguments = ["--model", "smollm2:135m", "--adapters", ""]
    ports = [free_port() for _ in range(2)]
    with ExitStack() as stack:
        start = lambda port: stack.enter_context(starting(*arguments, port=port, environment=environment))
        replicas = [start(port) for port in ports]
        for process, log in replicas:
            wait_until_serving(process, log)
        url = stack.enter_context(haproxy(tmp_path, [f"127.0.0.1:{port}" for port in ports]))
        wait_until(lambda: status_of(f"{url}/health") == 200, "HAProxy finds no replica")
        ended, is_over = [], threading.Event()

        def stream_on(number):
            while not is_over.is_set():
                ended.append(read_stream(url, None, 16, f"# {number}\n"))

        with ThreadPoolExecutor(4) as clients:
            streaming = [clients.submit(stream_on, number) for number in range(4)]
            try:
                for at, (process, _) in enumerate(replicas):
                    process.terminate()
                    assert process.wait(MAX_WAIT_SECONDS) == 0
                    process, log = start(ports[at])
                    replica = Server(wait_until_serving(process, log), log, process)
                    # Until then the other must not go.
                    wait_until(lambda: requests_ended(replica), "the new replica gets no requests")
            finally:
                is_over.set()
            for one in streaming:
                one.result()
        assert len(ended) > 20 and set(ended) == {(True, b"data: [DONE]")}, set(ended)


@needs("haproxy")
def test_without_a_replica_the_refusal_is_json_and_health_says_so(tmp_path):
    with haproxy(tmp_path, [f"127.0.0.1:{free_port()}" for _ in range(2)]) as url:
        wait_until(lambda: status_of(f"{url}/health") == 503, "HAProxy does not see that there is none")
        status, refusal = ask(url, model=BASE)
        assert status == 503
        assert json.loads(refusal)["error"]["code"] == "unavailable"


def test_the_service_manager_is_told_how_the_server_is(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(MAX_WAIT_SECONDS)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with serving("--model", "smollm2:135m", "--adapters", "", environment=environment) as server:
            told = [manager.recv(4096).decode().split("\n") for _ in range(4)]
            assert told[0][:2] == ["READY=1", "STATUS=serving smollm2:135m"], told
            assert told[1:] == [["WATCHDOG=1", ""]] * 3, told
            server.process.terminate()
            while (last := manager.recv(4096).decode().split("\n"))[0] == "WATCHDOG=1":
                pass
            assert last[0] == "STOPPING=1" and last[1].startswith("STATUS=stopping"), last


@needs("systemd-analyze")
def test_the_unit_of_systemd_is_valid(tmp_path):
    # It names a program that is not installed here.
    unit = (DEPLOY / "systemd" / "lorry.service").read_text().replace("/usr/local/bin/lorry", sys.executable)
    (tmp_path / "lorry.service").write_text(unit)
    run = subprocess.run(["systemd-analyze", "verify", tmp_path / "lorry.service"], capture_output=True, text=True)
    assert run.returncode == 0 and "lorry.service" not in run.stderr, run.stderr
    # It needs the network, a file system to read and a state to write: of 10, what else it is exposed to is little.
    sandbox = ["systemd-analyze", "security", "--offline=true", "--threshold=20", tmp_path / "lorry.service"]
    run = subprocess.run(sandbox, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


PROMETHEUS = DEPLOY / "prometheus"
EXPERIMENT = """
[[experiments.run]]
name = "first"
alias = "coder"
arms = [
    { name = "base", model = "qwen2.5-coder:0.5b", weight = 1 },
    { name = "tuned", model = "conala", weight = 1 },
]
"""


@needs("promtool")
@pytest.mark.parametrize("check", [["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]])
def test_promtool_passes(check):
    run = subprocess.run(["promtool", *check], cwd=PROMETHEUS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@needs("promtool")
def test_every_alert_has_a_test():
    alerts = re.findall(r"alert: (\w+)", (PROMETHEUS / "alerts.yml").read_text())
    tests = (PROMETHEUS / "alerts_test.yml").read_text()
    raised = re.findall(r"alertname: (\w+)\n +exp_alerts", tests)
    assert sorted(raised) == sorted(alerts)


def use(url):
    """In every way that a panel shows."""
    for model in [BASE, *ADAPTERS, "coder"]:
        for _ in range(2):
            assert ask(url, model=model, max_tokens=4, prompt="def add(a, b):")[0] == 200
    # Its text repeats itself, so that tokens are guessed.
    assert ask(url, model=BASE, max_tokens=40, prompt="x = [1, 2, 3]\n" * 12)[0] == 200
    assert ask(url, model="nobody")[0] == 404
    body = {"model": "bash", "prompt": "ls", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as leaving:
        leaving.readline()


@contextmanager
def prometheus(folder, address, key):
    """Prometheus as deploy/ configures it, but for one server, its key, and every second."""
    (folder / "lorry.key").write_text(key)
    config = (PROMETHEUS / "prometheus.yml").read_text()
    for shipped, here in {
        "lorry:8080": address,
        ": 15s": ": 1s",
        "    # authorization:\n    #   credentials_file: /etc/prometheus/lorry.key":
            f"    authorization:\n      credentials_file: {folder / 'lorry.key'}",
        "alerts.yml": str(PROMETHEUS / "alerts.yml"),
    }.items():
        assert shipped in config
        config = config.replace(shipped, here)
    (folder / "prometheus.yml").write_text(config)
    url = f"http://127.0.0.1:{free_port()}"
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={url.removeprefix('http://')}",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: status_of(f"{url}/-/ready") == 200, "Prometheus is not ready")
        yield url
    finally:
        process.terminate()
        process.wait()


def query(url, expression):
    with urllib.request.urlopen(f"{url}/api/v1/query?query={quote(expression)}", timeout=10) as reply:
        return json.load(reply)["data"]["result"]


@needs("prometheus")
def test_every_panel_of_the_dashboards_has_data_of_a_used_server(tmp_path):
    config = tmp_path / "lorry.toml"
    config.write_text(f'[server]\nadmin_key = "{ADMIN_KEY}"\n[[server.keys]]\nname = "team"\nkey = "team"\nadapters = []\n{EXPERIMENT}')
    # Adapters make room for each other, so that some are loaded while Prometheus looks.
    environment = {
        "LORRY__ENGINE__KV_CACHE_MIB": "64",
        "LORRY__ADAPTERS__HOST_BUDGET_MIB": "16",
        "LORRY__ADAPTERS__MIN_RESIDENCY_SECONDS": "0",
    }
    with serving("--adapters", REPOSITORY / "adapters", "--config", config, environment=environment) as server:
        with prometheus(tmp_path, server.url.removeprefix("http://"), ADMIN_KEY) as url:
            # Of what grows, two scrapes with something between them.
            for scrapes in (1, 3):
                use(server.url)
                seen = f"count_over_time(lorry_cancelled_total[5m]) >= {scrapes}"
                wait_until(lambda: query(url, seen), "Prometheus does not see what was used")
            run = subprocess.run(
                [sys.executable, DEPLOY / "grafana" / "check.py", url, "--interval", "5m"],
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stdout + run.stderr
            print(run.stdout)
