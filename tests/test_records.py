"""A run record survives being saved and loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from resplit.decide import Alternative, Decision, DecisionOutcome
from resplit.errors import DataError
from resplit.records import TABLES, RunRecord, table

REQUEST: dict[str, object] = {
    "request_class": "chat",
    "arrival_s": 0.5,
    "first_token_s": 1.0,
    "end_s": float("nan"),
    "prompt_tokens": 3,
    "new_tokens": 1,
    "status": 503,
    "slo_s": float("nan"),
    "private_ok": True,
    "epochs": 1,
    "waited_s": 0.0,
    "computed_s": 0.0,
    "hops_s": 0.0,
}


def record(**more: object) -> RunRecord:
    tables = {name: table(name, []) for name in TABLES} | {"requests": table("requests", [REQUEST])}
    return RunRecord(policy="static", scenario="quiet", seed=3, duration_s=9.0, **tables | more)


def test_a_loaded_record_equals_the_saved_one(tmp_path: Path) -> None:
    saved = record(
        decisions=(Decision(1.0, "keep", "no gain", threshold=0.05),),
        blocks=("embed", "head"),
        emulated_nodes=("hub",),
        emulation_error=0.01,
        estimate_errors={"software_s": 0.002},
    )
    saved.save(tmp_path / "run")
    loaded = RunRecord.load(tmp_path / "run")
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(loaded, name), getattr(saved, name))
    plain = {key: value for key, value in vars(saved).items() if key not in TABLES}
    assert plain == {key: value for key, value in vars(loaded).items() if key not in TABLES}


def test_decisions_are_a_table_with_a_row_for_each(tmp_path: Path) -> None:
    chosen = Alternative("re-split", ("hub", "attic"), latency_s=0.5, net_gain=7.0)
    moved = Decision(1.0, "re-split", "faster", chosen=chosen, outcome=DecisionOutcome(deployed=2))
    refused = replace(moved, at_s=2.0, outcome=DecisionOutcome(refused="attic is full"))
    saved = record(decisions=(moved, refused, Decision(3.0, "keep", "no gain")))
    saved.save(tmp_path)
    found = pd.read_parquet(tmp_path / "decisions.parquet")
    assert found.action.tolist() == ["re-split", "re-split", "keep"]
    assert found.time_s.tolist() == [1.0, 2.0, 3.0]
    assert found.net_gain[:2].tolist() == [7.0, 7.0]
    assert found.net_gain.isna().tolist() == found.latency_s.isna().tolist() == [False, False, True]
    assert found.epoch.isna().tolist() == [False, True, True]
    assert found.refused.tolist() == ["", "attic is full", ""]
    assert RunRecord.load(tmp_path).decisions == saved.decisions


def test_a_run_without_emulation_has_no_emulation_error(tmp_path: Path) -> None:
    record().save(tmp_path)
    assert math.isnan(RunRecord.load(tmp_path).emulation_error)


def test_a_record_of_an_earlier_version_has_its_decisions_in_the_json_file(tmp_path: Path) -> None:
    saved = record(decisions=(Decision(1.0, "keep", "no gain"),))
    saved.save(tmp_path)
    (tmp_path / "decisions.parquet").unlink()
    plain = json.loads((tmp_path / "run.json").read_text())
    plain["decisions"] = [decision.to_json() for decision in saved.decisions]
    (tmp_path / "run.json").write_text(json.dumps(plain))
    assert RunRecord.load(tmp_path).decisions == saved.decisions


def test_a_row_that_lacks_a_column_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="without status"):
        table("requests", [{key: value for key, value in REQUEST.items() if key != "status"}])


def test_each_table_has_the_stated_columns_and_types_even_when_empty() -> None:
    for name, columns in TABLES.items():
        assert {column: str(kind) for column, kind in table(name, []).dtypes.items()} == columns
