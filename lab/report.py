"""Makes the tables and plots of docs/results.md from the scores of `lab/evaluate.py`.

    lab/report.py runs/conala runs/humaneval --timing runs/quiet

Tables go between two marks of docs/results.md, whose other text stays; plots go to docs/results/. What an adapter cost
to train is read from the `training.json` in its folder. Times are those of --timing, a run that had the server for
itself (`--concurrency 1`); where none is named, those of the runs themselves.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_files import REPOSITORY
from matplotlib import pyplot, rc_context
from summary import METRIC_TITLES, NOTHING, Summary, SummaryError, markdown_table, metrics_of, summarize

RESULTS = REPOSITORY / "docs" / "results.md"
BEGIN, END = "<!-- tables of lab/report.py: begin -->", "<!-- tables of lab/report.py: end -->"

# Colours that people tell apart who see fewer of them (Okabe and Ito).
FAMILY_COLOURS = {"zero-shot": "#999999", "in-context": "#0072B2", "tuned": "#D55E00"}
# Figures of `adapter_cost` that adapters are plotted against, with their axes.
TRAINING_AXES = {"minutes": "training, minutes", "megabytes": "adapter, MB"}
PLOT_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # Instead of ids drawn at random.
    "svg.hashsalt": "lorry",
}


class ReportError(Exception):
    """What is to be reported cannot be read."""


def quality_table(summaries: list[Summary]) -> str:
    """The metrics of one suite, decoding and post-processing."""
    metrics = metrics_of(summaries)
    rows = [[summary.arm, *(str(summary.metrics.get(name, NOTHING)) for name in metrics)] for summary in summaries]
    return markdown_table(["arm", *(METRIC_TITLES[name] for name in metrics)], rows)


def cost_table(summaries: list[Summary], timed: dict[str, Summary], adapters: Path) -> str:
    """What an answer of each arm costs, with the times of `timed`, and what it took to have the arm."""
    titles = ["arm", "prompt tokens", "TTFT, ms", "tokens/s", "trained parameters", "training, min", "adapter, MB"]
    rows = []
    for summary in summaries:
        training = adapter_cost(adapters / summary.adapter) if summary.adapter else {}
        times = timed.get(summary.arm)
        rows.append(
            [
                summary.arm,
                f"{summary.prompt_tokens:.0f}",
                _number(times and times.ttft_ms, "{:.0f}"),
                _number(times and times.tokens_per_second, "{:.1f}"),
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


def plot(summaries: list[Summary], metric: str, adapters: Path, file: Path) -> None:
    """`metric` of each arm, the same against what a request costs in prompt tokens, and, where several adapters are
    compared, against what each took to train and takes to keep. SVG."""
    title = f"{METRIC_TITLES[metric]}, %"
    values = {summary.arm: summary.metrics[metric] for summary in summaries}
    colours = {summary.arm: FAMILY_COLOURS[summary.family] for summary in summaries}
    costs = {"prompt tokens a request": {summary.arm: summary.prompt_tokens for summary in summaries}}
    trained = {summary.arm: adapter_cost(adapters / summary.adapter) for summary in summaries if summary.adapter}
    if len(trained) > 1:
        for name, axis in TRAINING_AXES.items():
            costs[axis] = {arm: cost[name] for arm, cost in trained.items() if name in cost}
    untuned = [summary for summary in summaries if summary.family != "tuned"]
    best_untuned = max(untuned, key=lambda summary: values[summary.arm].mean, default=None)

    with rc_context(PLOT_STYLE):
        num_rows = (len(costs) + 2) // 2
        size = (10, num_rows * (0.6 + 0.32 * max(len(summaries), 8)))
        figure, panels = pyplot.subplots(num_rows, 2, figsize=size, layout="constrained")
        bars, *scatters = panels.flat
        bars.barh(
            list(values),
            [value.mean for value in values.values()],
            xerr=[value.deviation or 0 for value in values.values()],
            color=list(colours.values()),
            ecolor="#333333",
        )
        bars.invert_yaxis()
        bars.set_xlabel(title)
        for family in dict.fromkeys(summary.family for summary in summaries):
            bars.scatter([], [], color=FAMILY_COLOURS[family], label=family)
        bars.legend(frameon=False)
        for panel, (axis, of_arm) in zip(scatters, costs.items()):
            for arm, cost in of_arm.items():
                panel.scatter(cost, values[arm].mean, color=colours[arm])
                panel.annotate(
                    arm, (cost, values[arm].mean), xytext=(4, 3), textcoords="offset points", fontsize=7
                )
            if axis in TRAINING_AXES.values() and best_untuned is not None:
                panel.axhline(values[best_untuned.arm].mean, color=FAMILY_COLOURS[best_untuned.family], linestyle=":")
                panel.set_title(f"dotted: {best_untuned.arm}, without training", fontsize=8)
            panel.set_xlabel(axis)
            panel.set_ylabel(title)
            panel.margins(x=0.2)
        for panel in scatters[len(costs) :]:
            panel.remove()
        file.parent.mkdir(parents=True, exist_ok=True)
        # Without a date, the same scores give the same file.
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def report(scores: list[dict[str, Any]], timing: list[dict[str, Any]], adapters: Path, folder: Path) -> str:
    """The text of all tables; writes the plots to `folder`."""
    summaries, parts = summarize(scores), []
    for suite in dict.fromkeys(summary.suite for summary in summaries):
        of_suite = [summary for summary in summaries if summary.suite == suite]
        parts.append(f"## {suite}")
        for decoding, postprocess in dict.fromkeys((summary.decoding, summary.postprocess) for summary in of_suite):
            chosen = [s for s in of_suite if (s.decoding, s.postprocess) == (decoding, postprocess)]
            metric = next(name for name in ("pass@1", "em@10", "em@1", "chrf") if name in chosen[0].metrics)
            image = folder / f"{suite}-{decoding}-{postprocess}.svg"
            title = f"### {suite}: {decoding}, post-processing `{postprocess}`, {_rows(chosen)}"
            parts.append(f"{title}\n\n{quality_table(chosen)}")
            plot(chosen, metric, adapters, image)
            caption = f"{METRIC_TITLES[metric]} of each arm, and against what it costs"
            parts.append(f"![{caption}]({folder.name}/{image.name})")
        timed = {s.arm: s for s in summarize(timing) if s.suite == suite and s.ttft_ms is not None}
        first_of_arm: dict[str, Summary] = {}
        for summary in of_suite:
            first_of_arm.setdefault(summary.arm, summary)
        title = f"### {suite}: what it costs{_conditions(list(timed.values()))}"
        parts.append(f"{title}\n\n{cost_table(list(first_of_arm.values()), timed, adapters)}")
    return "\n\n".join(parts)


def _conditions(timed: list[Summary]) -> str:
    """Under which times were taken."""
    if not timed:
        return ""
    under_way = max(summary.concurrency for summary in timed)
    return f"; times of {_rows(timed)}, with {under_way} request{'s' if under_way > 1 else ''} under way"


def _rows(summaries: list[Summary]) -> str:
    """Which part of the suite one table is of."""
    first = summaries[0]
    for summary in summaries:
        if summary.rows != first.rows:
            raise SummaryError(f"arms {first.arm} and {summary.arm} on {first.suite} have different numbers of rows")
    of_all = "" if first.rows == first.rows_of_suite else f" of {first.rows_of_suite}"
    return f"{first.rows}{of_all} rows"


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
    except (ReportError, SummaryError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
