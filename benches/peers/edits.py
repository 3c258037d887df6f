#!/usr/bin/env python3
"""Code edits, one after the other: a chat model repeats a piece of code with a variable renamed. Prints tokens per second.

What an editor's "apply" asks for: nearly all of the output is in the prompt already, and a server may use that.
"""

import argparse
import json
import time
import urllib.request
from pathlib import Path

LINES_PER_EDIT = 22
MAX_TOKENS = 220
# Code, and a name in it to replace.
SOURCE = Path(__file__).with_name("load.py")
RENAMED, NEW_NAME = "load", "work"


def prompts(count: int) -> list[str]:
    lines = SOURCE.read_text().splitlines()
    pieces = ["\n".join(lines[i * LINES_PER_EDIT : (i + 1) * LINES_PER_EDIT]) for i in range(count)]
    task = f"Rewrite this Python code, renaming the variable `{RENAMED}` to `{NEW_NAME}`. Answer with the whole code only."
    return [f"{task}\n```python\n{piece}\n```" for piece in pieces]


def run(url: str, model: str, count: int) -> float:
    """Output tokens per second of decoding: the first token of an edit and the time before it do not count."""
    num_tokens, elapsed = 0, 0.0
    for prompt in prompts(count):
        body = {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        first = None
        with urllib.request.urlopen(request) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line.removeprefix(b"data: "))
                if first is None and any(choice["delta"].get("content") for choice in chunk["choices"]):
                    first = time.perf_counter()
                if usage := chunk.get("usage"):
                    num_tokens += usage["completion_tokens"] - 1
        elapsed += time.perf_counter() - first
    return num_tokens / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a server that runs, without /v1")
    parser.add_argument("--model", default="")
    parser.add_argument("--count", type=int, default=4)
    args = parser.parse_args()
    print(f"{run(args.url.rstrip('/'), args.model, args.count):.1f}")


if __name__ == "__main__":
    main()
