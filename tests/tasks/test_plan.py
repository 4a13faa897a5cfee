"""The files that the control loop keeps between its ticks."""

from __future__ import annotations

from pathlib import Path

from tasks.plan import load_configurations


def test_only_configurations_that_were_kept_are_found(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    assert load_configurations(tmp_path, [1, 2, 3]) == {2: tmp_path / "2"}
