"""What many of these tests share."""

import pytest

from lorry_server import REPOSITORY, serving


@pytest.fixture(scope="module")
def server():
    """The default base with the shipped adapters; a module with a fixture of this name has its own."""
    with serving("--adapters", REPOSITORY / "adapters") as server:
        yield server
