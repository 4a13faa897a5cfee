"""The rules that every row of telemetry must satisfy, and the columns derived from a table for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from resplit.telemetry.tables import TABLES

__all__ = ["BLOCKS", "NODES", "RULES", "Rule", "derive"]


@dataclass(frozen=True)
class Rule:
    """One expectation of Great Expectations on one column, and the reason recorded with a row that fails it."""

    reason: str
    expectation: str
    column: str
    arguments: tuple[tuple[str, object], ...] = ()


def _present(column: str) -> Rule:
    return Rule(f"{column} is missing", "ExpectColumnValuesToNotBeNull", column)


def _between(column: str, low: float, high: float, reason: str, strict: bool = False) -> Rule:
    arguments = (("min_value", low), ("max_value", high), ("strict_min", strict))
    return Rule(reason, "ExpectColumnValuesToBeBetween", column, arguments)


def _one_of(column: str, *values: object, reason: str) -> Rule:
    return Rule(reason, "ExpectColumnValuesToBeInSet", column, (("value_set", values),))


NODES, BLOCKS = "$nodes", "$blocks"  # placeholders for the names of the cluster and the model
_OPTIONAL = {"gpu_utilization", "reference_s"}  # absent without a GPU, and before the first probe


def _complete(table: str) -> tuple[Rule, ...]:
    return tuple(_present(column) for column in TABLES[table] if column not in _OPTIONAL)


_TIME_AND_NODE = (
    _between("ahead_s", -86_400, 1, "time_s lies in the future, or more than a day ago"),
    _between("behind_s", -np.inf, 0, "time_s lies before an earlier row of the same node"),
    _one_of("repeated", False, reason="the row is a duplicate"),
    _one_of("node", NODES, reason="node is not in this cluster"),
)
_SECONDS = _between("seconds", 0, 600, "seconds must be above 0 and at most 600", strict=True)

# The columns that no node reports (ahead_s, behind_s, own_excess, ...) are added by `derive`.
RULES: dict[str, tuple[Rule, ...]] = {
    "nodes": (
        *_complete("nodes"),
        *_TIME_AND_NODE,
        _between("cpu_utilization", 0, 1 + 1e-6, "cpu_utilization must lie within 0..1"),
        _between("own_utilization", 0, 1 + 1e-6, "own_utilization must lie within 0..1"),
        _between("gpu_utilization", 0, 1 + 1e-6, "gpu_utilization must lie within 0..1"),
        _between("own_excess", -1, 0.05, "own_utilization is above cpu_utilization"),
        _between("memory_free_bytes", 0, 1e15, "memory_free_bytes must lie within 0..1e15"),
        _between("memory_held_bytes", 0, 1e15, "memory_held_bytes must lie within 0..1e15"),
        _between("reference_s", 0, 600, "reference_s must be above 0 and at most 600", strict=True),
    ),
    "links": (
        *_complete("links"),
        *_TIME_AND_NODE,
        _SECONDS,
        _between("payload_bytes", 0, 1e12, "payload_bytes must be above 0 and at most 1e12", strict=True),
        _between("bytes_per_s", 0, 1e11, "payload_bytes / seconds is faster than any link (1e11 bytes/s)"),
        _one_of("peer", NODES, reason="peer is not in this cluster"),
        _one_of("to_itself", False, reason="node and peer are the same"),
        _one_of("source", "active", "passive", reason="source must be active or passive"),
    ),
    "blocks": (
        *_complete("blocks"),
        *_TIME_AND_NODE,
        _SECONDS,
        _between("tokens", 1, 1e6, "tokens must lie within 1..1e6"),
        _between("sessions", 1, 1e4, "sessions must lie within 1..10000"),
        _between("context_tokens", 0, 1e7, "context_tokens must lie within 0..1e7"),
        _between("s_per_token", 0, 60, "seconds / tokens is more than a minute"),
        _one_of("phase", "prefill", "decode", reason="phase must be prefill or decode"),
        _one_of("block", BLOCKS, reason="block is not in this model"),
        _one_of("other_kind", False, reason="kind is not that of the block"),
    ),
}


def derive(name: str, table: pd.DataFrame, kinds: dict[str, str], now_s: float) -> pd.DataFrame:
    """The table with the columns added that only the rules need. `kinds` gives the kind of each block of the model."""
    # A row with a time in the future must not make the correct rows after it fail.
    past = table["time_s"].where(table["time_s"] <= now_s + 1)
    identity = ["time_s", "node"] if name == "nodes" else list(table.columns)
    common = table.assign(
        ahead_s=table["time_s"] - now_s,
        behind_s=past.groupby(table["node"]).cummax() - table["time_s"],
        repeated=table.duplicated(identity),
    )
    if name == "nodes":
        return common.assign(own_excess=table["own_utilization"] - table["cpu_utilization"])
    if name == "links":
        return common.assign(
            bytes_per_s=table["payload_bytes"] / table["seconds"].where(table["seconds"] > 0),
            to_itself=table["node"] == table["peer"],
        )
    return common.assign(
        s_per_token=table["seconds"] / table["tokens"].where(table["tokens"] > 0),
        other_kind=table["block"].isin(kinds) & (table["block"].map(kinds) != table["kind"]),
    )
