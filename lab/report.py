"""Makes the tables and plots of docs/results.md from the scores of `lab/evaluate.py`.

    lab/report.py runs/conala runs/humaneval --timing runs/quiet

Tables go between two marks of docs/results.md, whose other text stays; plots go to docs/results/. What an adapter cost
to train is read from the `training.json` in its folder. Times are those of --timing, where a run is named that had the
server for itself (`--concurrency 1`), otherwise those of the runs themselves.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_files import REPOSITORY
from matplotlib import pyplot, rc_context
from tabulate import tabulate

RESULTS = REPOSITORY / "docs" / "results.md"
BEGIN, END = "<!-- tables of lab/report.py: begin -->", "<!-- tables of lab/report.py: end -->"
NOTHING = "–"

METRIC_TITLES = {
    "em@1": "EM@1",
    "em@2": "EM@2",
    "em@5": "EM@5",
    "em@10": "EM@10",
    "codebleu": "CodeBLEU",
    "chrf": "chrF",
    "pass@1": "pass@1",
    "pass@10": "pass@10",
    "pass@100": "pass@100",
}
# Colours that people tell apart who see fewer of them (Okabe and Ito).
FAMILY_COLOURS = {"zero-shot": "#999999", "in-context": "#0072B2", "tuned": "#D55E00"}
PLOT_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Instead of ids drawn at random.
    "svg.hashsalt": "lorry",
}


class ReportError(Exception):
    """What is to be reported cannot be read."""


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
        groups.setdefault(key, []).append(score)
    return [_summary(group) for group in groups.values()]


def _summary(scores: list[dict[str, Any]]) -> Summary:
    first = scores[0]

    def mean(name: str) -> float | None:
        values = [score[name] for score in scores if score[name] is not None]
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
    )


def markdown_table(titles: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose others are numbers."""
    alignment = ["left"] + ["right"] * (len(titles) - 1)
    return tabulate(rows, titles, tablefmt="github", colalign=alignment, disable_numparse=True)


def summary_table(scores: Iterable[dict[str, Any]]) -> str:
    """Every score in one table, for the terminal."""
    summaries = summarize(scores)
    metrics = [name for name in METRIC_TITLES if any(name in summary.metrics for summary in summaries)]
    titles = [
        "arm",
        "suite",
        "decoding",
        "post-processing",
        *(METRIC_TITLES[name] for name in metrics),
        "prompt tokens",
    ]
    rows = [
        [
            summary.arm,
            summary.suite,
            summary.decoding,
            summary.postprocess,
            *(str(summary.metrics.get(name, NOTHING)) for name in metrics),
            f"{summary.prompt_tokens:.0f}",
        ]
        for summary in summaries
    ]
    return markdown_table(titles, rows)


def quality_table(summaries: list[Summary]) -> str:
    """The metrics of one suite, decoding and post-processing."""
    metrics = [name for name in METRIC_TITLES if any(name in summary.metrics for summary in summaries)]
    rows = [[summary.arm, *(str(summary.metrics.get(name, NOTHING)) for name in metrics)] for summary in summaries]
    return markdown_table(["arm", *(METRIC_TITLES[name] for name in metrics)], rows)


