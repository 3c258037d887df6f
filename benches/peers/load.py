#!/usr/bin/env python3
"""Closed-loop load on an OpenAI-style server: every client sends its next request when its last one has ended.

Greedy, streamed, every prompt different, every output of full length (`ignore_eos`). Prints one JSON object.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import aiohttp

WORDS = (
    "def class return import self for in range len list dict print value index key data result node tree graph sort "
    "merge parse read write file line token count total sum max min"
).split()


@dataclass
class Load:
    """What is sent. `bodies` take turns and are merged into each request: the model's name, or an adapter's number."""

    bodies: list[dict]
    num_clients: int = 16
    num_requests: int = 32
    prompt_words: int = 128
    max_tokens: int = 64


@dataclass
class Result:
    """Rates in tokens per second over all clients, times in seconds."""

    output_tok_s: float
    ttft_p50: float
    ttft_max: float
    itl_p50: float


@dataclass
class Reply:
    ttft: float
    num_tokens: int
    gaps: list[float] = field(default_factory=list)


def prompt(num_words: int, seed: int) -> str:
    words = random.Random(seed)
    return f"# task {seed}\n" + " ".join(words.choice(WORDS) for _ in range(num_words))


def body(num_words: int, seed: int, max_tokens: int, own: dict) -> dict:
    """What is asked of a server that is to generate all of `max_tokens`; `own` is merged into it."""
    return {
        "prompt": prompt(num_words, seed),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **own,
    }


async def complete(
    session: aiohttp.ClientSession, url: str, body: dict, key: str = "", see: Callable[[], None] = lambda: None
) -> Reply:
    """`see` is called for each text that comes, which is a token but for one that is a part of a character."""
    start = time.perf_counter()
    arrivals, num_tokens = [], 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with session.post(f"{url}/v1/completions", json=body, headers=headers) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {(await response.text())[:500]}")
        async for line in response.content:
            data = line.decode().removeprefix("data:").strip()
            if not line.startswith(b"data:") or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                raise RuntimeError(f"{url} failed in mid-stream: {data[:500]}")
            if usage := chunk.get("usage"):
                num_tokens = usage["completion_tokens"]
            if any(choice.get("text") for choice in chunk["choices"]):
                arrivals.append(time.perf_counter())
                see()
    if not arrivals or num_tokens != body["max_tokens"]:
        raise RuntimeError(f"{url} sent {num_tokens} of {body['max_tokens']} tokens; it has to honour ignore_eos and usage")
    return Reply(arrivals[0] - start, num_tokens, [b - a for a, b in zip(arrivals, arrivals[1:])])


async def run(url: str, load: Load) -> Result:
    limit = aiohttp.ClientTimeout(total=3600)
    # A connection for each request: servers differ in when they close an idle one.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:

        def request(number: int, max_tokens: int) -> dict:
            return body(load.prompt_words, number, max_tokens, load.bodies[number % len(load.bodies)])

        # Memory is touched for the first time outside the measurement; prompts of negative numbers come up only here.
        await asyncio.gather(*(complete(session, url, request(-1 - i, 2)) for i in range(len(load.bodies))))

        numbers = iter(range(load.num_requests))
        replies: list[Reply] = []

        async def client() -> None:
            for number in numbers:
                replies.append(await complete(session, url, request(number, load.max_tokens)))

        start = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(load.num_clients)))
        elapsed = time.perf_counter() - start

    ttfts = [reply.ttft for reply in replies]
    gaps = [gap for reply in replies for gap in reply.gaps]
    return Result(
        output_tok_s=sum(reply.num_tokens for reply in replies) / elapsed,
        ttft_p50=statistics.median(ttfts),
        ttft_max=max(ttfts),
        itl_p50=statistics.median(gaps) if gaps else 0.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="e.g. http://127.0.0.1:8080")
    parser.add_argument("--models", required=True, help="names that take turns, separated by commas")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    bodies = [{"model": name} for name in args.models.split(",")]
    load = Load(bodies, args.clients, args.requests, args.prompt_words, args.max_tokens)
    print(json.dumps(asdict(asyncio.run(run(args.url.rstrip("/"), load)))))


if __name__ == "__main__":
    main()
