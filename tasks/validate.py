"""Validate: check every row of telemetry before a fit; rows that fail a rule go to quarantine with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import structlog
from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.errors import DataError
from resplit.telemetry.sufficiency import Need, shortfalls
from resplit.telemetry.tables import TABLES, Telemetry
from resplit.types import BlockFeatures
from tasks.expectations import failed_rows
from tasks.telemetry_rules import RULES, Rule, derive

__all__ = ["Need", "RowFault", "ValidTelemetry", "validate", "validate_telemetry"]

_log = structlog.get_logger(__name__)
ONE_REPORT = Need(reports=1)


@dataclass(frozen=True)
class RowFault:
    """The result of one rule on one table: how many of its rows failed."""

    table: str
    rule: Rule
    rows: int
    failed: int


@dataclass(frozen=True, eq=False)
class ValidTelemetry:
    """The rows that passed, the result of each rule, and the files that hold the rows that failed."""

    telemetry: Telemetry
    faults: tuple[RowFault, ...]
    quarantine: tuple[Path, ...]

    @property
    def failed(self) -> int:
        """The number of failures over all rules. A row can fail several."""
        return sum(fault.failed for fault in self.faults)


def validate_telemetry(
    telemetry: Telemetry,
    nodes: Sequence[str],
    features: Sequence[BlockFeatures],
    now_s: float,
    quarantine: Path,
    lost_nodes: Collection[str] = (),
    need: Need = ONE_REPORT,
) -> ValidTelemetry:
    """Check every row of `telemetry`, as of `now_s`, for the cluster `nodes` and the model `features`.

    Rows that fail are written to one Parquet file for each table in the folder `quarantine`, with a column `reason`.
    DataError if a table lacks a column or has one of the wrong type, if a rule cannot be evaluated, or if fewer valid
    rows remain than `need` requires of the nodes that are not in `lost_nodes`. The message names what is missing.
    """
    kinds: dict[str, str] = {feature.name: feature.kind for feature in features}
    valid: dict[str, pd.DataFrame] = {}
    faults: list[RowFault] = []
    files: list[Path] = []
    for name, columns in TABLES.items():
        table = _typed(name, getattr(telemetry, name), columns)
        found, reasons = _check(name, derive(name, table, kinds, now_s), tuple(nodes), tuple(kinds))
        valid[name] = table[reasons == ""].reset_index(drop=True)
        faults += found
        if (bad := table[reasons != ""].assign(reason=reasons[reasons != ""])).size:
            files.append(_quarantine(bad, quarantine / f"{name}-{now_s:.3f}.parquet"))
            _log.warning("telemetry quarantined", table=name, rows=len(bad), of=len(table), file=str(files[-1]))
    good = Telemetry(**valid)
    present = [node for node in nodes if node not in lost_nodes]
    if missing := shortfalls(telemetry, good, present, list(dict.fromkeys(kinds.values())), need):
        where = f" (the rows that failed are in {quarantine})" if files else ""
        raise DataError(f"too few valid rows of telemetry: {'; '.join(missing)}{where}")
    return ValidTelemetry(good, tuple(faults), tuple(files))


validate = task(name="validate", cache_policy=NO_CACHE)(validate_telemetry)


def _typed(name: str, table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The table with exactly `columns`, of their types, and a plain index: a repeated index would hide rows."""
    if absent := [column for column in columns if column not in table]:
        raise DataError(f"telemetry table {name}: no column {', '.join(absent)}")
    try:
        return table[list(columns)].reset_index(drop=True).astype(dict(columns))
    except (TypeError, ValueError) as error:
        raise DataError(f"telemetry table {name}: a column has the wrong type: {error}") from error


def _check(
    name: str, table: pd.DataFrame, nodes: tuple[str, ...], blocks: tuple[str, ...]
) -> tuple[list[RowFault], pd.Series[str]]:
    """The result of each rule on a table, and the reasons for which each row failed ("" for a valid row)."""
    reasons = np.full(len(table), "", dtype=object)
    faults = []
    # An empty table passes every rule; `shortfalls` decides whether it may be empty.
    failed_by_rule: list[list[int]] = (
        failed_rows(name, nodes, blocks, table) if len(table) else [[] for _ in RULES[name]]
    )
    for rule, failed in zip(RULES[name], failed_by_rule, strict=True):
        faults.append(RowFault(name, rule, len(table), len(failed)))
        for row in failed:
            reasons[row] += ("; " if reasons[row] else "") + rule.reason
    return faults, pd.Series(reasons, index=table.index)


def _quarantine(rows: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path, index=False)
    return path
