#!/usr/bin/env python3
"""Runs the same load on lorry and on its peers in turn (A B A B) and prints a Markdown table with their ratios.

The other server of --openai-url has to run already; everything else is started and stopped here, on the loopback, one at
a time. Every figure is the median of --rounds rounds. Nothing else should run on the machine.
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import adapters
import edits
import load
from servers import LlamaCpp, Lorry, Server

Measurement = Callable[[], dict[str, float]]
RATE, TTFT = "tok/s", "TTFT p50, s"
# Of what the machine can do at most: the limit that a row comes nearest to.
SHARE = "share of the limit"
EDIT_SLOT_TOKENS = 1024


@dataclass
class Row:
    """One kind of work, and how each server's column is measured."""

    work: str
    columns: dict[str, Measurement]


class Comparison:
    """The rows of the table, over adapters written to `root`."""

    def __init__(self, args: argparse.Namespace, root: Path):
        self.args = args
        self.root = root
        self.lorry = Lorry(args.lorry, args.model)
        self.llama = None
        if args.llama_server:
            tools = (args.llama_server, args.llama_bench, args.llama_batched_bench)
            self.llama = LlamaCpp(args.gguf, *tools, threads=args.threads)
        self.load = load.Load([], args.clients, args.requests, args.prompt_words, args.max_tokens)
        base = adapters.Base.read(args.gguf)
        self.all_linear = self.write(base, "all", args.adapters, adapters.ALL_LINEAR)
        self.qv = self.write(base, "qv", args.adapters, adapters.QV)
        # Only registered, never asked for: small ones, so that a thousand fit into memory.
        self.write(base, "many", args.registered - args.adapters, adapters.QV)
        for folder in adapters.folders(root / "all" / "peft"):
            shutil.copytree(folder, root / "many" / "peft" / folder.name, copy_function=os.link)

    def write(self, base: adapters.Base, group: str, count: int, modules: tuple[str, ...]) -> list[Path]:
        (self.root / group / "peft").mkdir(parents=True)
        return [
            adapters.write(base, self.root / group, f"{group}-{i}", modules, self.args.rank, seed=i) for i in range(count)
        ]

    def rows(self) -> list[Row]:
        args, repeat = self.args, self.args.repeat
        prefill_share, decode_shares = ["int8_share"], ["bandwidth_share", "decode_int8_share"]
        clients, count = args.clients, f"{args.adapters} adapters of rank {args.rank}"
        rows = [
            Row("prefill, 512 tokens", {"lorry": lambda: self.lorry_bench("prefill_tok_s", prefill_share, 512, 1, 1)}),
            Row("decode, 1 sequence", {"lorry": lambda: self.lorry_bench("decode_tok_s", decode_shares, 64, 64, 1)}),
            Row("decode, 16 sequences", {"lorry": lambda: self.lorry_bench("decode_tok_s", decode_shares, 128, 64, 16)}),
            Row(f"{clients} clients, no adapter", {"lorry": lambda: self.lorry_load(None)}),
            Row(f"{clients} clients, {count}, q and v", {"lorry": lambda: self.lorry_load("qv")}),
            Row(f"{clients} clients, {count}, all linear", {"lorry": lambda: self.lorry_load("all")}),
            Row(f"the same, {args.registered} registered", {"lorry": lambda: self.lorry_load("many")}),
            Row("code edits, 1 client", {"lorry": rate(self.lorry_edits)}),
        ]
        prefill, decode, batch, none, qv, all_linear, _, code_edits = (row.columns for row in rows)
        if llama := self.llama:
            if llama.bench:
                prefill["llama.cpp"] = rate(lambda: llama.sequence(512, 0, 0, repeat))
                decode["llama.cpp"] = rate(lambda: llama.sequence(0, 64, 64, repeat))
            if llama.batched_bench:
                batch["llama.cpp"] = rate(lambda: llama.batch(128, 64, 16, repeat))
            none["llama.cpp"] = lambda: self.llama_load([])
            qv["llama.cpp"] = lambda: self.llama_load(self.qv)
            all_linear["llama.cpp"] = lambda: self.llama_load(self.all_linear)
            code_edits["llama.cpp"] = rate(self.llama_edits)
        if args.openai_url:
            bodies = [{"model": name} for name in args.openai_models.split(",")]
            server = Server(args.openai_url.rstrip("/"), bodies[0], bodies[1:])
            none[args.openai_name] = lambda: self.run_load(server, [server.base])
            if server.adapters:
                all_linear[args.openai_name] = lambda: self.run_load(server, server.adapters)
        return rows

    def lorry_bench(self, rate: str, shares: list[str], prompt_tokens: int, max_tokens: int, batch: int) -> dict[str, float]:
        figures = self.lorry.bench(prompt_tokens, max_tokens, batch, self.args.repeat)
        # A machine whose limits cannot be measured has none.
        found = [figures[share] for share in shares if share in figures]
        return {RATE: figures[rate]} | ({SHARE: max(found)} if found else {})

    def lorry_load(self, group: str | None) -> dict[str, float]:
        with self.lorry.serve(self.root / group / "peft" if group else None) as server:
            used = [body for body in server.adapters if group != "many" or body["model"].startswith("all-")]
            return self.run_load(server, used or [server.base])

    def llama_load(self, files: list[Path]) -> dict[str, float]:
        # Twice the words: a word is at most two tokens here.
        slot_tokens = 2 * self.args.prompt_words + self.args.max_tokens + 16
        with self.llama.serve(files, self.args.clients, slot_tokens) as server:
            return self.run_load(server, server.adapters or [server.base])

    def lorry_edits(self) -> float:
        with self.lorry.serve(None) as server:
            return edits.run(server.url, self.args.model, self.args.edits)

    def llama_edits(self) -> float:
        with self.llama.serve([], 1, EDIT_SLOT_TOKENS) as server:
            return edits.run(server.url, "", self.args.edits)

    def run_load(self, server: Server, bodies: list[dict]) -> dict[str, float]:
        result = asyncio.run(load.run(server.url, replace(self.load, bodies=bodies)))
        return {RATE: result.output_tok_s, TTFT: result.ttft_p50}

    def fidelity(self, reference: Path) -> str:
        """Mean absolute difference of the target's log-probability between lorry and a float32 reference."""
        differences = []
        with self.lorry.serve(None) as server:
            for case in json.loads(reference.read_text())["cases"]:
                body = {"model": self.args.model, "prompt": case["ids"], "echo": True, "max_tokens": 0, "logprobs": 1}
                scored = post(f"{server.url}/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
                differences += [abs(scored[p["pos"] + 1] - p["target_logprob"]) for p in case["positions"]]
        mean, largest = statistics.fmean(differences), max(differences)
        return f"Log-probability against float32, mean absolute difference: {mean:.4f} (largest {largest:.3f})."


def rate(measure: Callable[[], float]) -> Measurement:
    return lambda: {RATE: measure()}


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


Medians = dict[str, dict[str, dict[str, float]]]


def measure(rows: list[Row], rounds: int) -> Medians:
    """Medians by work, column and figure. The columns of a row take turns, so that a slow minute hits them all."""
    medians: Medians = {}
    for row in rows:
        samples = {column: [] for column in row.columns}
        for _ in range(rounds):
            for column, run in row.columns.items():
                samples[column].append(run())
                shown = ", ".join(f"{value:.2f} {figure}" for figure, value in samples[column][-1].items())
                print(f"{row.work}: {column}: {shown}", file=sys.stderr, flush=True)
        medians[row.work] = {
            column: {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}
            for column, runs in samples.items()
        }
    return medians


def table(medians: Medians) -> str:
    peers = list(dict.fromkeys(column for columns in medians.values() for column in columns if column != "lorry"))
    header = ["work", "lorry", SHARE, *(heading for peer in peers for heading in (peer, "ratio"))]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for work, columns in medians.items():
        share = columns["lorry"].get(SHARE)
        for figure, own in columns["lorry"].items():
            if figure == SHARE:
                continue
            cells = [f"{work}, {figure}", number(own), f"{share:.2f}" if share else "–"]
            for peer in peers:
                value = columns.get(peer, {}).get(figure)
                # Above 1 is better for lorry: a rate over the peer's, or the peer's time over lorry's.
                ratio = value and (value / own if figure == TTFT else own / value)
                cells += [number(value), f"{ratio:.2f}"] if value else ["–", "–"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def against_own_base(medians: Medians, rows: list[Row]) -> str:
    """What adapters cost each server, measured against itself."""
    _, _, _, none, qv, all_linear, many, _ = (row.work for row in rows)
    lines = ["| output against the same server's own | lorry | llama.cpp |", "|---|---|---|"]
    for name, work, reference in [
        ("q and v adapters / no adapter", qv, none),
        ("all-linear adapters / no adapter", all_linear, none),
        (f"{many} / only these", many, all_linear),
    ]:
        cells = []
        for column in ("lorry", "llama.cpp"):
            pair = [medians[w].get(column, {}).get(RATE) for w in (work, reference)]
            cells.append(f"{pair[0] / pair[1]:.2f}" if all(pair) else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(comparison: Comparison) -> str:
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    llama = f", llama.cpp {comparison.llama.version()}" if comparison.llama else ""
    return f"{datetime.date.today()}, {processor}, {os.cpu_count()} cores, {comparison.args.gguf.name}{llama}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lorry", type=Path, default=Path("target/release/lorry"))
    parser.add_argument("--model", default="qwen2.5-coder:0.5b", help="lorry's name of the base")
    parser.add_argument("--gguf", type=Path, required=True, help="the file of the same base")
    parser.add_argument("--llama-server", type=Path)
    parser.add_argument("--llama-bench", type=Path)
    parser.add_argument("--llama-batched-bench", type=Path)
    parser.add_argument("--openai-url", help="another server, running")
    parser.add_argument("--openai-models", help="names of its base and then of its adapters, separated by commas")
    parser.add_argument("--openai-name", default="other", help="heading of its column")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--registered", type=int, default=200, help="adapters in the run with many")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-words", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--edits", type=int, default=4, help="code edits, one after the other")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="runs within a round, where no server is involved")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama.cpp; lorry takes every core")
    parser.add_argument("--reference", type=Path, help="float32 log-probabilities to score lorry against")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that everything runs")
    args = parser.parse_args()
    if bool(args.openai_url) != bool(args.openai_models):
        parser.error("--openai-url and --openai-models go together")
    if args.registered < args.adapters:
        parser.error("--registered counts the --adapters too")
    if args.quick:
        args.rounds, args.repeat, args.edits, args.requests, args.max_tokens = 1, 1, 1, args.clients, 8
        args.registered = args.adapters + 8

    with tempfile.TemporaryDirectory(prefix="lorry-peers-") as folder:
        comparison = Comparison(args, Path(folder))
        rows = comparison.rows()
        medians = measure(rows, args.rounds)
        print(machine(comparison), table(medians), against_own_base(medians, rows), sep="\n\n")
        if args.reference:
            print(f"\n{comparison.fidelity(args.reference)}")


if __name__ == "__main__":
    main()
