#!/usr/bin/env python3
"""How many guesses come true while somebody types, and what that brings: an editor asks for the rest of a function at every few
characters of it, and most replies go on as the one before did.

    python3 benches/replies.py [--lorry BINARY]

Prints one JSON object: requests, tokens, tokens a second, tokens guessed and those of them that came true.
"""

import argparse
import ast
import json
import time
import urllib.request
from pathlib import Path

from hostile import HOST, LORRY, serving

# Typed in them is what was written there.
FILES = [Path(__file__).with_name(name) for name in ("hostile.py", "long_context.py")]
COUNTERS = {"guessed": "vllm:spec_decode_num_draft_tokens_total", "accepted": "vllm:spec_decode_num_accepted_tokens_total"}


def functions(text: str):
    """Where the body of each function begins and ends in `text`."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            yield starts[node.body[0].lineno - 1], starts[node.end_lineno]


def requests(num_functions: int, num_characters: int, step: int):
    """What is before the cursor, and what behind it."""
    for file in FILES:
        text = file.read_text()
        for begin, end in list(functions(text))[:num_functions]:
            for cursor in range(begin, min(end, begin + num_characters), step):
                yield text[max(0, begin - 1500) : cursor], text[end : end + 500]


def counters(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: sum(float(value) for key, value in values.items() if key.startswith(metric)) for name, metric in COUNTERS.items()}


def measure(url: str, asked: list[tuple[str, str]], max_tokens: int) -> dict:
    before, began, num_tokens = counters(url), time.perf_counter(), 0
    for prefix, suffix in asked:
        body = {"prompt": prefix, "suffix": suffix, "max_tokens": max_tokens, "temperature": 0}
        reply = json.load(urllib.request.urlopen(f"{url}/v1/completions", json.dumps(body).encode()))
        num_tokens += reply["usage"]["completion_tokens"]
    seconds = time.perf_counter() - began
    counted = {name: int(value - before[name]) for name, value in counters(url).items()}
    return {"requests": len(asked), "tokens": num_tokens, "tokens_per_s": round(num_tokens / seconds, 1), **counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lorry", type=Path, default=LORRY)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--functions", type=int, default=4, help="in each file")
    parser.add_argument("--characters", type=int, default=96, help="typed in each function")
    parser.add_argument("--step", type=int, default=6, help="characters between two requests")
    parser.add_argument("--max-tokens", type=int, default=48)
    args = parser.parse_args()
    asked = list(requests(args.functions, args.characters, args.step))
    with serving(args.lorry, args.model, {}) as server:
        print(json.dumps(measure(f"http://{HOST}:{server.port}", asked, args.max_tokens)))


if __name__ == "__main__":
    main()
