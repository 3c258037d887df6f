#!/usr/bin/env python3
"""Draws what an attack over rates found: latencies, and the share of good replies with the knee."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

LATENCIES = {"ttft_ms": ("time to first token", "tab:blue"), "e2e_ms": ("whole reply", "tab:orange")}
STYLES = {"p50": "-", "p99": "--"}


def draw(reports, knee, path):
    """`reports` are in the order of their rates; the file's ending says the format."""
    rates = [report["rate"] for report in reports]
    figure, (latency, share) = plt.subplots(2, sharex=True, figsize=(7, 6), layout="constrained")
    for key, (name, color) in LATENCIES.items():
        for percentile, style in STYLES.items():
            points = [(report["rate"], report[key][percentile] / 1e3) for report in reports if report.get(key)]
            if points:
                latency.plot(*zip(*points), style, color=color, marker="o", label=f"{name}, {percentile}")
    latency.set(yscale="log", ylabel="seconds")
    latency.legend()
    objective = ", ".join(f"{name.removesuffix('_ms').upper()} ≤ {ms:g} ms" for name, ms in reports[0]["objective"].items() if ms)
    share.plot(rates, [100 * report["good_share"] for report in reports], marker="o", color="tab:green", label=objective)
    share.axhline(100 * knee["sustained_share"], color="gray", linewidth=1, linestyle=":")
    share.set(xscale="log", xlabel="offered requests per second", ylabel="good replies, %", ylim=(-3, 103))
    share.set_xticks(rates, [f"{rate:g}" for rate in rates])
    share.minorticks_off()
    share.legend(loc="lower left")
    if knee["knee_request_s"] is not None:
        for axes in (latency, share):
            axes.axvline(knee["knee_request_s"], color="tab:red", linewidth=1)
        bound = "knee" if knee["is_reached"] else "knee at or above"
        share.annotate(f" {bound} {knee['knee_request_s']:g}/s", (knee["knee_request_s"], 50), color="tab:red")
    for axes in (latency, share):
        axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main():
    """reports.jsonl of attack.py, and the file to draw."""
    source, path = map(Path, sys.argv[1:])
    *reports, knee = map(json.loads, source.read_bytes().splitlines())
    draw(reports, knee, path)


if __name__ == "__main__":
    main()
