"""Whether arms differ by more than chance."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from paired import interval, main, mcnemar
from predictions import EvaluationError, Prediction


@pytest.mark.parametrize(
    ("only_one", "only_other", "probability"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 0.0625), (0, 5, 0.0625), (8, 2, 0.109375), (1, 0, 1.0)],
)
def test_mcnemars_test_is_the_exact_one(only_one: int, only_other: int, probability: float):
    assert mcnemar(only_one, only_other) == pytest.approx(probability)


def test_an_interval_holds_the_mean_and_nothing_where_all_rows_are_alike():
    low, high = interval([1.0] * 30 + [0.0] * 70)
    # A normal distribution would give 0.3 and 1.96 times 0.046 either way.
    assert low == pytest.approx(0.21, abs=0.02)
    assert high == pytest.approx(0.39, abs=0.02)
    assert interval([0.0] * 10) == (0.0, 0.0)


def _run(folder: Path, answers: dict[tuple[str, int | None], list[str]]) -> Path:
    """A run over a suite of three rows, whose references are a, b and c."""
    suite = folder / "own.jsonl"
    pairs = [{"instruction": f"say {letter}", "code": letter} for letter in "abc"]
    suite.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for (arm, seed), texts in answers.items():
            for row, text in enumerate(texts):
                prediction = Prediction(
                    suite="own", arm=arm, seed=seed, row=str(row), decoding="greedy", request="", texts=[text],
                    finish_reason="stop", model="m", adapter=None, generation=None, icl=None, prompt_tokens=1,
                    cached_tokens=0, completion_tokens=1, ttft_ms=1.0, total_ms=2.0, concurrency=1,
                )  # fmt: skip
                file.write(json.dumps(asdict(prediction)) + "\n")
    return suite


def test_arms_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    answers = {
        ("base", None): ["a", "x", "x"],
        ("tuned", None): ["a", "b", "x"],
        # Asked with two seeds: a row counts by half.
        ("drawn", 1): ["a", "x", "c"],
        ("drawn", 2): ["a", "x", "x"],
    }
    suite = _run(tmp_path, answers)
    main([str(suite), str(tmp_path), "--against", "base"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:4] for line in lines] == [["drawn", "3", "50.0", "+16.7"], ["tuned", "3", "66.7", "+33.3"]]
    assert [line[5] for line in lines] == ["–", "1 (1, 0)"]
    with pytest.raises(EvaluationError, match="has no arm 'other'"):
        main([str(suite), str(tmp_path), "--against", "other"])
