"""The test sets: what is asked, where an answer ends, what it is compared with or run in."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_files import read_pairs, read_rows
from postprocess import answer, before_stops, before_suffix, docstring, first_line, paper_compat, unfenced
from tasks import INSTRUCTION_PROMPT, OWN_DATA_SUFFIX, stdlib_rows


@dataclass(frozen=True)
class Row:
    id: str
    instruction: str
    """What a chat, or a prompt format of the server, is given."""
    prompt: str
    """What a plain completion is given."""
    reference: str
    suffix: str | None = None
    """The text behind the gap that is to be filled."""
    program: tuple[str, str] | None = None
    """What stands before and after the answer in the program that tests it."""


@dataclass(frozen=True)
class Suite:
    name: str
    rows: Callable[[], list[Row]]
    max_tokens: int
    stop: tuple[str, ...]
    postprocess: dict[str, Callable[[str, Row], str]]
    """The ways from a text to the answer of a row, by name."""
    metrics: frozenset[str]
    """Of `em`, `codebleu` (Python only), `chrf`, and `pass`, for which answers are run."""


# The next turn that a base model goes on to write.
NEXT_INSTRUCTION = "\n###"

# What follows a completed function (Chen et al., 2021), and what follows a program that begins with a docstring.
FUNCTION_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nif", "\nprint", "\nassert", "\n```")
PROGRAM_STOPS = ("\nclass", "\nassert", "\nif", "\nprint", '\n"""', "\n```")


def _pair_rows(pairs: list[tuple[str, str]]) -> list[Row]:
    return [
        Row(str(index), instruction, INSTRUCTION_PROMPT.format(instruction), reference)
        for index, (instruction, reference) in enumerate(pairs)
    ]


def _instruction_rows(path: str) -> list[Row]:
    return _pair_rows([(row["nl"], row["cmd"]) for row in read_rows(path)])


def _docstring_rows() -> list[Row]:
    return [
        Row(f"{row['module']}.{row['qualname']}", row["code"], INSTRUCTION_PROMPT.format(row["code"]), row["docstring"])
        for row in stdlib_rows("test")
    ]


def _humaneval_rows() -> list[Row]:
    return [
        Row(
            id=row["task_id"],
            instruction=f"Complete this function:\n\n{row['prompt']}",
            prompt=row["prompt"],
            reference=row["canonical_solution"],
            program=(row["prompt"], f"\n{row['test']}\ncheck({row['entry_point']})\n"),
        )
        for row in read_rows("humaneval/HumanEval.jsonl.gz")
    ]


def _infilling_rows(path: str) -> list[Row]:
    return [
        Row(
            id=row["task_id"],
            instruction=row["prompt"],
            prompt=row["prompt"],
            reference=row["canonical_solution"],
            suffix=row["suffix"],
            program=(row["prompt"], f"{row['suffix']}\n{row['test']}\ncheck({row['entry_point']})\n"),
        )
        for row in read_rows(f"humaneval_infilling/{path}")
    ]


def _mbpp_rows() -> list[Row]:
    """The data set's own test split, of which the sanitized version kept 257 rows; each prompt shows one test."""
    return [
        Row(
            id=str(row["task_id"]),
            instruction=f"{row['prompt']}\nYour code should pass this test:\n{row['test_list'][0]}",
            prompt=f'"""\n{row["prompt"]}\n{row["test_list"][0]}\n"""\n',
            reference=row["code"],
            program=("", "\n" + "\n".join(row["test_imports"] + row["test_list"]) + "\n"),
        )
        for row in read_rows("mbpp/sanitized-mbpp.json")
        if 11 <= row["task_id"] <= 510
    ]


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            name="conala",
            rows=partial(_instruction_rows, "conala/cmd_test.oracle_man.full.json"),
            max_tokens=64,
            stop=(NEXT_INSTRUCTION,),
            postprocess={
                "corrected": lambda text, row: answer(text),
                "paper-compat": lambda text, row: paper_compat(text),
            },
            metrics=frozenset({"em", "codebleu", "chrf"}),
        ),
        Suite(
            name="nl2bash",
            rows=partial(_instruction_rows, "nl2bash/test.jsonl"),
            max_tokens=64,
            stop=(NEXT_INSTRUCTION,),
            postprocess={"corrected": lambda text, row: answer(text)},
            metrics=frozenset({"em", "chrf"}),
        ),
        Suite(
            name="docstring",
            rows=_docstring_rows,
            max_tokens=128,
            stop=(NEXT_INSTRUCTION,),
            postprocess={"corrected": lambda text, row: docstring(text)},
            metrics=frozenset({"chrf"}),
        ),
        Suite(
            name="humaneval",
            rows=_humaneval_rows,
            max_tokens=512,
            stop=FUNCTION_STOPS,
            postprocess={"corrected": lambda text, row: before_stops(text, FUNCTION_STOPS)},
            metrics=frozenset({"pass"}),
        ),
        Suite(
            name="humaneval-infilling",
            rows=partial(_infilling_rows, "HumanEval-SingleLineInfilling.jsonl.gz"),
            max_tokens=64,
            stop=("\n",),
            postprocess={"corrected": lambda text, row: first_line(text)},
            metrics=frozenset({"em", "pass"}),
        ),
        Suite(
            name="humaneval-infilling-spans",
            rows=partial(_infilling_rows, "HumanEval-RandomSpanInfillingLight.jsonl.gz"),
            max_tokens=128,
            stop=(),
            postprocess={
                "corrected": lambda text, row: before_suffix(text, row.suffix),
                "as-returned": lambda text, row: text,
            },
            metrics=frozenset({"em", "pass"}),
        ),
        Suite(
            name="mbpp",
            rows=_mbpp_rows,
            max_tokens=512,
            stop=PROGRAM_STOPS,
            postprocess={"corrected": lambda text, row: before_stops(text, PROGRAM_STOPS)},
            metrics=frozenset({"pass"}),
        ),
    )
}


def suite_named(name: str) -> Suite:
    """A suite of the lab, or that of a file of one's own. Raises `ValueError` where there is none of the name."""
    if not name.endswith(OWN_DATA_SUFFIX):
        if name not in SUITES:
            known = f"{', '.join(SUITES)}, and files: PATH{OWN_DATA_SUFFIX}"
            raise ValueError(f"there is no suite `{name}`; known are {known}")
        return SUITES[name]
    return Suite(
        name=Path(name).stem,
        # References as answers are: what is cut off these, as the line end of a file's code, could never be matched.
        rows=lambda: _pair_rows([(instruction, _own_answer(code)) for instruction, code in read_pairs(Path(name))]),
        max_tokens=256,
        stop=(NEXT_INSTRUCTION,),
        postprocess={"corrected": lambda text, row: _own_answer(text)},
        metrics=frozenset({"em", "chrf"}),
    )


def _own_answer(text: str) -> str:
    return unfenced(text).strip()
