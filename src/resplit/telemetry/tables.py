"""Telemetry as three plain tables (nodes, links, block timings) and their Parquet form.

`resplit.telemetry.rows` states the columns and their units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import pandas as pd

from resplit.errors import DataError
from resplit.telemetry.rows import BlockRow, LinkRow, NodeRow

_DTYPES = {float: "float64", int: "int64", str: "str", bool: "bool"}


def _columns(row: Any) -> dict[str, str]:
    kinds = get_type_hints(row)
    return {column.name: _DTYPES[kinds[column.name]] for column in fields(row)}


NODE_COLUMNS, LINK_COLUMNS, BLOCK_COLUMNS = _columns(NodeRow), _columns(LinkRow), _columns(BlockRow)
TABLES = {"nodes": NODE_COLUMNS, "links": LINK_COLUMNS, "blocks": BLOCK_COLUMNS}


@dataclass(frozen=True, eq=False)
class Telemetry:
    """The reports of the nodes. Each table has its columns of `TABLES`, with its rows in order of arrival."""

    nodes: pd.DataFrame
    links: pd.DataFrame
    blocks: pd.DataFrame

    def save(self, folder: Path) -> None:
        """Write one Parquet file for each table into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)

    @classmethod
    def load(cls, folder: Path) -> Telemetry:
        """Read the files that `save` wrote. DataError names a file that is missing, unreadable or lacks a column."""
        return cls(**{name: _read(folder / f"{name}.parquet", columns) for name, columns in TABLES.items()})

    @classmethod
    def from_rows(cls, rows: Mapping[str, Sequence[Mapping[str, object]]]) -> Telemetry:
        """Typed tables from lists of row dictionaries, one list per table; a table without a list is empty."""
        return cls(**{name: frame(rows.get(name, []), columns) for name, columns in TABLES.items()})

    @classmethod
    def concat(cls, parts: list[Telemetry]) -> Telemetry:
        """One telemetry from several, in the order given."""
        return cls(
            **{
                name: pd.concat([getattr(part, name) for part in parts], ignore_index=True)
                if parts
                else frame([], columns)
                for name, columns in TABLES.items()
            }
        )

    def busy_shares(self) -> dict[str, float]:
        """The share of time in which each node was busy, background included: the mean of its reports."""
        return {str(node): float(share) for node, share in self.nodes.groupby("node").cpu_utilization.mean().items()}

    def since(self, time_s: float) -> Telemetry:
        """The rows not older than `time_s`."""
        return Telemetry(**{name: table[table["time_s"] >= time_s] for name, table in vars(self).items()})


def frame(rows: Sequence[Mapping[str, object]], columns: dict[str, str]) -> pd.DataFrame:
    """A table with exactly `columns`, typed; DataError if a row lacks one."""
    table = pd.DataFrame(rows, columns=list(columns))
    missing = sorted({name for row in rows for name in columns if name not in row})
    if missing:
        raise DataError(f"telemetry rows without {', '.join(missing)}")
    return table.astype(columns)


def _read(path: Path, columns: dict[str, str]) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable telemetry table ({error})") from error
    absent = [name for name in columns if name not in table]
    if absent:
        raise DataError(f"{path}: no column {', '.join(absent)}")
    return table[list(columns)]
