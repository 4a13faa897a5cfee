"""One Prefect test server for the flows; the cluster is that of the system tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import flows  # noqa: F401  its environment, before prefect is imported
from tests.system.conftest import cluster, model_folder, whole

__all__ = ["cluster", "model_folder", "whole"]


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A server and a database of their own."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=90):
        yield
