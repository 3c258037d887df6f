"""The lab's scripts import each other by their bare names; so do its tests. A test whose data is absent is skipped, and
so is one that needs the sandbox where the system has no guards for it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_files import MissingData  # noqa: E402
from sandbox import SandboxUnavailable  # noqa: E402


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except SandboxUnavailable as unavailable:
        pytest.skip(f"skipped: {unavailable}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except (MissingData, SandboxUnavailable) as missing:
        pytest.skip(f"skipped: {missing}")
