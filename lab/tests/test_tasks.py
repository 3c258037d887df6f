"""What is trained on: gaps, splits that share nothing, stores of examples."""

import ast
import json

import pytest
from data_files import REPOSITORY, BadData
from stores import MAX_EXAMPLES, store
from suites import SUITES
from tasks import TASKS, Task, task_named


@pytest.mark.parametrize("split", ["train", "dev"])
def test_a_gap_and_what_stands_around_it_are_the_function(split: str):
    task = TASKS["fim-python"]
    for example in getattr(task, split)():
        prefix, suffix = (
            example.prompt.removeprefix("<|fim_prefix|>").removesuffix("<|fim_middle|>").split("<|fim_suffix|>")
        )
        ast.parse(prefix + example.target + suffix)
        assert example.target.strip()


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_what_is_measured_was_not_trained_on(task: Task):
    train = {example.prompt for example in task.train()}
    assert not train & {example.prompt for example in task.dev()}
    for suite in SUITES.values():
        assert not train & {row.prompt for row in suite.rows()}, suite.name


def test_no_docstring_and_no_body_of_the_test_set_was_trained_on():
    tested = SUITES["docstring"].rows()
    answers, bodies = {row.reference for row in tested}, {row.instruction.partition("\n")[2] for row in tested}
    for code, docstring in TASKS["docstring"].pairs():
        assert docstring not in answers
        assert code.partition("\n")[2] not in bodies


def test_a_store_keeps_the_order_and_the_limits_of_the_server():
    pairs = [(f"instruction {index}", "code") for index in range(MAX_EXAMPLES + 500)]
    kept = store([("", "code"), ("long" * 9000, "code"), *pairs])
    assert len(kept) == MAX_EXAMPLES
    assert kept == sorted(kept, key=pairs.index)


def test_a_file_of_ones_own_is_a_task_with_a_tenth_of_it_for_dev():
    task = task_named(str(REPOSITORY / "config" / "icl" / "python.jsonl"))
    assert (task.name, len(task.train()), len(task.dev())) == ("python", 21, 3)
    assert task.dev()[0].prompt.startswith("### Instruction:\n")
    assert not {example.prompt for example in task.train()} & {example.prompt for example in task.dev()}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ('{"instruction": "a", "code": "b"}\n{"instruction": "a"}', "line 2 must be .*KeyError"),
        ('{"instruction": "a", "code": ""}', "line 1: .* not empty"),
        ("[1]", "line 1 must be"),
        ("{", "line 1 must be"),
        (b"\xff", "line 1 must be"),
    ],
)
def test_a_file_of_ones_own_that_is_wrong_is_refused_by_its_line(tmp_path, text, complaint):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(BadData, match=complaint):
        task_named(str(file)).train()


def _lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def test_a_file_for_openais_fine_tuning_has_an_example_for_each_answer_that_counts(tmp_path):
    system, question = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    answers = [{"role": "assistant", "content": text} for text in ("first", "second")]
    file, validation = tmp_path / "mine.jsonl", tmp_path / "dev.jsonl"
    file.write_text(_lines({"messages": [system, question, answers[0], question, answers[1]]}))
    validation.write_text(_lines({"messages": [question, answers[0] | {"weight": 0}, question, answers[1]]}))
    task = task_named(str(file), str(validation))
    assert task.template is None
    assert [(example.prompt, example.target) for example in task.train()] == [
        ([system, question], "first"),
        ([system, question, answers[0], question], "second"),
    ]
    assert [(example.prompt, example.target) for example in task.dev()] == [([question, answers[0], question], "second")]


def test_pairs_of_prompt_and_completion_are_taken_as_they_are(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(_lines(*({"prompt": f"p{index}", "completion": "c"} for index in range(20))))
    task = task_named(str(file))
    assert [example.prompt for example in task.dev()] == ["p0", "p10"]
    assert len(task.train()) == 18 and task.template is None


@pytest.mark.parametrize(
    ("second", "complaint"),
    [
        ({"prompt": "a"}, "line 2 must be .*KeyError"),
        ({"prompt": "a", "completion": ""}, "line 2: an answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "line 2: an answer"),
        ({"messages": ["a"]}, "line 2 must be"),
        ([1], "line 2 must be"),
    ],
)
def test_a_conversation_that_is_wrong_is_refused_by_its_line(tmp_path, second, complaint):
    file = tmp_path / "mine.jsonl"
    file.write_text(_lines({"prompt": "a", "completion": "b"}, second))
    with pytest.raises(BadData, match=complaint):
        task_named(str(file)).train()


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_carriage_return_is_a_blank_and_ends_no_line(tmp_path, end):
    file = tmp_path / "mine.jsonl"
    lines = [b'{"prompt": "a",\r "completion": "b"}'] * 11
    file.write_bytes(b"\n".join(lines) + end)
    assert len(task_named(str(file)).train()) == 9
    file.write_bytes(b"\n".join([b'{"instruction": "a",\r "code": "b"}'] * 11) + end)
    assert len(task_named(str(file)).train()) == 9


def test_only_a_file_of_ones_own_has_a_validation_file():
    with pytest.raises(ValueError, match="dev split of its own"):
        task_named("bash", "dev.jsonl")
