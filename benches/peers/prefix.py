#!/usr/bin/env python3
"""What is not computed again: a long prompt, the same with one more character, and several at once.

Prints one JSON object: medians of the time to the first token in seconds, and the prompt tokens that were found in the cache.
"""

import argparse
import json
import random
import statistics
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

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


def at_once(count: int, *request: str) -> float:
    """Seconds until each of `count` has its first token."""
    with ThreadPoolExecutor(count) as pool:
        return max(first for first, *_ in pool.map(lambda _: ask(*request), range(count)))


def measure(url: str, model: str, num_words: int, rounds: int, count: int) -> dict:
    cold, again, together = [], [], []
    for _ in range(rounds):
        prompt, other = (" ".join(random.choices(WORDS, k=num_words)) for _ in range(2))
        cold.append(ask(url, model, prompt)[0])
        again.append(ask(url, model, prompt + "x"))
        together.append(at_once(count, url, model, other))
    cold, warm, together = map(statistics.median, (cold, [first for first, *_ in again], together))
    return {
        "cold_s": cold,
        "again_s": warm,
        "at_once_s": together,
        "again_over_cold": warm / cold,
        "at_once_over_cold": together / cold,
        "prompt_tokens": [num_tokens for _, num_tokens, _ in again],
        "cached_tokens": [num_cached for *_, num_cached in again],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server that runs, without /v1")
    parser.add_argument("--model", default="")
    parser.add_argument("--words", type=int, default=1000, help="of the prompt, about a token each")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=3, help="requests with one prompt")
    args = parser.parse_args()
    print(json.dumps(measure(args.url.rstrip("/"), args.model, args.words, args.rounds, args.at_once)))


if __name__ == "__main__":
    main()
