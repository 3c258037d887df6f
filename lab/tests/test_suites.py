"""The test sets are whole, and the programs made of them test what they should."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from sandbox import Sandbox
from suites import SUITES


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("conala", 543),
        ("nl2bash", 963),
        ("docstring", 505),
        ("humaneval", 164),
        ("humaneval-infilling", 1033),
        ("humaneval-infilling-spans", 164),
        ("mbpp", 257),
    ],
)
def test_a_suite_has_all_its_rows_and_an_id_for_each(name, num_rows):
    rows = SUITES[name].rows()
    assert len(rows) == num_rows
    assert len({row.id for row in rows}) == num_rows


def failing(rows):
    sandbox = Sandbox()
    with ThreadPoolExecutor(max_workers=2) as pool:
        outcomes = pool.map(sandbox.run, [row.program[0] + row.reference + row.program[1] for row in rows])
        return {row.id: outcome.error for row, outcome in zip(rows, outcomes) if not outcome.passed}


@pytest.mark.usefixtures("guards")
def test_all_canonical_solutions_of_humaneval_pass():
    assert failing(SUITES["humaneval"].rows()) == {}


@pytest.mark.usefixtures("guards")
@pytest.mark.parametrize("name", ["humaneval-infilling", "humaneval-infilling-spans", "mbpp"])
def test_canonical_solutions_pass_where_they_are_cut_as_predictions_are(name):
    suite = SUITES[name]
    rows = suite.rows()[::20]
    assert failing(rows) == {}
    cut = suite.postprocess["corrected"]
    assert [cut(row.reference, row).rstrip() for row in rows] == [row.reference.rstrip() for row in rows]


@pytest.mark.usefixtures("guards")
def test_a_humaneval_solution_that_does_nothing_fails():
    row = SUITES["humaneval"].rows()[0]
    assert not Sandbox().run(row.program[0] + "    pass\n" + row.program[1]).passed
