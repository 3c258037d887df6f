"""The nearest examples as the server looks them up; beside the server itself they are in test_train.py."""

import math

import pytest
from nearest import Nearest, words
from tasks import INSTRUCTION_PROMPT, Example


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("parseHTTPServer2 max_len(x)", ["parse", "http", "server", "2", "max", "len", "x"]),
        ("`DataFrame.iloc`, don't É", ["data", "frame", "iloc", "don", "t", "é"]),
        (" -- \n", []),
        ("用pandas读取csv文件", ["用", "pandas", "读", "取", "csv", "文", "件"]),
        ("リストを並べ替える", ["リスト", "を", "並", "べ", "替", "え", "る"]),
        ("목록을 정렬", ["목록을", "정렬"]),
        # Vowel signs are marks, and belong to the word; a numeral of Han is no digit; a half is a number.
        ("हिन्दी Ⓐb ½x", ["हिन", "दी", "ⓐ", "b", "½", "x"]),
    ],
)
def test_words_are_those_of_the_server(text: str, expected: list[str]):
    assert list(words(text)) == expected


def nearest_codes(instructions: list[str], question: str, k: int) -> list[str]:
    pairs = [(instruction, str(index)) for index, instruction in enumerate(instructions)]
    return [code for _, code in Nearest(pairs, k).to(question)]


def test_the_nearest_stands_last_and_equals_in_the_order_of_the_store():
    instructions = ["sort a list of words", "read a file of words", "reverse a list", "sort the keys of a dict"]
    assert nearest_codes(instructions, "how to sort dict_keys", 2) == ["0", "3"]
    assert nearest_codes(["b", "a", "--"], "z", 3) == ["2", "1", "0"]
    assert nearest_codes(["same words", "other", "same words"], "words", 2) == ["2", "0"]
    assert nearest_codes([], "z", 2) == []


def test_no_example_is_shown_its_own_answer():
    assert nearest_codes(["sort xs", "sort ys", "sort xs"], "sort xs", 3) == ["1"]


def test_a_score_is_that_of_okapis_formula():
    _, weights = Nearest([("a b", ""), ("a a c d", "")], 1)._postings["b"]
    assert weights == pytest.approx([math.log(2) * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))], abs=1e-12)


def test_examples_stand_before_the_prompt_as_the_server_writes_them():
    example = Example(INSTRUCTION_PROMPT.format("sort {xs}"), "sorted(xs)", "sort {xs}")
    prompt = Nearest([("sort ys", "sorted(ys)\n")], 1).before(example).prompt
    assert prompt == (
        "### Instruction:\nsort ys\n### Response:\nsorted(ys)\n\n\n### Instruction:\nsort {xs}\n### Response:\n"
    )
