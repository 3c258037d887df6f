#!/usr/bin/env python3
"""A soak of the adapter registry: clients ask for adapters at random while folders are added, replaced and removed.

More adapters than the host budget holds, so that loads and evictions go on all the time. Every reply names the
generation that answered; its text must be what that generation says when it is served alone, the generation must be one
that the folder held while the request ran, and no request for an adapter that stays may fail. At the end everything is
removed, and leases and bytes must be back at zero.

    target/release/lorry is served; python tests/clients/adapter_soak.py --seconds 600
"""

import argparse
import json
import os
import random
import shutil
import struct
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lorry_server import serving

BASE = "smollm2:135m"
LAYERS, HIDDEN, KV_WIDTH, RANK = 30, 576, 192, 8
PROMPT = "def merge(left, right):\n"
MAX_TOKENS = 12
# f16 bytes of A and B of q_proj and v_proj in every layer.
ADAPTER_BYTES = 2 * LAYERS * RANK * (HIDDEN + HIDDEN + HIDDEN + KV_WIDTH)
COUNTED = ("lorry_adapter_loads_total{", "lorry_adapter_evictions_total{")
# After a folder has changed, how long the generation before it may still answer.
NOTICE_SECONDS = 3.0


@dataclass
class Soak:
    num_adapters: int = 200
    num_resident: int = 20
    num_clients: int = 8
    seconds: float = 600
    seed: int = 1


@dataclass
class Report:
    requests: int = 0
    changes: dict = field(default_factory=lambda: {"added": 0, "replaced": 0, "removed": 0})
    loads: int = 0
    evictions: int = 0
    max_resident_bytes: int = 0
    faults: list = field(default_factory=list)


