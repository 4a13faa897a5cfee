"""The benchmark of false alarms: what it counts in recordings, and what it refuses to read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.false_alarms import in_runs, read, replayed
from resplit.decide import Decision
from resplit.errors import DataError
from resplit.estimate import RECORDING
from tests.support.near_and_far import PASSES, recorded
from tests.support.run_tables import record


def test_alarms_are_counted_by_the_hour(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_bytes(RECORDING.dump_json(recorded(0, slow_from=PASSES // 2)))
    assert " times slower\n" in replayed([path])
    assert replayed([path, path]).endswith("2 alarms in 1200 s: 6.0 in an hour")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.json: is no recording"):
        read(tmp_path / "other.json")


def test_alarms_of_all_runs_are_counted_but_not_those_of_policies_without_any(tmp_path: Path) -> None:
    alarm = Decision(9.0, "keep", seen=("b became 4 times slower",))
    run = replace(record([], []), policy="resplit", source="x")
    for folder, each in {
        "one/a/adaptive-1": replace(run, seed=1, decisions=(alarm, alarm)),
        "two/b/adaptive-2": replace(run, seed=2),
        "two/b/static-2": replace(run, policy="static", decisions=(alarm,)),
        "two/b/adaptive-3.unfinished": replace(run, decisions=(alarm,)),
    }.items():
        each.save(tmp_path / folder)
    assert in_runs(tmp_path) == "test, resplit, seed 1: 2\n2 alarms in 120 s: 60.0 in an hour"
