"""The check that telemetry has enough valid rows for a fit."""

from __future__ import annotations

import pytest

from resplit.telemetry.sufficiency import Need, shortfalls
from resplit.telemetry.tables import TABLES, Telemetry

NODES, KINDS = ["a", "b"], ["embed", "layer"]
EXAMPLE = {"str": "x", "float64": 1.0, "int64": 1, "bool": False}


def row(table: str, **values: object) -> dict[str, object]:
    return {column: EXAMPLE[kind] for column, kind in TABLES[table].items()} | values


def telemetry(reports: int = 0, messages: int = 0, passes: int = 0) -> Telemetry:
    """Telemetry with these numbers of reports per node, messages per directed pair, and passes per phase and kind."""
    return Telemetry.from_rows(
        {
            "nodes": [row("nodes", node=node) for node in NODES] * reports,
            "links": [row("links", node=node, peer=peer) for node, peer in (("a", "b"), ("b", "a"))] * messages,
            "blocks": [row("blocks", phase=phase, kind=kind) for phase in ("prefill", "decode") for kind in KINDS]
            * passes,
        }
    )


def test_exactly_as_many_rows_as_needed_are_sufficient() -> None:
    seen = telemetry(2, 3, 4)
    assert shortfalls(seen, seen, NODES, KINDS, Need(2, 3, 4)) == []


@pytest.mark.parametrize(
    ("need", "missing"),
    [
        (Need(reports=3), ["2 reports of a", "2 reports of b"]),
        (Need(messages=4), ["3 messages a -> b", "3 messages b -> a"]),
        (
            Need(passes=5),
            [f"4 {phase} passes of {kind}" for phase in ("prefill", "decode") for kind in KINDS],
        ),
    ],
)
def test_one_row_too_few_is_named_for_each_node_pair_or_kind(need: Need, missing: list[str]) -> None:
    seen = telemetry(2, 3, 4)
    assert shortfalls(seen, seen, NODES, KINDS, need) == missing


def test_a_node_that_need_not_report_is_not_named() -> None:
    assert shortfalls(telemetry(1), telemetry(1), ["a"], KINDS, Need()) == []
    assert shortfalls(telemetry(), telemetry(), ["a"], KINDS, Need(messages=1)) == ["0 reports of a"]


@pytest.mark.parametrize(("valid", "missing"), [(2, []), (1, ["blocks: 4 of 16 rows are valid"])])
def test_half_of_each_table_must_be_valid(valid: int, missing: list[str]) -> None:
    assert shortfalls(telemetry(1, 0, 4), telemetry(1, 0, valid), NODES, KINDS, Need()) == missing
