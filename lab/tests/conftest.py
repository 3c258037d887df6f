"""The lab's scripts import each other by their bare names; so do its tests. A test whose data is absent is skipped, and
so is one of the sandbox where the system has nothing to make guards of."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_files import MissingData  # noqa: E402
from sandbox import MIN_LANDLOCK_ABI  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except MissingData as missing:
        pytest.skip(f"skipped: {missing}")


@pytest.fixture(scope="session")
def guards():
    """What the sandbox is made of, looked for without it: a guard that is there and does not hold fails its tests."""
    try:
        import landlock
        import pyseccomp  # noqa: F401

        if landlock.landlock_abi_version() < MIN_LANDLOCK_ABI:
            pytest.skip("skipped: the sandbox needs Landlock of Linux 6.2")
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"skipped: the sandbox needs Landlock and libseccomp: {error}")
