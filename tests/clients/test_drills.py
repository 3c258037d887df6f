"""What goes wrong in production, in short: a few seconds each, with the real binary and real files.

Elsewhere: votes that survive a kill and a disk that takes none (test_experiments.py), replicas that are killed, stopped and
upgraded behind HAProxy (test_deploy.py), requests that are hostile (benches/hostile.py), an engine that fails
(src/http/tests/endings.rs).
"""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from adapter_soak import ADAPTER_BYTES, Weights
from lorry_server import serving, starting

BASE = "smollm2:135m"
# A bound, and no more: machines may be slow.
MAX_WAIT_SECONDS = 120
CONFIG = """
[server]
admin_key = "admin"
[engine]
kv_cache_mib = 256
"""
MIB = 1 << 20


@pytest.fixture(scope="module")
def weights():
    return Weights(1)


@contextmanager
def running(folder, config="", environment={}):
    """A server that keeps all that it writes in `folder`, and its client."""
    for name in ("adapters", "icl"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "lorry.toml").write_text(CONFIG + config)
    environment = {
        "LORRY__ICL__DIR": str(folder / "icl"),
        "LORRY__EXPERIMENTS__PATH": str(folder / "experiments.db"),
        **environment,
    }
    arguments = ["--model", BASE, "--adapters", folder / "adapters", "--config", folder / "lorry.toml"]
    with serving(*arguments, environment=environment) as server, client_of(server) as http:
        yield server, http


def client_of(server):
    return httpx.Client(base_url=server.url, headers={"Authorization": "Bearer admin"}, timeout=300)


def complete(http, **fields):
    return http.post("/v1/completions", json={"prompt": "def f", "max_tokens": 2, "ignore_eos": True, **fields})


def put_adapter(http, name, variant):
    return http.put(f"/v1/adapters/{name}", json={"path": f"variants/{variant}"})


def put_store(http, number):
    examples = [{"instruction": f"{number}.{index}", "code": str(index)} for index in range(200)]
    return http.put("/v1/icl/store", json={"examples": examples})


def metric(http, name):
    """The sum over its series."""
    lines = (line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line.startswith(name))
    return sum(float(value) for series, value in lines if series.split("{")[0] == name)


def wait_until(condition, what):
    deadline = time.monotonic() + MAX_WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"after {MAX_WAIT_SECONDS} s: {what}"
        time.sleep(0.05)


