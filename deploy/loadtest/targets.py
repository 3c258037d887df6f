#!/usr/bin/env python3
"""Writes the requests of a load test, one JSON object per line: completions, gaps to fill, chats, and chats with in-context
examples, each kind to each of the models in turn.

Every prompt is different, so that no request profits from the prefix cache of another.
"""

import argparse
import base64
import json

FUNCTIONS = ["merge_sorted_lists", "parse_duration", "count_words", "flatten", "rotate_matrix", "group_by_key"]


def completion(number, function):
    return "/v1/completions", {"prompt": f"# module {number}\ndef {function}(values):\n"}


def fim(number, function):
    prompt = f"# module {number}\ndef {function}(values):\n    result = "
    return "/v1/completions", {"prompt": prompt, "suffix": f"\n    return result\n\nprint({function}([{number}]))\n"}


def chat(number, function):
    question = f"Task {number}: write a Python function `{function}` and say in one sentence what it does."
    return "/v1/chat/completions", {"messages": [{"role": "user", "content": question}]}


def in_context(number, function):
    question = f"task {number}: call `{function}` on the list `values`"
    return "/v1/chat/completions", {
        "messages": [{"role": "user", "content": question}],
        "icl": {"store": "python", "k": 3},
    }


KINDS = {"completion": completion, "fim": fim, "chat": chat, "in-context": in_context}


def request(kind, model, number, max_tokens):
    """A line of `lorry loadgen --mix`."""
    path, body = KINDS[kind](number, FUNCTIONS[number % len(FUNCTIONS)])
    # Streamed, so that the time to the first token can be seen; all replies of one length, so that they compare.
    fixed = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    return {"path": path, "body": {"model": model, **body, **fixed}}


def requests(kinds, models, count, max_tokens):
    for number in range(count):
        turn, kind = divmod(number, len(kinds))
        yield request(kinds[kind], models[turn % len(models)], number, max_tokens)


def for_vegeta(url, request):
    """A line of `vegeta attack -format=json`."""
    return {
        "method": "POST",
        "url": url.rstrip("/") + request["path"],
        "header": {"Content-Type": ["application/json"]},
        "body": base64.b64encode(json.dumps(request["body"]).encode()).decode(),
    }


def add_options(parser):
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server (default: %(default)s)")
    parser.add_argument("--models", required=True, help="model names, separated by commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of requests, separated by commas (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="length of each reply (default: %(default)s)")


def read_kinds(parser, text):
    kinds = text.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds: {unknown[0]!r} is none of {', '.join(KINDS)}")
    return kinds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--count", type=int, default=100, help="number of requests (default: %(default)s)")
    parser.add_argument("--form", choices=["loadgen", "vegeta"], default="loadgen", help="who reads it (default: %(default)s)")
    arguments = parser.parse_args()
    kinds, models = read_kinds(parser, arguments.kinds), arguments.models.split(",")
    for line in requests(kinds, models, arguments.count, arguments.max_tokens):
        print(json.dumps(for_vegeta(arguments.url, line) if arguments.form == "vegeta" else line))


if __name__ == "__main__":
    main()
