"""The libraries and agents that clients are made of, in JavaScript, unmodified, against the default base."""

import pytest

from lorry_server import REPOSITORY, assert_node_test_passes

SDKS = REPOSITORY / "tests" / "sdks"


@pytest.mark.parametrize("test", sorted(SDKS.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_client_works_unmodified(server, test):
    assert_node_test_passes(test, server)
