"""Which modules tests may import."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).parent


def imported(module: Path) -> set[str]:
    """The names of the modules that a module imports, and of what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def offenders(is_wrong: Callable[[str], bool], *, but_for: Path | None = None) -> list[str]:
    modules = [path for path in TESTS.rglob("*.py") if but_for is None or but_for not in path.parents]
    return [f"{path.relative_to(TESTS)}: {name}" for path in modules for name in imported(path) if is_wrong(name)]


def test_only_the_tests_of_benchmarks_import_benchmarks() -> None:
    assert offenders(lambda name: name.split(".")[0] == "benchmarks", but_for=TESTS / "benchmarks") == []


def test_test_modules_import_nothing_from_each_other() -> None:
    assert offenders(lambda name: name.startswith("tests.") and name.split(".")[-1].startswith("test_")) == []
