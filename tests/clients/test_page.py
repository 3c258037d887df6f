"""The page of the real server in a real browser: those of the tests in `tests/page` that need no made-up models."""

import pytest

from lorry_server import REPOSITORY, assert_node_test_passes

PAGE = REPOSITORY / "tests" / "page"


@pytest.mark.parametrize("test", sorted(PAGE.glob("*.test.mjs")), ids=lambda path: path.name)
def test_the_page_works_with_the_real_server(server, test):
    assert_node_test_passes(test, server)
