#!/usr/bin/env python3
"""What is not computed again: a prompt with one more character, the same after a restart with the cache on disk, and several at once.

    python3 benches/prefix_cache.py            a thousand words, which takes a minute or two
    python3 benches/prefix_cache.py --quick    fewer, in seconds
    python3 benches/prefix_cache.py --url URL  a server that runs, all but the restart

Prints one JSON object: medians of the time to the first token in seconds, what share they are of the cold prompt's, and of each prompt
the tokens and those that were found in the cache.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hostile import HOST, LORRY, serving

WORDS = "if else for while return value index total count list node left right parse read write open close begin end".split()


def ask(url: str, model: str, prompt: str) -> tuple[float, int, int]:
    """Seconds to the first token, tokens of the prompt, and those of them that were cached."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True, "ignore_eos": True}
    body["stream_options"] = {"include_usage": True}
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    began, first, usage = time.perf_counter(), None, {}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", data, headers)) as response:
        for line in response:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - began
                usage = json.loads(line.removeprefix(b"data: ")).get("usage") or usage
    return first, usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def at_once(count: int, *request: str) -> tuple[float, int, int]:
    """The last of `count` requests to have its first token."""
    with ThreadPoolExecutor(count) as pool:
        return max(pool.map(lambda _: ask(*request), range(count)))


def measure(url: str, model: str, prompts: list[str], count: int) -> dict[str, list]:
    """What each prompt takes at first, with one more character, and another one that is sent `count` times at once."""
    ask(url, model, "the first request of a server takes longer than others")
    taken = {"cold": [], "again": [], "at_once": []}
    for prompt in prompts:
        taken["cold"].append(ask(url, model, prompt))
        taken["again"].append(ask(url, model, prompt + "x"))
        taken["at_once"].append(at_once(count, url, model, f"other {prompt}"))
    return taken


def measure_with_restart(lorry: Path, model: str, prompts: list[str], count: int) -> dict[str, list]:
    with tempfile.TemporaryDirectory() as folder:
        settings = {"LORRY__ENGINE__PREFIX_CACHE_DIR": folder}
        with serving(lorry, model, settings) as server:
            taken = measure(f"http://{HOST}:{server.port}", "", prompts, count)
        with serving(lorry, model, settings) as server:
            url = f"http://{HOST}:{server.port}"
            ask(url, "", "and this one does too")
            return taken | {"restarted": [ask(url, "", prompt + "y") for prompt in prompts]}


def report(taken: dict[str, list]) -> dict:
    medians = {name: statistics.median(seconds for seconds, *_ in asked) for name, asked in taken.items()}
    return {
        "seconds": medians,
        "over_cold": {name: seconds / medians["cold"] for name, seconds in medians.items()},
        "prompt_and_cached_tokens": {name: [tokens for _, *tokens in asked] for name, asked in taken.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs, without /v1")
    parser.add_argument("--lorry", type=Path, default=LORRY)
    parser.add_argument("--model", help="to serve, or the one to ask for with --url")
    parser.add_argument("--words", type=int, default=1000, help="of the prompt, about a token each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=3, help="requests with one prompt")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    num_words, rounds = (100, 1) if args.quick else (args.words, args.rounds)
    prompts = [" ".join(random.choices(WORDS, k=num_words)) for _ in range(rounds)]
    if args.url:
        taken = measure(args.url.rstrip("/"), args.model or "", prompts, args.at_once)
    else:
        taken = measure_with_restart(args.lorry, args.model or "qwen2.5-coder:0.5b", prompts, args.at_once)
    print(json.dumps(report(taken)))


if __name__ == "__main__":
    main()
