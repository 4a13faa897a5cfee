"""Telemetry as three plain tables (nodes, links, block timings) and their Parquet form.

States the columns and their units once. Knows nothing of how they are collected, judged or fitted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from resplit.errors import DataError

# One row for each report of a node. `cpu_utilization` is the whole machine's share in 0..1 and
# `own_utilization` resplit's part of it; `memory_held_bytes` is what resplit's weights and caches hold, and
# `memory_free_bytes` what they could still take. `reference_s` is the node's time for one decode step of the public
# reference layer: a one-number speed that lets the fit speak of a node that it has no block timings of.
NODE_COLUMNS = {
    "time_s": "float64",
    "node": "str",
    "cpu_utilization": "float64",
    "own_utilization": "float64",
    "memory_free_bytes": "float64",
    "memory_held_bytes": "float64",
    "gpu_utilization": "float64",  # NaN without a GPU
    "reference_s": "float64",
    "emulated": "bool",
}
# One row for each message timed from `node` to `peer`: its time on the way, one way, software included.
LINK_COLUMNS = {
    "time_s": "float64",
    "node": "str",
    "peer": "str",
    "payload_bytes": "float64",
    "seconds": "float64",
    "source": "str",  # "active": a probe; "passive": an activation on its way
    "emulated": "bool",
}
# One row for each block and pass: `tokens` new tokens computed on top of `context_tokens` cached ones.
BLOCK_COLUMNS = {
    "time_s": "float64",
    "node": "str",
    "block": "str",
    "kind": "str",  # embed, layer, attention, mlp or head
    "phase": "str",  # prefill or decode
    "tokens": "int64",
    "context_tokens": "int64",
    "seconds": "float64",
    "emulated": "bool",
}
TABLES = {"nodes": NODE_COLUMNS, "links": LINK_COLUMNS, "blocks": BLOCK_COLUMNS}


@dataclass(frozen=True, eq=False)
class Telemetry:
    """What the nodes reported; each table has the columns above, its rows in order of arrival."""

    nodes: pd.DataFrame
    links: pd.DataFrame
    blocks: pd.DataFrame

    def save(self, folder: Path) -> None:
        """Write one Parquet file per table into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            getattr(self, name).to_parquet(folder / f"{name}.parquet", index=False)

    @classmethod
    def load(cls, folder: Path) -> Telemetry:
        """Read what `save` wrote; DataError names the file that is missing or has other columns."""
        return cls(**{name: _read(folder / f"{name}.parquet", columns) for name, columns in TABLES.items()})

    @classmethod
    def from_rows(cls, rows: dict[str, list[dict[str, object]]]) -> Telemetry:
        """Tables of the right types from lists of row dictionaries, one list per table (may be absent)."""
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

    def since(self, time_s: float) -> Telemetry:
        """The rows not older than `time_s`."""
        return Telemetry(**{name: table[table["time_s"] >= time_s] for name, table in vars(self).items()})


def frame(rows: list[dict[str, object]], columns: dict[str, str]) -> pd.DataFrame:
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
