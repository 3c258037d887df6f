#!/usr/bin/env python3
"""The packed GEMM beside what the machine can do at most, as a Markdown table.

    python3 benches/kernels.py                 every format, a few minutes on an idle machine
    python3 benches/kernels.py --filter Q5_0   those with that in their name
    ISA=avx2 python3 benches/kernels.py        with another instruction set than the best

Runs `cargo bench -p kernels --bench cpu`, which measures both limits too. A row's share is that of the limit that it comes nearest
to: of the memory with one row of activations, of the multipliers with many.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEAK, GEMM = "peak ", "gemm "
ROWS = re.compile(r"(\d+) rows")


@dataclass
class Timed:
    """What criterion measured: rates per second."""

    group: str
    kernel: str
    rows: int | None
    operations: float
    bytes: float


def run(filter):
    """Of the peaks, and of what `filter` leaves of the GEMM."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["cargo", "bench", "--locked", "--package", "kernels", "--bench", "cpu", "--", f"^{PEAK}|^{GEMM}.*{filter}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"CRITERION_HOME": folder}, stdout=subprocess.DEVNULL, check=True)
        return [read(path.parent) for path in sorted(Path(folder).glob("**/new/benchmark.json"))]


def read(folder):
    benchmark = json.loads((folder / "benchmark.json").read_text())
    seconds = json.loads((folder / "estimates.json").read_text())["median"]["point_estimate"] / 1e9
    amount = benchmark["throughput"]
    elements, num_bytes = amount.get("Elements", 0), amount.get("Bytes", 0)
    if both := amount.get("ElementsAndBytes"):
        elements, num_bytes = both["elements"], both["bytes"]
    rows = ROWS.fullmatch(benchmark["value_str"] or "")
    return Timed(benchmark["group_id"], benchmark["function_id"], rows and int(rows[1]), elements / seconds, num_bytes / seconds)


def table(timed):
    peaks = [one for one in timed if one.group.startswith(PEAK)]
    most_operations, most_bytes = (max(getattr(one, rate) for one in peaks) for rate in ("operations", "bytes"))
    products = [one for one in timed if one.group.startswith(GEMM)]
    lines = [f"{peaks[0].group.removeprefix(PEAK)}: {most_operations / 1e9:.0f}·10⁹ int8 operations/s, {most_bytes / 2**30:.1f} GiB/s", ""]
    lines += ["| weights | rows | 10⁹ operations/s | GiB/s | share of the limit |", "|---|---|---|---|---|"]
    for one in sorted(products, key=lambda one: (one.kernel, one.rows)):
        # On an instruction set without products of its own, the memory is all that is measured.
        shares = [one.bytes / most_bytes] + ([one.operations / most_operations] if most_operations else [])
        lines.append(f"| {one.kernel} | {one.rows} | {one.operations / 1e9:.0f} | {one.bytes / 2**30:.1f} | {max(shares):.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="expression that a kernel's name has to match")
    print(table(run(parser.parse_args().filter)))


if __name__ == "__main__":
    main()
