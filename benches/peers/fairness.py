#!/usr/bin/env python3
"""What those who ask for little notice of those who ask for much, on a server of its own.

Three loads, each with and without what crowds it, in turn: completions beside long chats, adapters that are asked for now and
then beside one that is flooded, and two keys with weights 3 and 1. Prints one JSON object; times are in seconds.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from pathlib import Path

import adapters
import aiohttp
import load
from servers import Lorry

KEYS = {"three": 3, "one": 1}
NUM_QUIET = 7


class Clients:
    """So many of a kind. `bodies` take turns and are merged into their requests, between which each waits for about `pause`
    seconds."""

    def __init__(
        self, count: int, bodies: list[dict], prompt_words: int, max_tokens: int, pause: float = 0.0, key: str = ""
    ):
        self.count, self.bodies, self.prompt_words, self.max_tokens = count, bodies, prompt_words, max_tokens
        self.pause, self.key = pause, key
        self.replies: list[tuple[float, float]] = []
        self.num_tokens = 0

    async def run(self, session: aiohttp.ClientSession, url: str, number: int, seeds, is_over) -> None:
        pauses = random.Random(number)

        def see() -> None:
            # Those of a reply too that is cut off: counted whole alone, who has fewer would lose more.
            self.num_tokens += not is_over()

        while not is_over():
            await asyncio.sleep(pauses.uniform(0.5, 1.5) * self.pause)
            own = self.bodies[number % len(self.bodies)]
            body = load.body(self.prompt_words, next(seeds), self.max_tokens, own)
            began = asyncio.get_running_loop().time()
            reply = await load.complete(session, url, body, self.key, see)
            if not is_over():
                self.replies.append((reply.ttft, asyncio.get_running_loop().time() - began))

    def figures(self) -> dict:
        """p50 and p90 of the time to the first token and to the last."""
        figures = {"requests": len(self.replies)}
        for name, times in zip(("ttft", "latency"), zip(*self.replies)):
            tenths = statistics.quantiles(times, n=10)
            figures |= {f"{name}_p50": round(tenths[4], 3), f"{name}_p90": round(tenths[8], 3)}
        return figures


async def run(url: str, kinds: list[Clients], seconds: float, seeds) -> None:
    """All of them for so long. What is under way then is cut off and not counted."""
    limit = aiohttp.ClientTimeout(total=3600)
    async with aiohttp.ClientSession(timeout=limit, connector=aiohttp.TCPConnector(limit=0)) as session:
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        clients = [
            asyncio.create_task(kind.run(session, url, number, seeds, lambda: loop.time() >= end))
            for kind in kinds
            for number in range(kind.count)
        ]
        await asyncio.sleep(seconds)
        for client in clients:
            client.cancel()
        for ended in await asyncio.gather(*clients, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


def medians(rounds: list[dict]) -> dict:
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def crowded(url: str, args: argparse.Namespace, seeds, own, crowd) -> dict:
    """The figures of the clients that `own` makes, alone and beside those that `crowd` makes, in turn."""
    alone, beside = [], []
    for _ in range(args.rounds):
        for figures, others in ((alone, []), (beside, [crowd()])):
            mine = own()
            asyncio.run(run(url, [mine, *others], args.seconds, seeds))
            figures.append(mine.figures())
    alone, beside = medians(alone), medians(beside)
    ratios = {f"{name}_ratio": round(beside[name] / alone[name], 2) for name in alone if name != "requests"}
    return {"alone": alone, "beside": beside, **ratios}


def measure(args: argparse.Namespace, root: Path) -> dict:
    seeds, figures = iter(range(1_000_000)), {}
    lorry = Lorry(args.lorry, args.model)
    base = adapters.Base.read(args.gguf)
    (root / "peft").mkdir()
    for index in range(NUM_QUIET + 1):
        adapters.write(base, root, f"adapter-{index}", adapters.ALL_LINEAR, 16, seed=index)
    with lorry.serve(root / "peft") as server:
        figures["completions beside chats"] = crowded(
            server.url,
            args,
            seeds,
            lambda: Clients(28, [server.base], 60, 16),
            lambda: Clients(4, [{**server.base, "priority": "chat"}], 1500, 128),
        )
        figures["quiet adapters beside a flood"] = crowded(
            server.url,
            args,
            seeds,
            lambda: Clients(NUM_QUIET, server.adapters[1:], 60, 16, pause=0.5),
            lambda: Clients(100, server.adapters[:1], 60, 16),
        )
    config = root / "keys.toml"
    config.write_text(
        "".join(
            f'[[server.keys]]\nname = "{name}"\nkey = "{name}"\nadapters = []\nweight = {weight}\n'
            for name, weight in KEYS.items()
        )
    )
    with lorry.serve(None, config) as server:
        ratios = []
        for _ in range(args.rounds):
            kinds = [Clients(16, [server.base], 60, 32, key=name) for name in KEYS]
            asyncio.run(run(server.url, kinds, args.seconds, seeds))
            ratios.append(kinds[0].num_tokens / max(1, kinds[1].num_tokens))
        figures["weights 3 and 1"] = {"ratio": round(statistics.median(ratios), 2)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lorry", type=Path, default=Path("target/release/lorry"))
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--gguf", type=Path, required=True, help="the file of that model, whose shapes the adapters have")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=30)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(measure(args, Path(root)), indent=1))


if __name__ == "__main__":
    main()
