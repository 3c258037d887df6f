"""Tables and plots of made-up scores."""

import json
from pathlib import Path

import pytest
import report
from report import BEGIN, END, ReportError, insert_tables
from summary import SummaryError, summarize


def entry(arm, seed, em, **fields):
    return {
        "suite": "conala", "arm": arm, "seed": seed, "decoding": "greedy", "rows": 4, "rows_of_suite": 543,
        "model": "m", "adapter": None, "generation": None, "num_examples": 0, "concurrency": 1, "prompt_tokens": 30.0,
        "cached_tokens": 0.0, "completion_tokens": 5.0, "ttft_ms": 40.0, "tokens_per_second": 50.0,
        "postprocess": "corrected", "metrics": {"em@1": em},
    } | fields  # fmt: skip


SCORES = [
    entry("zero-shot", None, 0.0),
    entry("icl-3", 42, 5.0, num_examples=3),
    entry("icl-3", 777, 7.0, num_examples=3),
    entry("ia3", None, 9.0, adapter="conala-ia3"),
    entry("lora", None, 12.5, adapter="conala"),
]


def test_the_seeds_of_an_arm_become_a_mean_and_a_spread():
    summaries = {summary.arm: summary for summary in summarize(SCORES)}
    assert str(summaries["icl-3"].metrics["em@1"]) == "6.0 ± 1.4"
    assert str(summaries["lora"].metrics["em@1"]) == "12.5"
    assert [summary.family for summary in summaries.values()] == ["zero-shot", "in-context", "tuned", "tuned"]


@pytest.fixture
def adapters(tmp_path):
    for name, num_bytes, parameters, minutes in [
        ("conala", 8_800_000, 4_399_104, 24.7),
        ("conala-ia3", 400_000, 187_392, 10.0),
    ]:
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes(num_bytes))
        (folder / "training.json").write_text(json.dumps({"trainable_parameters": parameters, "minutes": minutes}))
    return tmp_path / "adapters"


def test_a_page_keeps_its_own_words_and_gets_the_tables(tmp_path, adapters):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "scores.json").write_text(json.dumps(SCORES))
    page = tmp_path / "results.md"
    page.write_text(f"# Results\n\nBefore.\n\n{BEGIN}\nold\n{END}\n\nAfter.\n")
    arguments = [str(tmp_path / "run"), "--adapters", str(adapters), "--results", str(page)]
    report.main(arguments)
    text = page.read_text()
    assert text.startswith("# Results\n\nBefore.\n") and text.endswith("\n\nAfter.\n") and "old" not in text
    assert "| icl-3     | 6.0 ± 1.4 |" in text
    cells = [cell.strip() for cell in text.splitlines()[-5].strip("|").split("|")]
    assert cells == ["lora", "30", "40", "50.0", "4,399,104", "25", "8.8"]

    plot = tmp_path / "results" / "conala-greedy-corrected.svg"
    assert f"](results/{plot.name})" in text
    first = plot.read_bytes()
    # Text is drawn, and named in a comment.
    for axis in ("EM@1, %", "prompt tokens a request", "training, minutes", "adapter, MB"):
        assert f"<!-- {axis} -->".encode() in first
    report.main(arguments)
    assert page.read_text() == text and plot.read_bytes() == first


def test_scores_that_do_not_belong_together_are_no_table():
    with pytest.raises(SummaryError, match="arm lora on conala is in several runs"):
        summarize([*SCORES, SCORES[-1]])
    with pytest.raises(SummaryError, match="different numbers of rows"):
        summarize([*SCORES, entry("icl-3", 5432, 7.0, num_examples=3, rows=3)])
    with pytest.raises(SummaryError, match="zero-shot and lora on conala have different numbers"):
        report.report([SCORES[0], SCORES[-1] | {"rows": 3}], [], None, Path("unused"))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ReportError, match="scores.json is missing"):
        report.main([str(tmp_path)])
    with pytest.raises(ReportError, match="adapter_model.safetensors is missing"):
        report.adapter_cost(tmp_path)
    with pytest.raises(ReportError, match="must hold the lines"):
        insert_tables("# Results\n", "")
