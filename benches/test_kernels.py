"""kernels.py for one shape: what criterion writes is read, and each row has its share of a limit."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("kernels.py")
ROW = re.compile(r"\| Q8_0 896x4864 \| (\d+) \| (\d+) \| (\d+\.\d) \| (\d+\.\d\d) \|")


def test_a_shape_has_a_row_for_each_number_of_rows():
    run = subprocess.run([sys.executable, SCRIPT, "--filter", "Q8_0 896x4864"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    limits, _, title, _, *table = run.stdout.splitlines()
    assert re.match(r"\S+ x\d+: \d+·10⁹ int8 operations/s, \d+\.\d GiB/s$", limits), limits
    assert title.count("|") == 6
    rows = [ROW.fullmatch(line).groups() for line in table]
    assert [int(count) for count, *_ in rows] == [1, 4, 16, 64, 128]
    assert all(int(operations) > 0 and float(share) > 0 for _, operations, _, share in rows)
