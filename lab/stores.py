"""Builds stores of in-context examples from the train splits, in the format of docs/icl.md: one JSONL file a data set.

Data sets are never committed. Serve them with LORRY__ICL__DIR naming the folder.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from data_files import REPOSITORY, MissingData
from tasks import TASKS

# The server's limits; that of 16 MiB for all of a store is far from what these add up to here.
MAX_EXAMPLES = 10_000
MAX_INSTRUCTION_BYTES = 8 << 10
MAX_CODE_BYTES = 32 << 10


def store(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What a store may hold of `pairs`, in their order: the paper's seeds draw by it."""
    fitting = [
        (instruction, code)
        for instruction, code in pairs
        if instruction
        and code
        and len(instruction.encode()) <= MAX_INSTRUCTION_BYTES
        and len(code.encode()) <= MAX_CODE_BYTES
    ]
    if len(fitting) <= MAX_EXAMPLES:
        return fitting
    # Rows of one kind stand together in some data sets; the first ones alone would leave out kinds.
    kept = sorted(random.Random(42).sample(range(len(fitting)), MAX_EXAMPLES))
    return [fitting[index] for index in kept]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "lab" / "stores", help="default: lab/stores")
    out: Path = parser.parse_args().out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for task in TASKS.values():
            if task.pairs is None:
                continue
            examples = store(task.pairs())
            lines = (json.dumps({"instruction": i, "code": c}, ensure_ascii=False) + "\n" for i, c in examples)
            file = out / f"{task.data_set}.jsonl"
            file.write_text("".join(lines), encoding="utf-8")
            print(f"{file}: {len(examples)} examples")
    except (MissingData, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
