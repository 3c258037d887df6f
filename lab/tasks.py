"""What adapters are trained for: the rows of each task, their prompts, and where an answer ends."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_files import has_conversations, read_conversations, read_pairs, read_rows

# The paper's prompt, as a template of adapter.toml and for Python's str.format.
INSTRUCTION_TEMPLATE = "### Instruction:\n{{ instruction }}\n### Response:\n"
INSTRUCTION_PROMPT = INSTRUCTION_TEMPLATE.replace("{{ instruction }}", "{}")
# As the server renders a prompt with a suffix; the names are those of Qwen2.5-Coder's tokens.
FIM_PROMPT = "<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>"


@dataclass(frozen=True)
class Example:
    prompt: str | list[dict[str, str]]
    """A text, or a conversation, which the base's chat template renders."""
    target: str
    instruction: str | None = None
    """Around which the prompt is the task's template."""


@dataclass(frozen=True)
class Task:
    name: str
    description: str
    data: str
    """What it is trained on, with its licence."""
    licence: str
    """Of an adapter that was trained on it; the base has its own."""
    train: Callable[[], list[Example]]
    dev: Callable[[], list[Example]]
    max_tokens: int
    """Of an answer, where a request does not say."""
    copyright: str | None = None
    """A notice that the data's licence wants kept."""
    template: str | None = INSTRUCTION_TEMPLATE
    """The adapter's own prompt; fill-in-the-middle has none, its prompt is that of the base."""
    pairs: Callable[[], list[tuple[str, str]]] | None = None
    """Instructions and answers of the train split, for the store of examples `data_set`."""
    data_set: str | None = None
    sources: Callable[[], dict[str, str]] | None = None
    """By instruction of the train split, where it is from: a question that is there in several wordings."""
    lines: Callable[[], list[list[Example]]] | None = None
    """The examples of each line of a file of one's own that has no dev split, of which every tenth is for that."""


def _commands(path: str) -> list[tuple[str, str]]:
    return [(row["nl"].strip(), row["cmd"].strip()) for row in read_rows(path)]


def _questions(path: str) -> dict[str, str]:
    # An id is that of Stack Overflow's question, and a number.
    return {row["nl"].strip(): row["question_id"].partition("-")[0] for row in read_rows(path)}


def stdlib_rows(split: str) -> list[dict[str, Any]]:
    rows = read_rows("stdlib/docstrings.jsonl")
    if split != "train":
        return [row for row in rows if row["split"] == split]
    # The library has functions twice, in two modules: what is asked elsewhere is not learned here.
    held_out = [row for row in rows if row["split"] != "train"]
    known = {row["docstring"] for row in held_out} | {_body(row) for row in held_out}
    return [row for row in rows if row["split"] == "train" and not known & {row["docstring"], _body(row)}]


def _body(row: dict[str, Any]) -> str:
    """A function's code without its first line, which has its name."""
    return row["code"].partition("\n")[2]


def _docstrings(split: str) -> list[tuple[str, str]]:
    return [(row["code"], row["docstring"]) for row in stdlib_rows(split)]


def _of_instructions(read: Callable[[str], list[tuple[str, str]]], train: str, dev: str) -> dict[str, Any]:
    """What a task of instructions and answers, which `read` gives for `train` and for `dev`, has of them."""

    def examples(source: str) -> list[Example]:
        return [_instructed(*pair) for pair in read(source)]

    return {"train": lambda: examples(train), "dev": lambda: examples(dev), "pairs": lambda: read(train)}


def _instructed(instruction: str, answer: str) -> Example:
    return Example(INSTRUCTION_PROMPT.format(instruction), answer, instruction)


def _gaps(code: str, draw: random.Random) -> Iterator[tuple[int, int]]:
    """Gaps in the body of a function, as character offsets: a line, the rest of a line, and one to four lines."""
    lines = code.splitlines(keepends=True)
    starts = [sum(map(len, lines[:index])) for index in range(len(lines) + 1)]
    body = [index for index in range(1, len(lines)) if lines[index].strip()]
    if len(body) < 2:
        return
    line = draw.choice(body)
    yield starts[line], starts[line + 1]
    line = draw.choice(body)
    text = lines[line].rstrip("\n")
    indentation = len(text) - len(text.lstrip())
    # An editor asks from the middle of a line; what is filled in ends with the line.
    yield starts[line] + draw.randrange(indentation, len(text)), starts[line] + len(text)
    first = draw.choice(body)
    yield starts[first], starts[min(len(lines), first + draw.randint(2, 4))]


def _fim(split: str) -> list[Example]:
    """Two thirds of the gaps end with a line: that is what an editor asks for, and what ends an answer early."""
    examples = []
    for row in stdlib_rows(split):
        # Seeded by the function, so that the gaps do not change with what else is in the data.
        draw = random.Random(f"{row['module']}.{row['qualname']}")
        code = row["code"] + "\n"
        for start, end in _gaps(code, draw):
            examples.append(Example(FIM_PROMPT.format(code[:start], code[end:]), code[start:end]))
    return examples


