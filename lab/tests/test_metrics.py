"""The metrics give what the paper's authors got for their own predictions."""

import json

import pytest
from data_files import data_file, read_rows
from metrics import chrf, codebleu, exact_match_at, pass_at

OUTPUTS = ("output", "newline_output", "output_1shot", "output_2shot", "output_3shot", "output_4shot")


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_papers_own_outputs_score_as_published(name):
    golden = json.loads(data_file("paper_outputs/golden_metrics.json").read_text())[name]
    rows = read_rows(f"paper_outputs/{name}.jsonl")
    predictions, references = [row["predictions"] for row in rows], [row["references"] for row in rows]

    assert len(rows) == golden["n"]
    for k in (1, 2, 5, 10):
        assert round(exact_match_at(k, predictions, references), 3) == golden[f"em@{k}"]
    scores = codebleu([row[0] for row in predictions], references, "python")
    for part, expected in golden["pypi_codebleu_0_7_0"].items():
        assert round(scores[part] / 100, 4) == round(expected, 4), part


def test_pass_at_k_is_the_share_of_draws_of_k_that_hold_a_passing_sample():
    assert pass_at(1, 10, 3) == pytest.approx(30)
    # Of the 45 pairs of 10 samples, 21 hold none of the 3 that pass.
    assert pass_at(2, 10, 3) == pytest.approx(100 * (1 - 21 / 45))
    assert pass_at(8, 10, 3) == 100
    assert pass_at(1, 1, 0) == 0


def test_chrf_is_full_for_equal_texts_and_nothing_for_disjoint_ones():
    assert chrf(["ls -la"], ["ls -la"]) == pytest.approx(100)
    assert chrf(["zzzz"], ["ls -la"]) == 0
