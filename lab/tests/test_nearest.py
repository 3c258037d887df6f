"""The nearest examples as the server looks them up; beside the server itself they are in test_train.py."""

import math

import pytest
from encoding import TrainingError
from nearest import Nearest, words
from tasks import INSTRUCTION_PROMPT, TASKS, Example


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parseHTTPServer2 max_len(x)", ["parse", "http", "server", "2", "max", "len", "x"]),
        ("`DataFrame.iloc`, don't É", ["data", "frame", "iloc", "don", "t", "é"]),
        (" -- \n", []),
        ("用pandas读取csv文件", ["用", "pandas", "读", "取", "csv", "文", "件"]),
        ("リストを並べ替える", ["リスト", "を", "並", "べ", "替", "え", "る"]),
        ("목록을 정렬", ["목록을", "정렬"]),
        # Vowel signs are marks that words go on with, what silences a vowel is not; a half is a number.
        ("हिन्दी Ⓐb ½x", ["हिन", "दी", "ⓐb", "½", "x"]),
    ],
)
def test_words_are_those_of_the_server(text: str, expected: list[str]):
    assert list(words(text)) == expected


def nearest_codes(instructions: list[str], question: str, k: int) -> list[str]:
    pairs = [(instruction, str(index)) for index, instruction in enumerate(instructions)]
    return [code for _, code in Nearest(pairs, k).to(question, "")]


def test_the_nearest_stands_last_and_equals_in_the_order_of_the_store():
    instructions = ["sort a list of words", "read a file of words", "reverse a list", "sort the keys of a dict"]
    assert nearest_codes(instructions, "how to sort dict_keys", 2) == ["0", "3"]
    assert nearest_codes(["b", "a", "--"], "z", 3) == ["2", "1", "0"]
    assert nearest_codes(["same words", "other", "same words"], "words", 2) == ["2", "0"]
    assert nearest_codes([], "z", 2) == []


def test_no_example_is_shown_what_tells_its_answer():
    pairs = [("sort xs", "1"), ("sort xs", "2"), ("sort ys", "3"), ("order xs", "1"), ("sort all of xs", "4"), ("zs", "5")]
    sources = {"sort xs": "a", "sort all of xs": "a", "zs": "b"}
    nearest = Nearest(pairs, 9, sources)
    assert nearest.to("sort xs", "1") == [("zs", "5"), ("sort ys", "3")]
    assert nearest.to("sort all of xs", "4") == [("zs", "5"), ("order xs", "1"), ("sort ys", "3")]
    # Who asks is no example, and of no source.
    assert len(nearest.to("sort it", "6")) == len(pairs)


def test_no_example_of_conala_is_of_the_same_question():
    task = TASKS["conala"]
    pairs, sources = task.pairs(), task.sources()
    nearest = Nearest(pairs, 3, sources)
    asked = pairs[::20]
    assert any(sources[i] == sources[j] for i, a in asked for j, _ in Nearest(pairs, 3).to(i, a))
    for instruction, answer in asked:
        shots = nearest.to(instruction, answer)
        assert len(shots) == 3 and sources[instruction] not in {sources[shot] for shot, _ in shots}


def test_a_score_is_that_of_okapis_formula():
    _, weights = Nearest([("a b", ""), ("a a c d", "")], 1)._postings["b"]
    assert weights == pytest.approx([math.log(2) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))], abs=1e-12)


def test_too_few_others_are_no_fewer_examples():
    nearest = Nearest([("sort xs", "sorted(xs)"), ("sort ys", "sorted(ys)")], 2)
    with pytest.raises(TrainingError, match="nearest_examples: there are no 2 others for 'sort xs'"):
        nearest.before(Example("", "sorted(xs)", "sort xs"))


def test_examples_stand_before_the_prompt_as_the_server_writes_them():
    example = Example(INSTRUCTION_PROMPT.format("sort {xs}"), "sorted(xs)", "sort {xs}")
    prompt = Nearest([("sort ys", "sorted(ys)\n")], 1).before(example).prompt
    assert prompt == (
        "### Instruction:\nsort ys\n### Response:\nsorted(ys)\n\n\n### Instruction:\nsort {xs}\n### Response:\n"
    )
