#!/usr/bin/env python3
"""What constrained output costs on an OpenAI-style server, and whether it is what was asked for.

First rounds of closed-loop load, in turn without constraints and with one on every second client; then so many replies,
each under one of four constraints, drawn at temperature 1 and checked. Prints one JSON object.
"""

import argparse
import asyncio
import json
import re
import statistics
import time

import aiohttp

FUNCTION = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "arity", "kind"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "arity": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["function", "method", None]},
    },
}
FUNCTIONS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["functions"],
    "properties": {"functions": {"type": "array", "minItems": 1, "maxItems": 3, "items": FUNCTION}},
}
DATE = r"(19|20)\d\d-(0[1-9]|1[0-2])-[0-2]\d"
SUM = 'root ::= term (" + " term)* " = " number\nterm ::= number | "(" root ")"\nnumber ::= [1-9] [0-9]{0,2}'


def is_function(value):
    return (
        isinstance(value, dict)
        and list(value) == ["name", "arity", "kind"]
        and isinstance(value["name"], str)
        and 1 <= len(value["name"]) <= 12
        and type(value["arity"]) is int
        and 0 <= value["arity"] <= 9
        and value["kind"] in ("function", "method", None)
    )


def is_sum(text):
    """Whether nested sums, the innermost first, leave one."""
    number = r"[1-9][0-9]{0,2}"
    inner = re.compile(rf"\({number}( \+ {number})* = {number}\)")
    while inner.search(text):
        text = inner.sub("1", text)
    return re.fullmatch(rf"{number}( \+ {number})* = {number}", text) is not None


def is_functions(text):
    functions = json.loads(text)["functions"]
    return 1 <= len(functions) <= 3 and all(map(is_function, functions))


def of_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}}


# What asks for each constraint, and what its replies must be.
CONSTRAINTS = [
    (of_schema(FUNCTION), lambda text: is_function(json.loads(text))),
    (of_schema(FUNCTIONS), is_functions),
    ({"structured_outputs": {"regex": DATE}}, lambda text: re.fullmatch(DATE, text, re.ASCII) is not None),
    ({"grammar": SUM}, is_sum),
]


class Server:
    def __init__(self, session, url, model):
        self.session, self.url, self.model = session, url, model

    async def ask(self, seed, **options):
        """The choice, and the number of its tokens."""
        question = f"Number {seed}: describe a function of a parser as JSON."
        body = {"model": self.model, "messages": [{"role": "user", "content": question}], "seed": seed, **options}
        async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as reply:
            reply.raise_for_status()
            reply = await reply.json()
        return reply["choices"][0], reply["usage"]["completion_tokens"]

    async def rate(self, num_clients, num_constrained, seconds, first_seed):
        """Tokens per second of clients whose outputs have up to 96 tokens."""
        began = time.monotonic()

        async def client(number):
            num_tokens, seed = 0, first_seed + 10_000 * number
            while time.monotonic() < began + seconds:
                options = of_schema(FUNCTIONS) if number < num_constrained else {"ignore_eos": True}
                num_tokens += (await self.ask(seed, max_tokens=96, **options))[1]
                seed += 1
            return num_tokens

        num_tokens = sum(await asyncio.gather(*map(client, range(num_clients))))
        return num_tokens / (time.monotonic() - began)

    async def check(self, num_replies, num_clients):
        """How many replies ended, and those of them that are not what their constraint says."""
        seeds, ended, wrong = iter(range(num_replies)), 0, []

        async def client():
            nonlocal ended
            for seed in seeds:
                options, is_valid = CONSTRAINTS[seed % len(CONSTRAINTS)]
                choice, _ = await self.ask(seed, max_tokens=256, temperature=1.0, **options)
                if choice["finish_reason"] != "stop":
                    continue
                ended += 1
                text = choice["message"]["content"]
                try:
                    is_right = is_valid(text)
                except (ValueError, KeyError, TypeError):
                    is_right = False
                if not is_right:
                    wrong.append(text)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        return ended, wrong


async def measure(arguments):
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        server, num_clients = Server(session, arguments.url, arguments.model), arguments.clients
        await server.rate(num_clients, num_clients // 2, 0, 0)
        free, half = [], []
        for turn in range(arguments.rounds):
            first_seed = 1_000_000 * (turn + 1)
            free.append(await server.rate(num_clients, 0, arguments.seconds, first_seed))
            half.append(await server.rate(num_clients, num_clients // 2, arguments.seconds, first_seed))
        ended, wrong = await server.check(arguments.replies, num_clients)
    ratio = statistics.median(half) / statistics.median(free)
    rates = {"free_tok_s": free, "half_constrained_tok_s": half, "ratio": ratio}
    print(json.dumps({**rates, "replies": arguments.replies, "ended": ended, "wrong": wrong}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--replies", type=int, default=1000)
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
