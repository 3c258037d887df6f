"""Where the public data sets lie: `../shared/data` beside the repository, or the folder that LORRY_DATA names."""

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