_CPYTHON = "the source of CPython 3.11's standard library, PSF-2.0"
_CPYTHON_COPYRIGHT = "Copyright © 2001 Python Software Foundation; All Rights Reserved"

TASKS = {
    task.name: task
    for task in (
        Task(
            name="conala",
            description="One line of Python from a sentence of intent",
            data="CoNaLa in the split of DocPrompting (neulab/docprompting-conala), MIT",
            licence="MIT",
            **_of_instructions(
                _commands, "conala/cmd_train.oracle_man.full.json", "conala/cmd_dev.oracle_man.full.json"
            ),
            max_tokens=64,
            data_set="conala",
            sources=lambda: _questions("conala/cmd_train.oracle_man.full.json"),
        ),
        Task(
            name="bash",
            description="A shell command from a sentence of intent",
            data="NL2Bash (TellinaTool/nl2bash), MIT",
            licence="MIT",
            **_of_instructions(_commands, "nl2bash/train.jsonl", "nl2bash/dev.jsonl"),
            max_tokens=64,
            data_set="nl2bash",
        ),
        Task(
            name="docstring",
            description="The docstring of a Python function, without quotation marks; the instruction is its code",
            data=_CPYTHON,
            licence="PSF-2.0",
            copyright=_CPYTHON_COPYRIGHT,
            **_of_instructions(_docstrings, "train", "valid"),
            max_tokens=128,
            data_set="stdlib",
        ),
        Task(
            name="fim-python",
            description="What is missing between a prefix and a suffix of Python",
            data=_CPYTHON,
            licence="PSF-2.0",
            copyright=_CPYTHON_COPYRIGHT,
            train=lambda: _fim("train"),
            dev=lambda: _fim("valid"),
            max_tokens=64,
            template=None,
        ),
    )
}


OWN_DATA_SUFFIX = ".jsonl"


def encoded_splits(task: Task, encode: Callable[[list[Example]], list[Any]]) -> tuple[dict[str, list[Any]], int]:
    """The rows of the train and the dev split, as `encode` makes them of examples, and how many it has left out. A file
    without a dev split is split when the lines are gone that nothing is left of: a long one is not all of a split."""
    if task.lines is None:
        examples = {"train": task.train(), "dev": task.dev()}
        splits = {split: encode(of_split) for split, of_split in examples.items()}
        num_examples = sum(map(len, examples.values()))
    else:
        lines = task.lines()
        encoded = [rows for rows in map(encode, lines) if rows]
        splits = {split: [row for rows in every_tenth(encoded, split) for row in rows] for split in ("train", "dev")}
        num_examples = sum(map(len, lines))
    return splits, num_examples - sum(map(len, splits.values()))


def task_named(name: str, validation: str | None = None) -> Task:
    """A task of the lab, or that of a file of one's own, whose dev split is the file `validation` or every tenth line.

    Raises `ValueError` where there is none of the name.
    """
    if not name.endswith(OWN_DATA_SUFFIX):
        if name not in TASKS:
            raise ValueError(f"there is no `{name}`; known are {', '.join(TASKS)}, and files: PATH{OWN_DATA_SUFFIX}")
        if validation is not None:
            raise ValueError(f"`{name}` has a dev split of its own: leave `validation` out")
        return TASKS[name]
    file = Path(name)
    if has_conversations(file):
        own: dict[str, Any] = _of_conversations(file, validation)
        max_tokens = 1024
    else:
        own = _of_instructions(lambda split: _own_lines(read_pairs, file, validation, split), "train", "dev")
        if validation is None:
            own["lines"] = lambda: [[_instructed(*pair)] for pair in read_pairs(file)]
        max_tokens = 256
    return Task(
        name=file.stem,
        description=f"What the examples of {file.name} show",
        data=file.name,
        licence="other",
        **own,
        max_tokens=max_tokens,
    )


def _own_lines(read: Callable[[Path], list[Any]], file: Path, validation: str | None, split: str) -> list[Any]:
    """What `read` gives for the lines of one split."""
    if validation is not None:
        return read(Path(validation) if split == "dev" else file)
    return every_tenth(read(file), split)


def every_tenth(lines: list[Any], split: str) -> list[Any]:
    return [line for index, line in enumerate(lines) if (index % 10 == 0) == (split == "dev")]


def _of_conversations(file: Path, validation: str | None) -> dict[str, Any]:
    def examples(split: str) -> list[Example]:
        lines = _own_lines(read_conversations, file, validation, split)
        return [Example(*pair) for answers in lines for pair in answers]

    def lines() -> list[list[Example]]:
        return [[Example(*pair) for pair in answers] for answers in read_conversations(file)]

    return {
        "train": lambda: examples("train"),
        "dev": lambda: examples("dev"),
        "lines": lines if validation is None else None,
        # None of the adapter's own: chats are rendered by the base's, and texts are prompts as they are.
        "template": None,
    }
