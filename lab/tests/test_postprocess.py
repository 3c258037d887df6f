"""What is cut from a prediction before it is scored."""

import pytest
from data_files import read_rows
from postprocess import answer, before_stops, before_suffix, docstring, first_line, paper_compat


@pytest.mark.parametrize("name", ["output", "newline_output", "output_1shot", "output_4shot"])
def test_the_papers_own_outputs_are_left_as_they_are(name):
    for row in read_rows(f"paper_outputs/{name}.jsonl"):
        assert [paper_compat(text) for text in row["predictions"]] == row["predictions"]


def test_49_references_of_conala_cannot_be_matched_as_the_paper_cuts_and_all_can_when_corrected():
    references = [row["cmd"] for row in read_rows("conala/cmd_test.oracle_man.full.json")]
    assert sum(paper_compat(reference) != reference for reference in references) == 49
    assert all(answer(reference) == reference for reference in references)
    assert all(answer(f"```python\n{reference}\n```\nThat is it.") == reference for reference in references)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("x[::-1]\nprint(x)", "x[::-1]"),
        ("[y for y in x if y < 3]", "[y for y in x if y "),
        ("x<|endoftext|>", "x"),
        ("    x", "    x"),
        ("```python\nx", "```python"),
    ],
)
def test_paper_compat_cuts_at_the_first_of_its_stops(text, cut):
    assert paper_compat(text) == cut


@pytest.mark.parametrize(
    "text",
    [
        "x < y",
        "  x < y\n",
        "x < y\n\nThis compares two values.",
        "```python\nx < y\n```",
        "```\nx < y\n```",
        "```python\nx < y",
        "You can compare them:\n\n```python\nx < y\n```\n\nOr not.",
        "You can compare them:\n\n```\nx < y\n```",
        "```shell-session\nx < y\n```",
        "x < y\n```\n\nThis compares them.",
    ],
)
def test_an_answer_is_found_in_what_models_put_around_it(text):
    assert answer(text) == "x < y"


def test_an_answer_may_have_several_lines():
    assert answer("if x:\n    pass\n") == "if x:\n    pass"


@pytest.mark.parametrize(
    "text",
    [
        "Add one.\n\nReturns it.",
        '"""Add one.\n\nReturns it."""',
        '```python\n"""Add one.\n\nReturns it.\n"""\n```',
        '```python\ndef f(x):\n    """\n    Add one.\n\n    Returns it.\n    """\n    return x + 1\n```',
    ],
)
def test_a_docstring_is_its_text(text):
    assert docstring(text) == "Add one.\n\nReturns it."


def test_a_program_ends_before_what_does_not_belong_to_it():
    stops = ("\ndef", "\nprint")
    assert before_stops("    return x\n\nprint(f(1))\ndef g(): pass", stops) == "    return x\n"
    assert before_stops("    return x", stops) == "    return x"
    assert before_stops("Here:\n```python\nimport math\ndef f(): pass\n```\n", stops) == "import math\ndef f(): pass\n"


def test_a_line_keeps_its_indentation():
    assert first_line("    return x\n\nprint(x)") == "    return x\n"
    assert first_line("") == "\n"


def test_what_fills_a_gap_ends_where_the_text_behind_the_gap_begins():
    assert before_suffix("x + 1\n    return y\n\nprint(1)", "\n    return y\n") == "x + 1"
    assert before_suffix("x + 1\n    return z", "\n    return y\n") == "x + 1\n    return z"
    assert before_suffix("f(x)) + 1", ")\n") == "f(x)) + 1"
    assert before_suffix("x + 1\nx", "\n") == "x + 1\nx"
