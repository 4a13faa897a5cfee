"""One Prefect test server for all tests that run flows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.environment import prepare

prepare()  # before prefect is imported


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """A server with a database of its own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield
