"""Where data is read from: public data sets in `../shared/data` beside the repository or the folder that LORRY_DATA
names, and files of one's own."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

# The data sets' public names, by folder.
PUBLIC_NAMES = {
    "conala": "neulab/docprompting-conala",
    "nl2bash": "TellinaTool/nl2bash",
    "stdlib": "the source of CPython 3.11's standard library",
    "mbpp": "google-research-datasets/mbpp",
    "humaneval": "openai_humaneval",
    "humaneval_infilling": "openai/human-eval-infilling",
    "paper_outputs": "martin-wey/peft-llm-code",
}


class MissingData(Exception):
    """A data set is not on this machine."""


class BadData(Exception):
    """A file of one's own is not written as it should be."""


def data_file(path: str) -> Path:
    """The file at `path`, `FOLDER/FILE`, below the folder with the data."""
    root = Path(os.environ.get("LORRY_DATA", REPOSITORY.parent / "shared" / "data"))
    file = root / path
    if not file.is_file():
        public_name = PUBLIC_NAMES[path.partition("/")[0]]
        raise MissingData(f"{file} is missing: get it from the public data set {public_name}, or set LORRY_DATA")
    return file


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a JSON list, a JSONL file or a gzipped JSONL file."""
    file = data_file(path)
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _lines(file: Path) -> list[bytes]:
    """As the server splits them: in JSON a carriage return is a blank as any other."""
    content = file.read_bytes()
    return content.removesuffix(b"\n").split(b"\n") if content else []


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """Instructions and answers of a file of one's own, in the format of stores of in-context examples (docs/icl.md)."""
    pairs = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
            pair = row["instruction"], row["code"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f'{file}: line {number} must be {{"instruction": …, "code": …}}: {error!r}') from error
        if not all(isinstance(text, str) and text for text in pair):
            raise BadData(f"{file}: line {number}: `instruction` and `code` must be texts, and not empty")
        pairs.append(pair)
    if not pairs:
        raise BadData(f"{file} is empty")
    return pairs


def read_conversations(file: Path) -> list[list[tuple[str | list[dict[str, str]], str]]]:
    """What is to be learned from each line of a file of one's own as OpenAI's fine-tuning takes it: a text or a conversation,
    and how it goes on. A conversation has an answer for each message of the assistant whose `weight` is not 0."""
    lines = []
    for number, line in enumerate(_lines(file), start=1):
        try:
            row = json.loads(line)
            if "messages" in row:
                messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
                answers = [
                    (messages[:index], message["content"])
                    for index, message in enumerate(row["messages"])
                    if message["role"] == "assistant" and message.get("weight") != 0
                ]
            else:
                answers = [(row["prompt"], row["completion"])]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            known = '{"messages": [{"role": …, "content": …}, …]} or {"prompt": …, "completion": …}'
            raise BadData(f"{file}: line {number} must be {known}: {error!r}") from error
        if not answers or not all(isinstance(answer, str) and answer for _, answer in answers):
            raise BadData(f"{file}: line {number}: an answer must be there, be a text, and not empty")
        lines.append(answers)
    if not lines:
        raise BadData(f"{file} is empty")
    return lines


def has_conversations(file: Path) -> bool:
    """Whether a file of one's own is to be read by `read_conversations`; else it is by `read_pairs`."""
    try:
        with file.open("rb") as lines:
            row = json.loads(lines.readline())
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("messages", "prompt"))
