"""Says whether arms differ by more than chance: exact matches of the same rows, in pairs.

    lab/paired.py nl2bash runs/nl2bash --against "icl-3, nearest"

For every other arm of a run of `lab/evaluate.py`: the difference in EM@1 with its 95 % interval, by a bootstrap over the rows, and
McNemar's exact test over those that only one of the two answered. Of an arm that was asked with several seeds a row
counts by its mean, and there is no such test.
"""

import argparse
import math
import random
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_files import BadData, MissingData
from predictions import EvaluationError, Prediction, read_predictions
from suites import Suite, suite_named
from summary import NOTHING, markdown_table

RESAMPLES = 10_000


def mcnemar(only_one: int, only_other: int) -> float:
    """The probability of a split at least so uneven, were both arms alike: two-sided and exact."""
    num_pairs = only_one + only_other
    tail = sum(math.comb(num_pairs, count) for count in range(min(only_one, only_other) + 1))
    return min(1.0, 2 * tail / 2**num_pairs)


def interval(differences: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Between which 95 % of the means of as many rows lie, drawn anew from these."""
    draw = random.Random(seed)
    means = sorted(statistics.fmean(draw.choices(differences, k=len(differences))) for _ in range(RESAMPLES))
    return means[RESAMPLES // 40], means[-1 - RESAMPLES // 40]


def exact_matches(suite: Suite, postprocess: str, predictions: list[Prediction]) -> dict[str, dict[str, list[bool]]]:
    """Of each arm and row, whether the first answer is the reference, for each seed."""
    rows = {row.id: row for row in suite.rows()}
    matches: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for prediction in predictions:
        row = rows[prediction.row]
        answer = suite.postprocess[postprocess](prediction.texts[0], row)
        matches[prediction.arm][prediction.row].append(answer == row.reference)
    return matches


def compared(matches: dict[str, dict[str, list[bool]]], against: str) -> list[list[str]]:
    """The lines of the table; only rows that both arms answered count."""
    lines = []
    for arm, own in sorted(matches.items()):
        both = sorted(own.keys() & matches[against].keys())
        if arm == against or not both:
            continue
        pairs = [(own[row], matches[against][row]) for row in both]
        means = [(statistics.fmean(one), statistics.fmean(other)) for one, other in pairs]
        low, high = interval([one - other for one, other in means])
        chance = NOTHING
        if all(len(one) == len(other) == 1 for one, other in pairs):
            only_one, only_other = (sum(one > other for one, other in means), sum(one < other for one, other in means))
            chance = f"{mcnemar(only_one, only_other):.2g} ({only_one}, {only_other})"
        of_one, of_other = (100 * statistics.fmean(side) for side in zip(*means))
        lines.append(
            [arm, str(len(both)), f"{of_one:.1f}", f"{of_one - of_other:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}", chance]
        )
    return lines


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", metavar="SUITE")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--against", required=True, metavar="ARM")
    parser.add_argument("--decoding", default="greedy", help="such as beam10 (%(default)s)")
    parser.add_argument("--postprocess", default="corrected", help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        suite = suite_named(options.suite)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    if "em" not in suite.metrics or options.postprocess not in suite.postprocess:
        raise EvaluationError(f"{suite.name} has no exact matches by {options.postprocess}")
    asked = [p for p in read_predictions(options.run / "predictions.jsonl").values() if p.suite == suite.name]
    matches = exact_matches(suite, options.postprocess, [p for p in asked if p.decoding == options.decoding])
    if options.against not in matches:
        raise EvaluationError(f"{options.run} has no arm {options.against!r} ({options.decoding}) of {suite.name}")
    titles = ["arm", "rows", "EM@1", f"less that of {options.against}", "95 %", "p (only it, only the other)"]
    print(markdown_table(titles, compared(matches, options.against)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BadData, EvaluationError, MissingData, OSError) as error:
        sys.exit(f"error: {error}")
