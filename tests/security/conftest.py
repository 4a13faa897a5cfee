"""Two authorities, each with a controller and two nodes of the same names."""

from __future__ import annotations

from pathlib import Path

import pytest

from resplit.security.authority import keys_command


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _cluster(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _cluster(tmp_path_factory.mktemp("theirs"))


def _cluster(folder: Path) -> Path:
    keys_command(folder, ["node-a", "node-b"])
    return folder
