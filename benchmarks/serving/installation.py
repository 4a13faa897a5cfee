"""The size of a node's installation."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from packaging.requirements import Requirement


def node_install_bytes() -> int:
    """Bytes of the files that `pip install .` brings: resplit and, as they are installed here, all that it needs."""
    wanted, found = ["resplit"], set[str]()
    while wanted:
        name = wanted.pop().lower().replace("_", "-")
        if name not in found:
            found.add(name)
            wanted += _requirements(name)
    return sum(_bytes_of(name) for name in found)


def _requirements(name: str) -> list[str]:
    """What a package needs on this machine without any of its extras."""
    requirements = [Requirement(text) for text in importlib.metadata.requires(name) or []]
    return [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def _bytes_of(name: str) -> int:
    if name == "resplit":  # installed in place, so that its own list of files is short
        package = Path(__file__).parents[2] / "src" / "resplit"
        return sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
    files = [Path(str(file.locate())) for file in importlib.metadata.files(name) or []]
    return sum(file.stat().st_size for file in files if file.is_file())
