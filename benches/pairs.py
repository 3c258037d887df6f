"""From pairs to an adapter, as a newcomer does it: what a fine-tuning job of the server takes, and what it gives.

    .venv-lab/bin/python benches/pairs.py pairs.jsonl held_out.jsonl [--model ID] [--epochs N] [--method lora] [--config FILE]

Both files have a chat on each line, as docs/fine_tuning.md says; `make .venv-lab/ready-to-train` before. The pairs go to a
server of this build through OpenAI's own client, and what is trained answers the held-out ones beside the base, greedily, while the
server goes on. One line of JSON for each of the two: per cent of the very answers, and how alike they are (the lab's EM@1 and chrF),
with the job's seconds and losses; and how often which of the two was right
alone, with the exact test of McNemar for it.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests" / "clients"), str(REPOSITORY / "lab")]

from lorry_server import serving  # noqa: E402: found in the folders above
from metrics import chrf, exact_match_at  # noqa: E402

CLIENTS = 8


def mcnemar(first_alone: int, second_alone: int) -> float:
    """The two-sided probability of so unequal a division, were both as good."""
    n, least = first_alone + second_alone, min(first_alone, second_alone)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n)


def answers(client: openai.OpenAI, model: str, held_out: list[dict]) -> list[str]:
    def answer(example: dict) -> str:
        *asked, expected = example["messages"]
        # Enough for the answer that is expected and for one twice as long.
        limit = max(64, len(expected["content"]))
        reply = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=limit)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(answer, held_out))


def train(client: openai.OpenAI, options: argparse.Namespace):
    with options.pairs.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    hyperparameters = {"n_epochs": options.epochs or "auto"}
    method = {"type": options.method, options.method: {"hyperparameters": hyperparameters}}
    job = client.fine_tuning.jobs.create(
        model=options.model, training_file=uploaded.id, suffix="pairs", seed=options.seed, method=method
    )
    while job.finished_at is None:
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    if job.status != "succeeded":
        raise SystemExit(f"the job {job.status}: {job.error}")
    data = [event.data for event in client.fine_tuning.jobs.list_events(job.id) if event.data]
    losses = [metrics["valid_loss"] for metrics in reversed(data) if "valid_loss" in metrics]
    return job, {"validation_loss_of_base": losses[0], "validation_loss": min(losses), "trained_tokens": job.trained_tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("--model", default="qwen2.5-coder:0.5b")
    parser.add_argument("--method", default="supervised")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--config", type=Path, help="of the server")
    options = parser.parse_args()
    # As bytes, which end lines at line ends alone: a text may have others of Unicode's.
    held_out = [json.loads(line) for line in options.held_out.read_bytes().splitlines()]
    expected = [example["messages"][-1]["content"].strip() for example in held_out]

    right = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "LORRY__FINE_TUNING__ENABLED": "true",
            "LORRY__FINE_TUNING__DIR": f"{folder}/jobs",
            "LORRY__SERVER__ADMIN_KEY": "admin",
        }
        arguments = ["--model", options.model, "--adapters", f"{folder}/adapters"]
        arguments += ["--config", options.config] if options.config else []
        with serving(*arguments, environment=environment) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="admin", timeout=3600)
            started = time.monotonic()
            job, facts = train(client, options)
            facts["seconds"] = round(time.monotonic() - started)
            for name, model, further in [("base", options.model, {}), ("adapter", job.fine_tuned_model, facts)]:
                given = [answer.strip() for answer in answers(client, model, held_out)]
                right[name] = [a == b for a, b in zip(given, expected)]
                scores = {"em@1": exact_match_at(1, [[answer] for answer in given], expected), "chrf": chrf(given, expected)}
                print(json.dumps({"answers": name, **scores, **further}), flush=True)
    alone = Counter((base, adapter) for base, adapter in zip(right["base"], right["adapter"]))
    base_alone, adapter_alone = alone[True, False], alone[False, True]
    print(json.dumps({"base_alone": base_alone, "adapter_alone": adapter_alone, "p": mcnemar(base_alone, adapter_alone)}))


if __name__ == "__main__":
    main()
