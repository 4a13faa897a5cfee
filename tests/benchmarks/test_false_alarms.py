"""The benchmark of false alarms: what it counts in recordings, and what it refuses to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.false_alarms import read, replayed
from resplit.errors import DataError
from resplit.estimate import RECORDING
from tests.support.near_and_far import PASSES, recorded


def test_alarms_are_counted_by_the_hour(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_bytes(RECORDING.dump_json(recorded(0, slow_from=PASSES // 2)))
    assert " times slower\n" in replayed([path])
    assert replayed([path, path]).endswith("2 alarms in 1200 s: 6.0 in an hour")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.json: is no recording"):
        read(tmp_path / "other.json")
