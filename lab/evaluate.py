"""Puts test sets to any OpenAI-style server, and scores the answers.

    lab/evaluate.py conala --arms lab/comparisons/conala.toml --out runs/conala
    lab/evaluate.py humaneval mbpp --arm base=qwen2.5-coder:0.5b --arm tuned=conala --out runs/code

Requests of all arms are mixed, so that a server that batches across models can. Predictions go to `predictions.jsonl`
in the folder --out, scores to `scores.json`. A run that was broken off goes on where it was; one that is whole is only
scored again, without a server. A server that wants a key gets OPENAI_API_KEY.
"""

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from arms import ArmError, Decoding, read_arms
from data_files import BadData, MissingData
from metrics import MetricError, chrf, codebleu, exact_match_at, pass_at
from predictions import EvaluationError, Prediction, Question, alone_in, ask, missing, read_lines, read_predictions
from sandbox import Outcome, Sandbox, SandboxUnavailable
from suites import SUITES, Row, Suite, suite_named
from summary import summary_table
from tqdm import tqdm

# The paper's.
EXACT_MATCH_KS = (1, 2, 5, 10)
PASS_KS = (1, 10, 100)


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    decoding = Decoding(options.beams, options.samples, options.temperature if options.samples > 1 else 0.0)
    arms = read_arms(options.arms, options.arm)
    suites = options.suites
    names = [suite.name for suite in suites]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise EvaluationError(
            f"several suites are named {', '.join(sorted(repeated))}: predictions are filed by that name"
        )
    rows = {suite.name: suite.rows() for suite in suites}
    # Now, not after hours of asking: it raises where generated code cannot be run safely.
    sandbox = Sandbox() if any("pass" in suite.metrics for suite in suites) else None
    chosen = {name: evenly_spaced(all_rows, options.limit) for name, all_rows in rows.items()}
    # Row by row, so that every arm is under way at any time.
    questions = [
        Question(suite, row, arm, seed, decoding.of(arm))
        for suite in suites
        for row in chosen[suite.name]
        for arm in arms
        for seed in arm.seeds
    ]

    with alone_in(options.out):
        file = options.out / "predictions.jsonl"
        to_ask = missing(questions, read_predictions(file), file)
        print(f"{len(questions)} predictions, {len(to_ask)} of them to be made", file=sys.stderr)
        if to_ask:
            api_key = os.environ.get("OPENAI_API_KEY", "none")
            asyncio.run(ask(options.url, api_key, to_ask, options.concurrency, file))

        known = read_predictions(file)
        for arm in arms:
            check_one_version(arm.name, known.values())
        executions = Executions(options.out / "executions.jsonl", sandbox)
        scores = []
        for suite in suites:
            for arm in arms:
                for seed in arm.seeds:
                    asked = [Question(suite, row, arm, seed, decoding.of(arm)) for row in chosen[suite.name]]
                    predictions = [known[question.key] for question in asked]
                    scores += score(suite, chosen[suite.name], len(rows[suite.name]), predictions, executions)
        merge_scores(options.out / "scores.json", scores)
        print(summary_table(scores))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "suites",
        nargs="+",
        type=_suite,
        metavar="SUITE",
        help=f"{', '.join(SUITES)}, or a file of your own: PATH.jsonl",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--url", default="http://127.0.0.1:8080/v1", help="the server's API (%(default)s)")
    parser.add_argument("--arms", type=Path, action="append", default=[], metavar="FILE", help="TOML file with arms")
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=MODEL[,KEY=VALUE]...", help="one more arm")
    parser.add_argument(
        "--concurrency", type=from_one_on, default=16, help="requests under way at a time (%(default)s)"
    )
    parser.add_argument("--limit", type=from_one_on, help="only so many rows of each suite, evenly spaced")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--beams", type=from_one_on, default=1, help="beam search with so many beams, all returned (1: greedy)"
    )
    how.add_argument("--samples", type=from_one_on, default=1, help="so many samples a row, for pass@k")
    parser.add_argument("--temperature", type=float, default=0.8, help="of --samples (%(default)s)")
    return parser.parse_args(arguments)