@contextmanager
def repeating(*jobs):
    """Does each job again and again, in a thread of its own, until the block ends; `job(number)` counts from 0."""
    is_over, faults = threading.Event(), []

    def repeat(job):
        number = 0
        while not is_over.is_set():
            try:
                job(number)
            except httpx.TransportError:
                if not is_over.is_set():
                    faults.append("the server is gone")
                return
            except AssertionError as fault:
                faults.append(fault)
                return
            number += 1

    threads = [threading.Thread(target=repeat, args=[job]) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        # Who kills the server sets it first.
        yield is_over
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert faults == []


@contextmanager
def small_disk(path, size):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("skipped: no small disk can be mounted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_what_was_acknowledged_is_whole_after_a_kill_under_load(tmp_path, weights):
    (tmp_path / "adapters" / "variants").mkdir(parents=True)
    for variant in range(4):
        weights.write(tmp_path / "adapters" / "variants" / str(variant), variant)
    generations, begun, done, votes = {}, {}, {}, []
    with running(tmp_path) as (server, http), ExitStack() as clients:
        for variant in range(4):
            generations[variant] = put_adapter(http, "probe", variant).json()["generation"]

        def change_adapters(http, number):
            name, variant = f"a{number % 3}", (number // 3) % 4
            begun[name] = generations[variant]
            assert put_adapter(http, name, variant).status_code in (200, 201)
            done[name] = generations[variant]

        def change_stores(http, number):
            assert put_store(http, number).status_code == 200
            done["store"] = number

        def vote(http, number):
            comparison = http.post("/v1/compare", json={"prompt": "x", "max_tokens": 1, "arms": [{"name": "a"}, {"name": "b"}]})
            body = {"id": comparison.json()["id"], "kind": "winner", "arm": "b"}
            assert http.post("/v1/feedback", json=body).status_code == 200
            votes.append(body["id"])

        def ask(http, number):
            assert complete(http, model="probe", max_tokens=8).status_code == 200

        jobs = [change_adapters, change_stores, vote, ask]
        jobs = [lambda number, job=job, http=clients.enter_context(client_of(server)): job(http, number) for job in jobs]
        with repeating(*jobs) as is_over:
            wait_until(lambda: len(done) == 4 and len(votes) > 5, "nothing is acknowledged")
            is_over.set()
            server.process.kill()
            server.process.wait()
    with running(tmp_path) as (_, http):
        for name in ("a0", "a1", "a2"):
            status = http.get(f"/v1/adapters/{name}").json()
            assert complete(http, model=name).status_code == 200, status
            served = http.get(f"/v1/adapters/{name}").json()["generation"]
            assert served in (done[name], begun[name]), "the acknowledged generation, or the one that was on its way"
        assert [adapter["name"] for adapter in http.get("/v1/adapters").json()["data"] if adapter["error"]] == []
        store = http.get("/v1/icl/store").json()["examples"]
        assert int(store[0]["instruction"].split(".")[0]) >= done["store"] and len(store) == 200
        for comparison in votes:
            assert [vote["arm"] for vote in http.get(f"/v1/feedback/{comparison}").json()["votes"]] == ["b"]


def test_a_full_disk_refuses_changes_and_serves_what_was_there(tmp_path, weights):
    with small_disk(tmp_path / "disk", 6 * ADAPTER_BYTES) as disk:
        (disk / "adapters" / "variants").mkdir(parents=True)
        for variant in range(2):
            weights.write(disk / "adapters" / "variants" / str(variant), variant)
        # What is open for writing keeps a disk from becoming read-only.
        with running(disk, environment={"LORRY__EXPERIMENTS__PATH": str(tmp_path / "experiments.db")}) as (_, http):
            assert put_adapter(http, "a", 0).status_code == 201 and put_store(http, 0).status_code == 200
            served = complete(http, model="a").json()
            with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError):
                while True:
                    file.write(bytes(4096))
            for _ in range(2):
                for refused in (put_adapter(http, "a", 1), put_store(http, 1)):
                    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "not_writable"), refused.text
            assert complete(http, model="a").json()["adapter"] == served["adapter"]
            assert http.get("/v1/icl/store").json()["examples"][0]["instruction"] == "0.0"
            (disk / "filler").unlink()
            assert put_adapter(http, "a", 1).status_code == 200 and put_store(http, 1).status_code == 200
            assert complete(http, model="a").json()["adapter"]["generation"] != served["adapter"]["generation"]
            # Busy while a file of it is being written.
            remount = ["mount", "-o", "remount,ro", disk]
            wait_until(lambda: subprocess.run(remount).returncode == 0, "the disk does not become read-only")
            for refused, key in ((put_adapter(http, "a", 0), "adapters"), (put_store(http, 2), "icl.dir")):
                assert (refused.status_code, refused.json()["error"]["code"]) == (507, "not_writable"), refused.text
                assert key in refused.json()["error"]["message"]
            assert http.get("/v1/icl/store").json()["examples"][0]["instruction"] == "1.0"


def test_the_folder_of_adapters_may_vanish_and_return(tmp_path, weights):
    for variant, name in enumerate(("kept", "unread")):
        weights.write(tmp_path / "adapters" / name, variant)
    config = "[adapters]\nhost_budget_mib = 1\nmin_residency_seconds = 0\nrescan_seconds = 1\n"
    with running(tmp_path, config) as (server, http):
        assert complete(http, model="kept").status_code == 200
        (tmp_path / "adapters").rename(tmp_path / "away")
        wait_until(lambda: "cannot be read" in server.log(), "the loss is not noticed")
        for model in (BASE, "kept"):
            assert complete(http, model=model).status_code == 200, "what is in memory is served"
        refused = complete(http, model="unread")
        assert 400 <= refused.status_code < 600 and refused.json()["error"]["message"]
        assert complete(http, model=BASE).status_code == 200 and http.get("/health").status_code == 200
        # Another folder of that name, as a volume that is mounted again.
        shutil.copytree(tmp_path / "away", tmp_path / "adapters")
        for model in ("kept", "unread"):
            wait_until(lambda: complete(http, model=model).status_code == 200, f"{model} does not come back")


def test_who_never_reads_is_left_and_who_reads_slowly_gets_everything(tmp_path):
    num_replies = 64
    with running(tmp_path, environment={"LORRY__SERVER__WRITE_TIMEOUT_SECONDS": "3"}) as (server, http):
        size = len(http.get("/openapi.json").content)
        address = (http.base_url.host, http.base_url.port)
        with socket.socket() as deaf, socket.socket() as slow:
            for client in (deaf, slow):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 10)
                client.connect(address)
                # More than the system keeps on the way.
                client.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * num_replies)
            body = json.dumps({"prompt": "def f", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
            deaf_streams = [socket.create_connection(address) for _ in range(8)]
            for stream in deaf_streams:
                stream.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            num_read, begun = 0, time.monotonic()
            while num_read < size * num_replies:
                more = slow.recv(16 << 10)
                assert more, f"cut off after {num_read} bytes"
                num_read += len(more)
                # For longer than one may take for nothing.
                if time.monotonic() - begun < 5:
                    time.sleep(0.03)
            assert complete(http).status_code == 200
            with pytest.raises(ConnectionResetError):
                while deaf.recv(MIB):
                    pass
                raise AssertionError("it got everything, though it read nothing for long")
            for stream in deaf_streams:
                stream.close()
        wait_until(lambda: metric(http, "vllm:num_requests_running") == 0, "requests run that nobody reads")
        assert metric(http, "vllm:num_requests_waiting") == 0


def test_requests_are_served_beside_ten_thousand_idle_connections(tmp_path):
    before, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of as many as are allowed, some are for other things.
    num_idle = 10_000 if hard == resource.RLIM_INFINITY else min(10_000, hard - 1000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before, num_idle + 1000), hard))
    environment = {"LORRY__SERVER__MAX_CONNECTIONS": str(num_idle + 10), "LORRY__SERVER__HEADER_TIMEOUT_SECONDS": "60"}
    with running(tmp_path, environment=environment) as (server, http):
        address = (http.base_url.host, http.base_url.port)
        with ExitStack() as idle:
            for _ in range(num_idle):
                idle.enter_context(socket.create_connection(address))
            assert complete(http).status_code == 200 and http.get("/health").status_code == 200
            with client_of(server) as another:
                assert complete(another).status_code == 200
            # A connection that waits is there, and costs little.
            idle_files = len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))
            assert idle_files > num_idle
            print(f"{num_idle} idle connections; {resident_bytes(server) // MIB} MiB")
        wait_until(lambda: len(list(Path(f"/proc/{server.process.pid}/fd").iterdir())) < 500, "they are not let go")


