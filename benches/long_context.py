"""What long prompts cost with keys and values in f16 and in q8_0, and what the rounding changes.

    python3 benches/long_context.py                    the default model up to 32k tokens, in about fifteen minutes on two cores
    python3 benches/long_context.py --lengths 256,512  less of it, in seconds

Prompts are source code of this repository, each length the beginning of the next one, so that a prompt is computed from where the
one before ended (the prefix cache) and times add up to those of the whole prompt. One line of JSON for each type and length:
seconds and tokens/s of the whole prompt, tokens/s of decoding behind it, resident memory, and the memory of its keys and values.
A last line compares log-probabilities of the first tokens of the text, each given those before.
"""

import argparse
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LORRY = REPOSITORY / "target" / "release" / "lorry"
TYPES = ["f16", "q8_0"]
DECODED = 32
SCORED = 4096
START_SECONDS = 900


class Server:
    def __init__(self, url: str, model: str, pid: int):
        self.url, self.model, self.pid = url, model, pid

    def post(self, path: str, body: dict):
        data = json.dumps({"model": self.model} | body).encode()
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, {"content-type": "application/json"}))

    def complete(self, ids: list[int], **options) -> dict:
        return json.load(self.post("/v1/completions", {"prompt": ids, "temperature": 0} | options))

    def resident_mib(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return next(int(line.split()[1]) >> 10 for line in status.splitlines() if line.startswith("VmRSS:"))


@contextmanager
def serving(model: str, kv_type: str, port: int):
    environment = os.environ | {"LORRY__ENGINE__KV_CACHE_TYPE": kv_type, "LORRY__ENGINE__MAX_DRAFT_TOKENS": "0", "RUST_LOG": "warn"}
    command = [LORRY, "serve", "--device", "cpu", "--model", model, "--adapters", "", "--port", str(port)]
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        yield Server(f"http://127.0.0.1:{port}", model, process.pid)
    finally:
        process.terminate()
        process.wait()


def source_tokens(server: Server, count: int) -> list[int]:
    """As many tokens of source code."""
    files = sorted((REPOSITORY / "src").rglob("*.rs"))
    text = "".join(path.read_text() for path in files)[: count * 8]
    ids = json.load(server.post("/tokenize", {"content": text}))["tokens"]
    assert len(ids) >= count, f"only {len(ids)} tokens of source code"
    return ids[:count]


def measure(server: Server, ids: list[int], lengths: list[int], kv_bytes: float) -> list[dict]:
    rows, prefill_seconds = [], 0.0
    for length in lengths:
        # The last tokens of the context are for the output.
        prompt = ids[: length - DECODED]
        start = time.perf_counter()
        arrivals = []
        body = {"prompt": prompt, "temperature": 0, "max_tokens": DECODED, "ignore_eos": True, "stream": True}
        with server.post("/v1/completions", body) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    arrivals.append(time.perf_counter())
        prefill_seconds += arrivals[0] - start
        rows.append({
            "tokens": length,
            "prefill_s": round(prefill_seconds, 1),
            "prefill_tok_s": round(len(prompt) / prefill_seconds),
            "decode_tok_s": round((DECODED - 1) / (arrivals[-1] - arrivals[0]), 1),
            "rss_mib": server.resident_mib(),
            "kv_mib": round(length * kv_bytes / 2**20, 1),
        })
    return rows


def scores(server: Server, ids: list[int]) -> list[tuple[float, str]]:
    """Of each token but the first: its log-probability, and the likeliest token in its place."""
    reply = server.complete(ids, max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    return [(logprob, max(top, key=top.get)) for logprob, top in zip(reply["token_logprobs"][1:], reply["top_logprobs"][1:])]


def compare(exact: list[tuple[float, str]], rounded: list[tuple[float, str]]) -> dict:
    differences = [abs(a - b) for (a, _), (b, _) in zip(exact, rounded)]
    return {
        "scored": len(exact),
        "mean_abs_dlogp": round(sum(differences) / len(exact), 4),
        "max_abs_dlogp": round(max(differences), 3),
        "top1_agrees": round(sum(a == b for (_, a), (_, b) in zip(exact, rounded)) / len(exact), 4),
        "mean_logp": [round(sum(logprob for logprob, _ in each) / len(each), 4) for each in (exact, rounded)],
    }


def check_limit(server: Server, ids: list[int]) -> None:
    """The context works to its last token, and one more is refused by name."""
    usage = server.complete(ids[:-1], max_tokens=1, ignore_eos=True)["usage"]
    assert usage["total_tokens"] == len(ids), usage
    try:
        server.complete(ids, max_tokens=1)
    except urllib.error.HTTPError as refusal:
        error = json.load(refusal)["error"]
        assert error["code"] == "context_length_exceeded", error
        return
    raise AssertionError("a prompt that leaves no room for a token is not refused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--lengths", default="1024,4096,8192,16384,32768", help="ascending, at most the context")
    parser.add_argument("--kv-token-bytes", type=int, default=12_288, help="of the model in f16")
    parser.add_argument("--port", type=int, default=18_431)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    all_scores = []
    for kv_type in TYPES:
        with serving(options.model, kv_type, options.port) as server:
            context = json.load(server.post("/tokenize", {"content": "x"}))["max_model_len"]
            ids = source_tokens(server, lengths[-1])
            kv_bytes = options.kv_token_bytes * (1 if kv_type == "f16" else 34 / 64)
            for row in measure(server, ids, lengths, kv_bytes):
                print(json.dumps({"kv": kv_type} | row), flush=True)
            if lengths[-1] == context:
                check_limit(server, ids)
            all_scores.append(scores(server, ids[:SCORED]))
    print(json.dumps({"q8_0 against f16": compare(*all_scores)}))


if __name__ == "__main__":
    main()
