"""Scores of predictions against references: EM@k, CodeBLEU, chrF and pass@k, each between 0 and 100."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

from sacrebleu.metrics import CHRF

# The package orders the variables of a data flow by the hash of their names, which Python draws anew for each process:
# the score of one and the same file moves by up to 0.6 points. Published figures were got with hash seed 0.
CODEBLEU_ENVIRONMENT = {"PYTHONHASHSEED": "0"}
CODEBLEU_PROGRAM = """
import json, sys
from codebleu import calc_codebleu
json.dump(calc_codebleu(**json.load(sys.stdin)), sys.stdout)
"""


class MetricError(Exception):
    """A metric's package does not work."""


def exact_match_at(k: int, predictions: Sequence[Sequence[str]], references: Sequence[str]) -> float:
    """Per cent of rows whose reference is, character for character, among the first `k` predictions of the row."""
    hits = sum(reference in row[:k] for row, reference in zip(predictions, references, strict=True))
    return 100 * hits / len(references)


def codebleu(predictions: Sequence[str], references: Sequence[str], language: str) -> dict[str, float]:
    """CodeBLEU of the corpus and its four parts, equally weighted (Ren et al., 2020).

    The package counts a data-flow score of exactly 0 as 1; published figures carry that, so it is kept.
    """
    arguments = {"references": list(references), "predictions": list(predictions), "lang": language}
    child = subprocess.run(
        [sys.executable, "-c", CODEBLEU_PROGRAM],
        input=json.dumps(arguments),
        env={**os.environ, **CODEBLEU_ENVIRONMENT},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        raise MetricError(f"CodeBLEU failed; are lab/requirements.txt's versions installed?\n{child.stderr}")
    return {name: 100 * score for name, score in json.loads(child.stdout).items()}


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """chrF2 of the corpus (Popović, 2015): for commands and prose, which have no CodeBLEU."""
    return CHRF().corpus_score(list(predictions), [list(references)]).score


def pass_at(k: int, num_samples: int, num_passed: int) -> float:
    """Chance in per cent that one of `k` samples passes: the unbiased estimator of Chen et al., 2021."""
    if num_samples - num_passed < k:
        return 100.0
    failing = 1.0
    for i in range(num_samples - num_passed + 1, num_samples + 1):
        failing *= 1 - k / i
    return 100 * (1 - failing)
