#!/usr/bin/env python3
"""Attacks a running server at one rate after the other, finds the knee and plots it.

The knee is the highest rate at which, and at every lower one, 95 % of the requests are answered within the objective. The
load is `lorry loadgen`'s, Poisson arrivals, or vegeta's, at a constant rate; vegeta sees whole replies only.

Writes into the folder --out: targets.jsonl, what is sent; reports.jsonl, a line for each rate and one for the knee;
knee.svg; with lorry also requests.jsonl, a line for each request.
"""

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path

import targets

REPOSITORY = Path(__file__).resolve().parents[2]
SUSTAINED_SHARE = 0.95
# Of a reply; what takes longer has failed.
TIMEOUT_SECONDS = 300


def count_of(rate, seconds):
    """Requests for a rate, with room for what a Poisson process has above its mean."""
    mean = rate * seconds
    return math.ceil(mean + 6 * math.sqrt(mean))


def attack_with_lorry(arguments, rates, lines, objectives):
    mix = arguments.out / "targets.jsonl"
    mix.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [arguments.lorry, "loadgen", "--url", arguments.url, "--mix", mix, "--log", arguments.out / "requests.jsonl"]
    command += ["--rates", ",".join(map(str, rates)), "--duration-s", arguments.seconds, "--timeout-s", TIMEOUT_SECONDS]
    for name, ms in objectives.items():
        command += [f"--slo-{name}-ms", ms]
    run = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE)
    if run.returncode != 0:
        raise SystemExit(run.returncode)
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    return [report for report in reports if "rate" in report]


def attack_with_vegeta(arguments, rates, lines, objectives):
    lines = (json.dumps(targets.for_vegeta(arguments.url, line)) + "\n" for line in lines)
    path = arguments.out / "targets.jsonl"
    path.write_text("")
    reports = []
    for rate in rates:
        part = "".join(islice(lines, count_of(rate, arguments.seconds)))
        with path.open("a") as file:
            file.write(part)
        # Its rates are whole numbers.
        command = ["vegeta", "attack", "-format=json", "-lazy", f"-rate={round(rate * 3600)}/1h"]
        command += [f"-duration={arguments.seconds}s", f"-timeout={TIMEOUT_SECONDS}s"]
        results = subprocess.run(command, input=part.encode(), stdout=subprocess.PIPE, check=True).stdout
        hits = subprocess.run(["vegeta", "encode", "--to=json"], input=results, stdout=subprocess.PIPE, check=True).stdout
        reports.append(report_of(rate, [json.loads(hit) for hit in hits.splitlines()], objectives["e2e"]))
        print(json.dumps(reports[-1]), file=sys.stderr)
    return reports


def report_of(rate, hits, objective_ms):
    """What `lorry loadgen` says of a rate, as far as vegeta's hits tell."""
    is_whole = lambda hit: hit["code"] == 200 and not hit["error"]
    times = sorted(hit["latency"] / 1e6 for hit in hits if is_whole(hit))
    at = lambda share: times[min(len(times) - 1, int(share * len(times)))]
    return {
        "rate": rate,
        "num_requests": len(hits),
        "num_succeeded": len(times),
        "errors": Counter(str(hit["code"] or hit["error"]) for hit in hits if not is_whole(hit)),
        "e2e_ms": {"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": times[-1]} if times else None,
        "objective": {"e2e_ms": objective_ms},
        "good_share": sum(time <= objective_ms for time in times) / len(hits) if hits else 1.0,
    }


def knee_of(reports):
    """As `lorry loadgen` defines it."""
    in_order = sorted(reports, key=lambda report: report["rate"])
    sustained = list(takewhile(lambda report: report["good_share"] >= SUSTAINED_SHARE, in_order))
    return {
        "knee_request_s": sustained[-1]["rate"] if sustained else None,
        "is_reached": len(sustained) < len(reports),
        "sustained_share": SUSTAINED_SHARE,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    targets.add_options(parser)
    parser.add_argument("--rates", default="0.25,0.5,1,2,4", help="requests per second, separated by commas (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=60, help="of each rate (default: %(default)s)")
    parser.add_argument("--slo-ttft-ms", type=float, help="objective: to the first token, at most")
    parser.add_argument("--slo-tpot-ms", type=float, help="objective: for each token after the first, at most")
    parser.add_argument("--slo-e2e-ms", type=float, help="objective: to the end of the reply, at most")
    parser.add_argument("--tool", choices=["lorry", "vegeta"], default="lorry", help="what makes the load (default: %(default)s)")
    parser.add_argument("--lorry", type=Path, default=REPOSITORY / "target" / "release" / "lorry", help="the binary (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for what comes of it")
    arguments = parser.parse_args()
    named = {"ttft": arguments.slo_ttft_ms, "tpot": arguments.slo_tpot_ms, "e2e": arguments.slo_e2e_ms}
    objectives = {name: ms for name, ms in named.items() if ms is not None}
    if not objectives:
        parser.error("a knee needs an objective: --slo-ttft-ms, --slo-tpot-ms or --slo-e2e-ms")
    if arguments.tool == "vegeta" and list(objectives) != ["e2e"]:
        parser.error("vegeta sees whole replies only: --slo-e2e-ms is its objective")
    # Where the plot cannot be drawn, it is known before the load.
    import plot

    rates = sorted(float(rate) for rate in arguments.rates.split(","))
    count = sum(count_of(rate, arguments.seconds) for rate in rates)
    kinds, models = targets.read_kinds(parser, arguments.kinds), arguments.models.split(",")
    lines = targets.requests(kinds, models, count, arguments.max_tokens)
    arguments.out.mkdir(parents=True, exist_ok=True)
    attack = attack_with_vegeta if arguments.tool == "vegeta" else attack_with_lorry
    reports = attack(arguments, rates, lines, objectives)
    knee = knee_of(reports)
    (arguments.out / "reports.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*reports, knee]))
    plot.draw(reports, knee, arguments.out / "knee.svg")
    print(json.dumps(knee))


if __name__ == "__main__":
    main()
