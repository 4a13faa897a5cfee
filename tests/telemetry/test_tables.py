"""Telemetry tables have the stated columns and types, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from resplit.errors import DataError
from resplit.telemetry.tables import TABLES, Telemetry

ROWS: dict[str, list[dict[str, object]]] = {
    "nodes": [
        {
            "time_s": time_s,
            "node": "hub",
            "cpu_utilization": 0.5,
            "own_utilization": 0.2,
            "memory_free_bytes": 100,
            "memory_held_bytes": 50,
            "gpu_utilization": float("nan"),
            "reference_s": 0.001,
            "emulated": True,
        }
        for time_s in (1.0, 2.0)
    ],
    "links": [
        {
            "time_s": 1.5,
            "node": "hub",
            "peer": "study",
            "payload_bytes": 64,
            "seconds": 0.002,
            "source": "active",
            "emulated": False,
        }
    ],
}


def test_rows_become_tables_of_the_stated_types() -> None:
    telemetry = Telemetry.from_rows(ROWS)
    for name, columns in TABLES.items():
        table = getattr(telemetry, name)
        assert list(table) == list(columns)
        assert {column: str(kind) for column, kind in table.dtypes.items()} == columns
    assert (len(telemetry.nodes), len(telemetry.links), len(telemetry.blocks)) == (2, 1, 0)


def test_the_busy_share_of_each_node_is_the_mean_of_its_reports() -> None:
    reports = [(0.5, "hub"), (0.9, "study"), (0.2, "hub")]
    rows = [ROWS["nodes"][0] | {"cpu_utilization": share, "node": node} for share, node in reports]
    assert Telemetry.from_rows({"nodes": rows}).busy_shares() == pytest.approx({"hub": 0.35, "study": 0.9})


def test_a_row_that_lacks_a_column_is_refused_by_name() -> None:
    broken = {key: value for key, value in ROWS["links"][0].items() if key not in ("peer", "seconds")}
    with pytest.raises(DataError, match="without peer, seconds"):
        Telemetry.from_rows({"links": [ROWS["links"][0], broken]})


def test_loaded_telemetry_equals_the_saved_one(tmp_path: Path) -> None:
    telemetry = Telemetry.from_rows(ROWS)
    telemetry.save(tmp_path / "new")
    loaded = Telemetry.load(tmp_path / "new")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(telemetry, name))


def test_a_file_that_is_missing_or_unreadable_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    Telemetry.from_rows(ROWS).save(tmp_path)
    pd.read_parquet(tmp_path / "nodes.parquet").drop(columns="reference_s").to_parquet(tmp_path / "nodes.parquet")
    with pytest.raises(DataError, match=r"nodes.parquet: no column reference_s"):
        Telemetry.load(tmp_path)
    (tmp_path / "nodes.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"nodes.parquet: not a readable"):
        Telemetry.load(tmp_path)
    (tmp_path / "nodes.parquet").unlink()
    with pytest.raises(DataError, match=r"nodes.parquet"):
        Telemetry.load(tmp_path)


def test_parts_are_joined_in_order_and_older_rows_can_be_left_out() -> None:
    telemetry = Telemetry.from_rows(ROWS)
    twice = Telemetry.concat([telemetry, telemetry])
    assert list(twice.nodes["time_s"]) == [1.0, 2.0, 1.0, 2.0]
    assert list(twice.since(1.5).nodes["time_s"]) == [2.0, 2.0]
    assert len(twice.since(1.5).links) == 2
    nothing = Telemetry.concat([])
    assert [len(getattr(nothing, name)) for name in TABLES] == [0, 0, 0]