def cost_table(summaries: list[Summary], adapters: Path) -> str:
    """What an answer of each arm costs, and what it took to have the arm."""
    titles = ["arm", "prompt tokens", "TTFT, ms", "tokens/s", "trained parameters", "training, min", "adapter, MB"]
    rows = []
    for summary in summaries:
        training = adapter_cost(adapters / summary.adapter) if summary.adapter else {}
        rows.append(
            [
                summary.arm,
                f"{summary.prompt_tokens:.0f}",
                _number(summary.ttft_ms, "{:.0f}"),
                _number(summary.tokens_per_second, "{:.1f}"),
                _number(training.get("trainable_parameters"), "{:,.0f}"),
                _number(training.get("minutes"), "{:.0f}"),
                _number(training.get("megabytes"), "{:.1f}"),
            ]
        )
    return markdown_table(titles, rows)


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def adapter_cost(folder: Path) -> dict[str, float]:
    """`trainable_parameters` and `minutes` of training.json, where there is one, and `megabytes` of the weights."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ReportError(f"{weights} is missing: name the folder that the server's adapters are in with --adapters")
    training_file = folder / "training.json"
    training = json.loads(training_file.read_text(encoding="utf-8")) if training_file.is_file() else {}
    return training | {"megabytes": weights.stat().st_size / 1e6}


def plot(summaries: list[Summary], metric: str, file: Path) -> None:
    """Left `metric` of each arm, right the same against what a request costs in prompt tokens. SVG."""
    title = f"{METRIC_TITLES[metric]}, %"
    names = [summary.arm for summary in summaries]
    means = [summary.metrics[metric].mean for summary in summaries]
    deviations = [summary.metrics[metric].deviation or 0 for summary in summaries]
    tokens = [summary.prompt_tokens for summary in summaries]
    colours = [FAMILY_COLOURS[summary.family] for summary in summaries]

    with rc_context(PLOT_STYLE):
        size = (10, 0.6 + 0.32 * max(len(summaries), 8))
        figure, (bars, scatter) = pyplot.subplots(1, 2, figsize=size, layout="constrained")
        bars.barh(names, means, xerr=deviations, color=colours, ecolor="#333333")
        bars.invert_yaxis()
        bars.set_xlabel(title)
        scatter.scatter(tokens, means, color=colours)
        for name, x, y in zip(names, tokens, means):
            scatter.annotate(name, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=7)
        for family in dict.fromkeys(summary.family for summary in summaries):
            scatter.scatter([], [], color=FAMILY_COLOURS[family], label=family)
        scatter.set_xlabel("prompt tokens a request")
        scatter.set_ylabel(title)
        scatter.margins(x=0.2)
        scatter.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, the same scores give the same file.
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def report(scores: list[dict[str, Any]], timing: list[dict[str, Any]], adapters: Path, folder: Path) -> str:
    """The text of all tables; writes the plots to `folder`."""
    summaries, parts = summarize(scores), []
    for suite in dict.fromkeys(summary.suite for summary in summaries):
        of_suite = [summary for summary in summaries if summary.suite == suite]
        rows, all_rows = of_suite[0].rows, of_suite[0].rows_of_suite
        parts.append(f"## {suite}\n\n{'All' if rows == all_rows else f'{rows} of the'} {all_rows} rows.")
        for decoding, postprocess in dict.fromkeys((summary.decoding, summary.postprocess) for summary in of_suite):
            chosen = [s for s in of_suite if (s.decoding, s.postprocess) == (decoding, postprocess)]
            metric = next(name for name in ("pass@1", "em@1", "chrf") if name in chosen[0].metrics)
            image = folder / f"{suite}-{decoding}-{postprocess}.svg"
            plot(chosen, metric, image)
            parts.append(f"### {suite}: {decoding}, post-processing `{postprocess}`\n\n{quality_table(chosen)}")
            caption = f"{METRIC_TITLES[metric]} of each arm, and against its prompt tokens"
            parts.append(f"![{caption}]({folder.name}/{image.name})")
        timed = [s for s in summarize(timing) if s.suite == suite and s.ttft_ms is not None]
        one_each = {summary.arm: summary for summary in reversed(timed)}
        if one_each:
            under_way = max(summary.concurrency for summary in timed)
            title = f"### {suite}: what it costs, with {under_way} request{'s' if under_way > 1 else ''} under way"
            parts.append(f"{title}\n\n{cost_table(list(reversed(one_each.values())), adapters)}")
    return "\n\n".join(parts)


def insert_tables(text: str, tables: str) -> str:
    """`text` with `tables` between the two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ReportError(f"{RESULTS} must hold the lines `{BEGIN}` and `{END}`, between which the tables go")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _read_scores(runs: Iterable[Path]) -> list[dict[str, Any]]:
    scores = []
    for run in runs:
        file = run / "scores.json"
        if not file.is_file():
            raise ReportError(f"{file} is missing: lab/evaluate.py --out {run} writes it")
        scores += json.loads(file.read_text(encoding="utf-8"))
    return scores


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that lab/evaluate.py wrote")
    parser.add_argument(
        "--timing", action="append", type=Path, default=[], metavar="RUN", help="run to take times from"
    )
    parser.add_argument("--adapters", type=Path, default=REPOSITORY / "adapters", help="the server's adapters")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page (%(default)s)")
    options = parser.parse_args(arguments)

    scores = _read_scores(options.runs)
    page = options.results
    tables = report(scores, _read_scores(options.timing) or scores, options.adapters, page.with_suffix(""))
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
    page.write_text(insert_tables(text, tables), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ReportError as error:
        sys.exit(f"error: {error}")