def resident_bytes(server):
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# Adds the seconds in the file CLOCK_OFFSET to what the C library says of the time of day.
CLOCK = r"""
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time) {
    int status = syscall(SYS_clock_gettime, clock, time);
    if (clock == CLOCK_REALTIME) {
        long seconds = 0;
        FILE *offset = fopen(getenv("CLOCK_OFFSET"), "r");
        if (offset) {
            if (fscanf(offset, "%ld", &seconds) != 1) seconds = 0;
            fclose(offset);
        }
        time->tv_sec += seconds;
    }
    return status;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="skipped: g++ is not installed (make compiler)")
def test_a_clock_that_jumps_breaks_nothing(tmp_path, weights):
    (tmp_path / "clock.c").write_text(CLOCK)
    build = ["g++", "-x", "c", "-shared", "-fPIC", "-o", tmp_path / "clock.so", tmp_path / "clock.c"]
    subprocess.run(build, check=True)
    offset = tmp_path / "offset"
    day = 86_400
    for variant in range(3):
        weights.write(tmp_path / "adapters" / "variants" / str(variant), variant)
    config = '[[server.keys]]\nname = "slow"\nkey = "slow"\nadapters = []\nrequests_per_minute = 1\n'
    environment = {"LD_PRELOAD": str(tmp_path / "clock.so"), "CLOCK_OFFSET": str(offset)}
    with running(tmp_path, config, environment) as (_, http):

        def jump(days):
            offset.write_text(str(days * day))
            created = complete(http).json()["created"]
            assert abs(created - time.time() - days * day) < day / 2, "the server sees another clock"

        slow = {"Authorization": "Bearer slow"}
        body = {"prompt": "def f", "max_tokens": 1}
        assert http.post("/v1/completions", json=body, headers=slow).status_code == 200
        jump(1)
        limited = http.post("/v1/completions", json=body, headers=slow)
        assert limited.status_code == 429 and 0 < int(limited.headers["retry-after"]) <= 60
        assert put_adapter(http, "a", 0).status_code == 201
        streamed = {"prompt": "def f", "max_tokens": 200, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=streamed) as reply:
            lines = filter(None, reply.iter_lines())
            next(lines)
            jump(2)
            first = put_adapter(http, "a", 1).json()["generation"]
            jump(-2)
            second = put_adapter(http, "a", 2).json()
            assert list(lines)[-1] == "data: [DONE]"
        # The one before is that which was there before, whatever the clock said then.
        assert second["previous_generations"][0] == first
        assert http.post("/v1/adapters/a/rollback").json()["generation"] == first
        comparison = http.post("/v1/compare", json={"prompt": "x", "max_tokens": 1, "arms": [{"name": "a"}, {"name": "b"}]})
        vote = {"id": comparison.json()["id"], "kind": "winner", "arm": "b"}
        assert http.post("/v1/feedback", json=vote).status_code == 200
        assert http.get("/health").status_code == 200


def test_a_server_that_stops_under_load_ends_its_streams_and_refuses_what_is_new(tmp_path):
    num_streams = 6
    with running(tmp_path) as (server, http), ThreadPoolExecutor(num_streams) as pool:
        begun = threading.Barrier(num_streams + 1)

        def read(number):
            body = {"prompt": f"def f{number}", "max_tokens": 60, "stream": True, "ignore_eos": True}
            with client_of(server) as http, http.stream("POST", "/v1/completions", json=body) as reply:
                lines = filter(None, reply.iter_lines())
                next(lines)
                begun.wait(MAX_WAIT_SECONDS)
                return list(lines)[-1]

        streams = [pool.submit(read, number) for number in range(num_streams)]
        begun.wait(MAX_WAIT_SECONDS)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get("/health").status_code == 503, "it does not say that it stops")
        refused = complete(http)
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        assert [stream.result() for stream in streams] == ["data: [DONE]"] * num_streams
        assert server.process.wait(MAX_WAIT_SECONDS) == 0


def test_a_server_that_is_told_to_stop_while_it_loads_does_so(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The default model, which takes longer to load than to ask for.
    with starting("--adapters", "", port=port) as (process, log_path):

        # It listens before it waits for signals, and answers after.
        def answers():
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 503
            except httpx.TransportError:
                return False

        wait_until(answers, "it does not say that it loads")
        process.terminate()
        assert process.wait(MAX_WAIT_SECONDS) == 0
        assert "told to stop before" in log_path.read_text()


# What takes the model half a minute to answer.
LONG = "Write a long story about a dragon, of many chapters."


@pytest.mark.parametrize(
    "path, fields, last_event",
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 5000}, b'data: {"error":{'),
        ("/v1/responses", {"input": LONG, "max_output_tokens": 5000}, b"event: response.failed\n"),
        ("/v1/messages", {"messages": [{"role": "user", "content": LONG}], "max_tokens": 5000}, b"event: error\n"),
        ("/api/generate", {"model": BASE, "prompt": LONG, "options": {"temperature": 0, "num_predict": 5000}}, b'{"error":"'),
    ],
)
def test_told_twice_to_stop_a_server_cuts_its_streams_off_with_an_error(tmp_path, path, fields, last_event):
    with running(tmp_path) as (server, http):
        temperature = {} if "options" in fields else {"temperature": 0}
        with http.stream("POST", path, json={**fields, **temperature, "stream": True}) as reply:
            parts = reply.iter_bytes()
            read = next(parts)
            assert reply.status_code == 200, read
            server.process.send_signal(signal.SIGTERM)
            # Two that come at once are one.
            wait_until(lambda: http.get("/health").status_code == 503, "it does not say that it stops")
            server.process.send_signal(signal.SIGTERM)
            read += b"".join(parts)
        separator = b"\n" if path.startswith("/api") else b"\n\n"
        assert read.strip().split(separator)[-1].startswith(last_event), read[-300:]
        assert server.process.wait(MAX_WAIT_SECONDS) == 0


@contextmanager
def limited_memory():
    """A control group that is joined by processes that start in the block that it gives, and the file with its limit."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        root, limit = {
            "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            "": ("/sys/fs/cgroup", "memory.max"),
        }.get(controllers, (None, None))
        if root is None:
            continue
        parent = Path(root + own)
        group = parent / f"lorry-drill-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / limit).exists():
                yield Group(parent, group), group / limit
                return
        finally:
            group.rmdir()
    pytest.skip("skipped: no control group for memory can be made here")


