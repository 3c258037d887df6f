"""lm-eval, unmodified: a small task of our own gets from lorry the scores that it gets from transformers."""

import json
import sys
from pathlib import Path

import pytest

from base import MissingModel, dequantised, gguf_file
from data_files import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "tests" / "clients"))

from lorry_server import serving  # noqa: E402

BASE = "smollm2:135m"
OWN_EXAMPLES = REPOSITORY / "config" / "icl" / "python.jsonl"
NUM_QUESTIONS = 12
# Of an answer's log-probability, as a share of it; lorry rounds activations to 8 bits, transformers computes in f32.
MAX_DIFFERENCE = 0.05


@pytest.fixture
def reference():
    try:
        gguf_file(BASE)
    except MissingModel as missing:
        pytest.skip(f"skipped: {missing}")
    return dequantised(BASE)


def _task(folder: Path) -> dict:
    """Which of four snippets does what is asked: the right one, and those of the next three examples."""
    examples = [json.loads(line) for line in OWN_EXAMPLES.read_text(encoding="utf-8").splitlines()]
    examples = [(example["instruction"], example["code"]) for example in examples]
    questions = [
        {"intent": examples[i][0], "choices": [examples[(i + k) % len(examples)][1] for k in range(4)]}
        for i in range(NUM_QUESTIONS)
    ]
    data = folder / "which_code.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return {
        "task": "which_code",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "# {{intent}}",
        "doc_to_choice": "choices",
        "doc_to_target": 0,
        "target_delimiter": "\n",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def _evaluate(model: str, arguments: dict, task: dict):
    import lm_eval

    result = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], batch_size=1, bootstrap_iters=0, log_samples=True, num_fewshot=0
    )
    samples = sorted(result["samples"]["which_code"], key=lambda sample: sample["doc_id"])
    scores = result["results"]["which_code"]
    logprobs = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    return (scores["acc,none"], scores["acc_norm,none"]), logprobs


def test_a_task_has_the_scores_of_transformers(tmp_path: Path, reference: Path):
    task = _task(tmp_path)
    expected, expected_logprobs = _evaluate("hf", {"pretrained": str(reference), "dtype": "float32", "device": "cpu"}, dict(task))
    with serving("--model", BASE) as server:
        arguments = {
            "model": BASE,
            "base_url": f"{server.url}/v1/completions",
            "tokenizer": str(reference),
            "num_concurrent": 4,
            "tokenized_requests": True,
        }
        scores, logprobs = _evaluate("local-completions", arguments, dict(task))
    assert len(logprobs) == 4 * NUM_QUESTIONS
    differences = [abs(1 - ours / theirs) for ours, theirs in zip(logprobs, expected_logprobs, strict=True)]
    assert max(differences) < MAX_DIFFERENCE
    assert scores == expected
