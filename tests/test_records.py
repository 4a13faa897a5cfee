"""A run record survives being saved and loaded."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from resplit.decide import Decision
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


def test_a_run_without_emulation_has_no_emulation_error(tmp_path: Path) -> None:
    record().save(tmp_path)
    assert math.isnan(RunRecord.load(tmp_path).emulation_error)


def test_a_row_that_lacks_a_column_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="without status"):
        table("requests", [{key: value for key, value in REQUEST.items() if key != "status"}])


def test_each_table_has_the_stated_columns_and_types_even_when_empty() -> None:
    for name, columns in TABLES.items():
        assert {column: str(kind) for column, kind in table(name, []).dtypes.items()} == columns
