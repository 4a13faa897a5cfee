"""Whether valid telemetry is sufficient for a fit: how many rows are needed, and which are missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resplit.telemetry.tables import TABLES, Telemetry

__all__ = ["Need", "shortfalls"]


@dataclass(frozen=True)
class Need:
    """The least numbers of valid rows, and the least share of each table that must be valid.

    `reports` are counted for each node, `messages` for each directed pair of nodes, `passes` for each phase and kind
    of block.
    """

    reports: int = 1
    messages: int = 0
    passes: int = 0
    good_share: float = 0.5


def shortfalls(seen: Telemetry, good: Telemetry, nodes: Sequence[str], kinds: Sequence[str], need: Need) -> list[str]:
    """The requirements of `need` that the valid rows `good` do not satisfy, as one text for each.

    `seen` are all rows, valid or not. `nodes` are the nodes that must report, `kinds` the model's kinds of block.
    """
    return [*_mostly_bad(seen, good, need), *_missing_rows(good, nodes, kinds, need)]


def _mostly_bad(seen: Telemetry, good: Telemetry, need: Need) -> list[str]:
    counts = {name: (len(getattr(good, name)), len(getattr(seen, name))) for name in TABLES}
    return [
        f"{name}: {valid} of {all_rows} rows are valid"
        for name, (valid, all_rows) in counts.items()
        if valid < need.good_share * all_rows
    ]


def _missing_rows(good: Telemetry, nodes: Sequence[str], kinds: Sequence[str], need: Need) -> list[str]:
    reports = good.nodes["node"].value_counts()
    messages = good.links.groupby(["node", "peer"]).size()
    passes = good.blocks.groupby(["phase", "kind"]).size()
    counts = [(int(reports.get(node, 0)), need.reports, f"reports of {node}") for node in nodes]
    counts += [
        (int(messages.get((node, peer), 0)), need.messages, f"messages {node} -> {peer}")
        for node in nodes
        for peer in nodes
        if node != peer
    ]
    counts += [
        (int(passes.get((phase, kind), 0)), need.passes, f"{phase} passes of {kind}")
        for phase in ("prefill", "decode")
        for kind in kinds
    ]
    return [f"{count} {rows}" for count, least, rows in counts if count < least]