class Weights:
    """Random adapters of one shape; number `i` is always the same bytes, and two numbers differ."""

    def __init__(self, seed):
        rng = random.Random(seed)
        # Slices of a pool are random enough, and quick.
        values = {name: [struct.pack("<e", rng.gauss(0, std)) for _ in range(4096)] for name, std in (("A", 0.04), ("B", 0.08))}
        self.pool = {name: b"".join(rng.choices(packed, k=400_000)) for name, packed in values.items()}
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        self.parts = []
        for layer in range(LAYERS):
            for module, out in (("q_proj", HIDDEN), ("v_proj", KV_WIDTH)):
                for name, shape in (("A", [RANK, HIDDEN]), ("B", [out, RANK])):
                    size = 2 * shape[0] * shape[1]
                    key = f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{name}.weight"
                    header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
                    self.parts.append((name, size))
                    offset += size
        text = json.dumps(header).encode()
        self.header = struct.pack("<Q", len(text)) + text

    def write(self, folder, number):
        rng = random.Random(number)
        data = [self.header]
        for name, size in self.parts:
            start = 2 * rng.randrange((len(self.pool[name]) - size) // 2)
            data.append(self.pool[name][start : start + size])
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(b"".join(data))
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder


def complete(url, model):
    """`(generation, (text, log-probabilities))` of the reply; the numbers tell apart what says the same."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        reply = json.load(response)
    choice = reply["choices"][0]
    return reply["adapter"]["generation"], (choice["text"], tuple(choice["logprobs"]["token_logprobs"]))


def metrics(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    values = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in values}


def total(values, name):
    return int(sum(value for series, value in values.items() if series.startswith(f"{name}{{")))


@contextmanager
def server(root, host_budget_mib):
    os.environ["LORRY__ADAPTERS__HOST_BUDGET_MIB"] = str(host_budget_mib)
    try:
        with serving("--model", BASE, "--adapters", root) as started:
            yield started.url
    finally:
        del os.environ["LORRY__ADAPTERS__HOST_BUDGET_MIB"]


def known_texts(folders, host_budget_mib):
    """What each adapter says, `{generation: (text, log-probabilities)}`, from a server in which nothing changes."""
    with tempfile.TemporaryDirectory(dir=folders[0].parent.parent) as root:
        for folder in folders:
            shutil.copytree(folder, Path(root) / folder.name, copy_function=os.link)
        with server(root, host_budget_mib) as url, ThreadPoolExecutor(4) as pool:
            return dict(pool.map(lambda folder: complete(url, folder.name), folders))


class World:
    """Which adapter is in which folder, and since when: `history[name]` is `[(number, since, until)]`."""

    def __init__(self, soak, workspace):
        self.soak, self.workspace = soak, workspace
        self.root, self.staging, self.trash = workspace / "root", workspace / "staging", workspace / "trash"
        for folder in (self.root, self.staging, self.trash):
            folder.mkdir()
        self.weights = Weights(soak.seed)
        self.variants = [self.weights.write(self.staging / f"v{i}", i) for i in range(2 * soak.num_adapters)]
        self.lock = threading.Lock()
        self.history, self.leaving, self.num_moves = {}, set(), 0

    def name(self, index):
        return f"soak-{index}"

    def unused(self, folder):
        """A path in `folder` where nothing was ever."""
        self.num_moves += 1
        return folder / f"moved-{self.num_moves}"

    def put(self, index, number):
        """Adds or replaces a folder, whole at once."""
        fresh = self.unused(self.workspace)
        shutil.copytree(self.variants[number], fresh, copy_function=os.link)
        name = self.name(index)
        with self.lock:
            now = time.monotonic()
            spans = self.history.setdefault(name, [])
            if spans and spans[-1][2] is None:
                spans[-1] = (*spans[-1][:2], now)
            spans.append((number, now, None))
        target = self.root / name
        if target.exists():
            target.rename(self.unused(self.trash))
        fresh.rename(target)

    def take(self, index):
        name = self.name(index)
        with self.lock:
            self.leaving.add(name)
            number, since, _ = self.history[name][-1]
            self.history[name][-1] = (number, since, time.monotonic())
        (self.root / name).rename(self.unused(self.trash))

    def present(self):
        """Names that have been there for long enough to be known, and are to stay."""
        settled = time.monotonic() - NOTICE_SECONDS
        with self.lock:
            return [n for n, spans in self.history.items() if n not in self.leaving and spans[0][1] < settled]

    def numbers_between(self, name, start, end):
        with self.lock:
            spans = list(self.history[name])
        return {n for n, since, until in spans if since <= end and (until is None or until + NOTICE_SECONDS >= start)}


def client(world, url, generations, report, lock, deadline, seed):
    rng = random.Random(seed)
    while time.monotonic() < deadline:
        name = rng.choice(world.present())
        start = time.monotonic()
        try:
            generation, text = complete(url, name)
            end = time.monotonic()
            allowed = world.numbers_between(name, start, end)
            number, expected = generations.get(generation, (None, None))
            fault = None
            if number not in allowed:
                fault = f"{name} answered with {number}, the folder held {sorted(allowed)}"
            elif text != expected:
                fault = f"{name} ({number}) said {text!r}, alone it says {expected!r}"
        except urllib.error.HTTPError as error:
            fault = f"{name}: {error.code} {error.read().decode()[:300]}"
            # One that left in the meantime may be unknown.
            if error.code == 404 and name in world.leaving:
                fault = None
        with lock:
            report.requests += 1
            if fault:
                report.faults.append(fault)


def change(world, report, deadline, seed):
    try:
        change_until(world, report, deadline, seed)
    except Exception as error:
        # A soak in which nothing changes any more shows nothing.
        report.faults.append(f"the changes ended: {error!r}")


def change_until(world, report, deadline, seed):
    rng = random.Random(seed)
    count = world.soak.num_adapters
    gone = set()
    while time.monotonic() < deadline:
        time.sleep(0.4)
        kind = rng.choice(["added", "replaced", "replaced", "removed"])
        if kind == "added" and gone:
            index = gone.pop()
            with world.lock:
                # Forgotten, so that clients wait until it is known again.
                world.history.pop(world.name(index))
                world.leaving.discard(world.name(index))
            world.put(index, rng.choice([index, count + index]))
        elif kind == "replaced":
            index = rng.choice([i for i in range(count) if i not in gone])
            number = world.history[world.name(index)][-1][0]
            world.put(index, index if number >= count else count + index)
        elif kind == "removed" and len(gone) < count // 4:
            index = rng.choice([i for i in range(count) if i not in gone])
            world.take(index)
            gone.add(index)
            # Until nobody can still be waiting for it.
            time.sleep(0.2)
        else:
            continue
        report.changes[kind] += 1


def run(soak):
    report, lock = Report(), threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        world = World(soak, Path(folder))
        # A little more than the weights: manifests and rounding to whole MiB.
        budget_mib = -(-soak.num_resident * ADAPTER_BYTES // (1 << 20))
        known = known_texts(world.variants, 4096)
        if len(set(known.values())) < len(known):
            raise RuntimeError("two adapters cannot be told apart")
        # The same bytes have the same generation, whatever the folder is called; order is that of the variants.
        generations = {g: (number, text) for number, (g, text) in enumerate(known.items())}
        if len(generations) != len(world.variants):
            raise RuntimeError("two adapters have one generation")
        for index in range(soak.num_adapters):
            world.put(index, index)
        with server(world.root, budget_mib) as url:
            time.sleep(NOTICE_SECONDS)
            deadline = time.monotonic() + soak.seconds
            threads = [threading.Thread(target=change, args=(world, report, deadline, soak.seed))]
            for i in range(soak.num_clients):
                arguments = (world, url, generations, report, lock, deadline, soak.seed + 1 + i)
                threads.append(threading.Thread(target=client, args=arguments))
            for thread in threads:
                thread.start()
            counted = {}
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.5)
                values = metrics(url)
                # A series goes with its adapter.
                counted.update({series: value for series, value in values.items() if series.startswith(COUNTED)})
                resident = values["lorry_adapter_resident_bytes"]
                report.max_resident_bytes = max(report.max_resident_bytes, int(resident))
                if resident > budget_mib << 20:
                    report.faults.append(f"{resident:.0f} bytes are resident, the budget is {budget_mib} MiB")
            for folder in world.root.iterdir():
                if not folder.name.startswith("."):
                    folder.rename(world.unused(world.trash))
            end = time.monotonic() + 30
            while time.monotonic() < end:
                values = metrics(url)
                left = {name: values[name] for name in ("lorry_adapter_leases", "lorry_adapter_resident_bytes", "lorry_adapters_registered")}
                if not any(left.values()):
                    break
                time.sleep(0.2)
            else:
                report.faults.append(f"at the end there is left: {left}")
            report.loads = total(counted, "lorry_adapter_loads_total")
            report.evictions = total(counted, "lorry_adapter_evictions_total")
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=Soak.seconds)
    parser.add_argument("--adapters", type=int, default=Soak.num_adapters)
    parser.add_argument("--resident", type=int, default=Soak.num_resident)
    parser.add_argument("--clients", type=int, default=Soak.num_clients)
    parser.add_argument("--seed", type=int, default=Soak.seed)
    args = parser.parse_args()
    report = run(Soak(args.adapters, args.resident, args.clients, args.seconds, args.seed))
    print(json.dumps({**vars(report), "faults": report.faults[:20], "num_faults": len(report.faults)}, indent=1))
    raise SystemExit(bool(report.faults))


if __name__ == "__main__":
    main()
