#!/usr/bin/env python3
"""Writes vegeta targets, one JSON object per line: completions that go to each of the models in turn.

Every prompt is different, so that no request profits from the prefix cache of another.
"""

import argparse
import base64
import json

FUNCTIONS = ["merge_sorted_lists", "parse_duration", "count_words", "flatten", "rotate_matrix", "group_by_key"]


def target(url, model, number, max_tokens):
    function = FUNCTIONS[number % len(FUNCTIONS)]
    body = {
        "model": model,
        "prompt": f"# module {number}\ndef {function}(values):\n",
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # every reply has the same length, so that latencies compare
    }
    return {
        "method": "POST",
        "url": f"{url.rstrip('/')}/v1/completions",
        "header": {"Content-Type": ["application/json"]},
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server (default: %(default)s)")
    parser.add_argument("--models", required=True, help="model names, separated by commas")
    parser.add_argument("--count", type=int, default=100, help="number of targets (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of each reply (default: %(default)s)")
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    for number in range(arguments.count):
        model = models[number % len(models)]
        print(json.dumps(target(arguments.url, model, number, arguments.max_tokens)))


if __name__ == "__main__":
    main()
