"""Scores of `lab/evaluate.py` put together: the seeds of an arm as a mean with its spread, and tables in Markdown."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

NOTHING = "–"

METRIC_TITLES = {
    "em@1": "EM@1",
    "em@2": "EM@2",
    "em@5": "EM@5",
    "em@10": "EM@10",
    "distinct": "distinct answers",
    "codebleu": "CodeBLEU",
    "chrf": "chrF",
    "pass@1": "pass@1",
    "pass@10": "pass@10",
    "pass@100": "pass@100",
}


class SummaryError(Exception):
    """Scores do not belong into one table."""


@dataclass(frozen=True)
class Spread:
    mean: float
    deviation: float | None
    """Standard deviation over the seeds; None with one."""

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + (f" ± {self.deviation:.1f}" if self.deviation is not None else "")


@dataclass(frozen=True)
class Summary:
    """One arm on one suite, over its seeds."""

    suite: str
    decoding: str
    postprocess: str
    arm: str
    adapter: str | None
    num_examples: int
    rows: int
    rows_of_suite: int
    concurrency: int
    metrics: dict[str, Spread]
    prompt_tokens: float
    ttft_ms: float | None
    tokens_per_second: float | None
    total_ms_p50: float | None
    """Of whole answers; None in scores of before it was measured."""
    total_ms_p90: float | None

    @property
    def family(self) -> str:
        if self.adapter:
            return "tuned"
        return "in-context" if self.num_examples else "zero-shot"


def summarize(scores: Iterable[dict[str, Any]]) -> list[Summary]:
    """Scores (entries of scores.json) with the seeds of an arm put together, in the order of their first."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for score in scores:
        key = tuple(score[name] for name in ("suite", "decoding", "postprocess", "arm"))
        group = groups.setdefault(key, [])
        if score["seed"] in [other["seed"] for other in group]:
            raise SummaryError(f"arm {score['arm']} on {score['suite']} is in several runs: name one of them")
        group.append(score)
    return [_summary(group) for group in groups.values()]


def _summary(scores: list[dict[str, Any]]) -> Summary:
    first = scores[0]
    if len({score["rows"] for score in scores}) > 1:
        raise SummaryError(f"the seeds of arm {first['arm']} on {first['suite']} have different numbers of rows")

    def mean(name: str) -> float | None:
        values = [score[name] for score in scores if score.get(name) is not None]
        return statistics.mean(values) if values else None

    return Summary(
        **{
            name: first[name] for name in ("suite", "decoding", "postprocess", "arm", "adapter", "num_examples", "rows")
        },
        rows_of_suite=first["rows_of_suite"],
        concurrency=max(score["concurrency"] for score in scores),
        metrics={name: Spread.of([score["metrics"][name] for score in scores]) for name in first["metrics"]},
        prompt_tokens=mean("prompt_tokens"),
        ttft_ms=mean("ttft_ms"),
        tokens_per_second=mean("tokens_per_second"),
        total_ms_p50=mean("total_ms_p50"),
        total_ms_p90=mean("total_ms_p90"),
    )


def metrics_of(summaries: list[Summary]) -> list[str]:
    """Those that any of `summaries` has, in the order of their titles."""
    return [name for name in METRIC_TITLES if any(name in summary.metrics for summary in summaries)]


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    alignment = ["left"] + ["right"] * (len(titles) - 1)
    return tabulate(rows, titles, tablefmt="github", colalign=alignment, disable_numparse=True)


def summary_table(scores: Iterable[dict[str, Any]]) -> str:
    """Every score in one table, for the terminal."""
    summaries = summarize(scores)
    metrics = metrics_of(summaries)
    titles = [
        "arm",
        "suite",
        "decoding",
        "post-processing",
        *(METRIC_TITLES[name] for name in metrics),
        "prompt tokens",
        "ms, p50",
        "ms, p90",
    ]
    rows = [
        [
            summary.arm,
            summary.suite,
            summary.decoding,
            summary.postprocess,
            *(str(summary.metrics.get(name, NOTHING)) for name in metrics),
            f"{summary.prompt_tokens:.0f}",
            *(NOTHING if ms is None else f"{ms:.0f}" for ms in (summary.total_ms_p50, summary.total_ms_p90)),
        ]
        for summary in summaries
    ]
    return markdown_table(titles, rows)
