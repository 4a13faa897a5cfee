"""The files of the benchmark for policies are those of its version: results of one version can be compared."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS = Path("data/scenarios/SHA256SUMS")
AGAIN = (
    "count the version of docs/benchmark.md up, and run: sha256sum data/{clusters,models,scenarios}/*.yaml > "
    + str(SUMS)
)


def listed() -> dict[Path, str]:
    pairs = (line.split() for line in SUMS.read_text().splitlines())
    return {Path(path): digest for digest, path in pairs}


def test_the_files_are_those_of_the_version() -> None:
    changed = [
        str(path) for path, digest in listed().items() if hashlib.sha256(path.read_bytes()).hexdigest() != digest
    ]
    assert not changed, AGAIN


def test_every_file_is_listed() -> None:
    folders = ("clusters", "models", "scenarios")
    assert set(listed()) == {path for folder in folders for path in Path("data", folder).glob("*.yaml")}, AGAIN
