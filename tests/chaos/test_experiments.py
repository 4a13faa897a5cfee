"""The experiments of `make chaos`, short: what they promise holds here too."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import experiment

# What tests/system has too (live re-splits, a node that hangs) is left to it.
SHORT = {"kills": 0.07, "steps": 0.05, "orders": 0.03, "registry": 0.2, "disk": 1.0}


@pytest.mark.parametrize("name", SHORT)
async def test_an_experiment_finds_what_it_aims_at(name: str, tmp_path: Path) -> None:
    findings = await experiment(name)(SHORT[name], tmp_path)
    assert findings
    assert [finding for finding in findings if finding.met is False] == []