class Group:
    def __init__(self, parent, group):
        self.parent, self.group = parent, group

    def __enter__(self):
        (self.group / "cgroup.procs").write_text(str(os.getpid()))

    def __exit__(self, *_):
        (self.parent / "cgroup.procs").write_text(str(os.getpid()))


def test_a_kv_store_that_the_control_group_does_not_hold_is_refused_at_the_start(tmp_path):
    with limited_memory() as (group, limit), ExitStack() as stack:
        limit.write_text(str(320 * MIB))
        with group, pytest.raises(RuntimeError, match="(?s)ended with 1 .*control group .* lower engine.kv_cache_mib"), running(tmp_path):
            pass
        with group:
            server, http = stack.enter_context(running(tmp_path, environment={"LORRY__ENGINE__KV_CACHE_MIB": "64"}))
        assert complete(http).status_code == 200


def test_pressure_on_memory_is_answered_by_refusals(tmp_path):
    in_flight = 32 * MIB
    environment = {"LORRY__SERVER__MAX_BODY_BYTES_IN_FLIGHT": str(in_flight)}
    with limited_memory() as (group, limit), ExitStack() as stack:
        with group:
            server, http = stack.enter_context(running(tmp_path, environment=environment))
        assert complete(http).status_code == 200
        # What bodies may hold, what is made of them, and some more for connections.
        limit.write_text(str(resident_bytes(server) + 2 * in_flight + 32 * MIB))
        prompt = "def f(x): " * (8 * MIB // 10)

        def flood(number):
            with client_of(server) as http:
                try:
                    return complete(http, prompt=prompt if number % 2 else f"{number}").status_code
                except httpx.TransportError as error:
                    return repr(error)

        with ThreadPoolExecutor(32) as pool:
            statuses = list(pool.map(flood, range(96)))
        assert server.process.poll() is None, f"the kernel has ended it: {statuses}"
        assert set(statuses) <= {200, 400, 503} and {200, 503} <= set(statuses), statuses
        assert complete(http).status_code == 200