def _suite(name: str) -> Suite:
    try:
        return suite_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def from_one_on(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def evenly_spaced(rows: list[Row], limit: int | None) -> list[Row]:
    """`limit` of `rows`: neighbours are alike in some suites, so not the first."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


class Executions:
    """Runs programs, each one once: arms often give the same answer, and scoring is often repeated."""

    def __init__(self, file: Path, sandbox: Sandbox | None) -> None:
        self.file = file
        self.sandbox = sandbox
        self.outcomes = {line["program"]: Outcome(line["passed"], line["error"]) for line in read_lines(file)}

    def passed(self, programs: list[str]) -> list[bool]:
        """Of each program whether it ran to its end."""
        keys = [hashlib.sha256(program.encode(errors="surrogatepass")).hexdigest() for program in programs]
        new = {key: program for key, program in zip(keys, programs) if key not in self.outcomes}
        with ThreadPoolExecutor(max_workers=2) as pool, self.file.open("a", encoding="utf-8") as lines:
            outcomes = pool.map(self.sandbox.run, new.values())
            for key, outcome in tqdm(zip(new, outcomes), total=len(new), unit="program", disable=not new):
                self.outcomes[key] = outcome
                lines.write(json.dumps({"program": key, **asdict(outcome)}) + "\n")
                lines.flush()
        return [self.outcomes[key].passed for key in keys]


def check_one_version(arm: str, predictions: Iterable[Prediction]) -> None:
    """Raises if the adapter or the store of examples behind `arm` was exchanged between its answers."""
    of_arm = [prediction for prediction in predictions if prediction.arm == arm]
    for what, versions in (
        ("generations of its adapter", {(prediction.adapter, prediction.generation) for prediction in of_arm}),
        ("versions of its store", {(p.icl["store"], p.icl.get("version")) for p in of_arm if p.icl}),
    ):
        if len(versions) > 1:
            raise EvaluationError(f"arm {arm} answered with several {what}: ask again in another --out")


def score(
    suite: Suite, rows: list[Row], num_rows: int, predictions: list[Prediction], executions: Executions
) -> list[dict[str, Any]]:
    """One arm's scores with one seed, for each way of post-processing; `num_rows` is the size of the whole suite."""
    first = predictions[0]
    timed = [prediction for prediction in predictions if prediction.ttft_ms is not None]
    rates = [
        1000 * (prediction.completion_tokens - 1) / (prediction.total_ms - prediction.ttft_ms)
        for prediction in timed
        if prediction.completion_tokens > 1
    ]
    totals = [prediction.total_ms for prediction in predictions]
    served = {
        "suite": suite.name,
        "arm": first.arm,
        "seed": first.seed,
        "decoding": first.decoding,
        "rows": len(rows),
        "rows_of_suite": num_rows,
        "model": first.model,
        "adapter": first.adapter,
        "generation": first.generation,
        "num_examples": first.icl["k"] if first.icl else 0,
        "store": f"{first.icl['store']} {first.icl.get('version', '')}".strip() if first.icl else None,
        "concurrency": max(prediction.concurrency for prediction in predictions),
        "prompt_tokens": statistics.mean(prediction.prompt_tokens for prediction in predictions),
        "cached_tokens": statistics.mean(prediction.cached_tokens for prediction in predictions),
        "completion_tokens": statistics.mean(prediction.completion_tokens for prediction in predictions),
        "ttft_ms": statistics.median(prediction.ttft_ms for prediction in timed) if timed else None,
        "tokens_per_second": statistics.median(rates) if rates else None,
        "total_ms_p50": percentile(50, totals),
        "total_ms_p90": percentile(90, totals),
    }
    scores = []
    for name, postprocess in suite.postprocess.items():
        answers = [
            [postprocess(text, row) for text in prediction.texts] for row, prediction in zip(rows, predictions)
        ]
        scores.append(served | {"postprocess": name, "metrics": _metrics(suite, rows, answers, first, executions)})
    return scores


def percentile(percent: int, values: list[float]) -> float:
    """The least of `values` that so many of a hundred do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def _metrics(
    suite: Suite, rows: list[Row], answers: list[list[str]], first: Prediction, executions: Executions
) -> dict[str, float]:
    num_choices = len(first.texts)
    is_ranked = not first.decoding.startswith("sample")
    references = [row.reference for row in rows]
    top = [answer[0] for answer in answers]
    metrics = {}
    if "em" in suite.metrics:
        ks = EXACT_MATCH_KS if is_ranked else (1,)
        metrics |= {f"em@{k}": exact_match_at(k, answers, references) for k in ks if k <= num_choices}
        if is_ranked and num_choices > 1:
            # Beams that differ only behind the answer are one try.
            metrics["distinct"] = statistics.mean(len(set(answer)) for answer in answers)
    if "codebleu" in suite.metrics:
        metrics["codebleu"] = codebleu(top, references, "python")["codebleu"]
    if "chrf" in suite.metrics:
        metrics["chrf"] = chrf(top, references)
    if "pass" in suite.metrics:
        # The best beam is the answer; samples are all alike.
        tried = [answer[:1] for answer in answers] if is_ranked else answers
        passed = executions.passed(
            [row.program[0] + text + row.program[1] for row, answer in zip(rows, tried) for text in answer]
        )
        num_tried = len(tried[0])
        counts = [sum(passed[start : start + num_tried]) for start in range(0, len(passed), num_tried)]
        for k in PASS_KS:
            if k <= num_tried:
                metrics[f"pass@{k}"] = statistics.mean(pass_at(k, num_tried, count) for count in counts)
    return metrics


def merge_scores(file: Path, scores: list[dict[str, Any]]) -> None:
    """Puts `scores` into `file`, in place of those of the same suite, arm, seed, decoding and post-processing.

    Those of more rows stay: a second run with a smaller --limit is a look, not a better score.
    """

    def key(entry: dict[str, Any]) -> tuple:
        return tuple(entry[name] for name in ("suite", "arm", "seed", "decoding", "postprocess"))

    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    merged = {key(entry): entry for entry in kept}
    for entry in scores:
        if merged.get(key(entry), entry)["rows"] <= entry["rows"]:
            merged[key(entry)] = entry
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(list(merged.values()), indent=1) + "\n", encoding="utf-8")
    unfinished.replace(file)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ArmError, BadData, EvaluationError, MetricError, MissingData, SandboxUnavailable, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on where it was")
