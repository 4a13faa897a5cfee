"""The validation of telemetry: bad rows never pass, and good rows always pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.errors import DataError
from resplit.telemetry.tables import TABLES, Telemetry
from resplit.types import BlockFeatures
from tasks.expectations import forget_suites
from tasks.telemetry_rules import RULES, Rule
from tasks.validate import Need, ValidTelemetry, validate, validate_telemetry
from tasks.validation_page import render_html
from tests.support.properties import examples
from tests.support.telemetry import MACHINES, block_rows, link_rows, node_rows

NOW_S = 1_000_000.0
NODES = list(MACHINES)
Features = tuple[BlockFeatures, ...]


@pytest.fixture(scope="module")
def clean(features: Features) -> Telemetry:
    blocks = block_rows(MACHINES, features, contexts=(8, 40), prompts=(16,))
    rows = {"nodes": node_rows(MACHINES, list(range(8))), "links": link_rows(MACHINES), "blocks": blocks}
    dated = {name: [row | {"time_s": NOW_S - 60 + float(str(row["time_s"]))} for row in rows[name]] for name in rows}
    return Telemetry.from_rows(dated)


def _with(clean: Telemetry, table: str, row: int, values: dict[str, Any]) -> Telemetry:
    changed = getattr(clean, table).copy()
    for column, value in values.items():
        changed.loc[row, column] = value
    return Telemetry(**{name: changed if name == table else getattr(clean, name) for name in TABLES})


def test_clean_telemetry_passes_unchanged_and_leaves_no_file(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    valid = validate.fn(clean, NODES, features, NOW_S, tmp_path)
    for name in TABLES:
        pd.testing.assert_frame_equal(getattr(valid.telemetry, name), getattr(clean, name))
    assert valid.quarantine == ()
    assert list(tmp_path.iterdir()) == []
    assert valid.failed == 0


BAD = {
    "a missing use": ("nodes", {"cpu_utilization": np.nan}, "cpu_utilization is missing"),
    "a missing name": ("nodes", {"node": None}, "node is missing"),
    "a use in percent": ("nodes", {"cpu_utilization": 43.0}, "cpu_utilization must lie within 0..1"),
    "a negative use": ("nodes", {"own_utilization": -0.1}, "own_utilization must lie within 0..1"),
    "own use above the total": ("nodes", {"own_utilization": 0.9}, "own_utilization is above cpu_utilization"),
    "a negative memory": ("nodes", {"memory_free_bytes": -1.0}, "memory_free_bytes must lie within 0..1e15"),
    "an infinite memory": ("nodes", {"memory_held_bytes": np.inf}, "memory_held_bytes must lie within 0..1e15"),
    "a reference of zero": ("nodes", {"reference_s": 0.0}, "reference_s must be above 0"),
    "the future": ("nodes", {"time_s": NOW_S + 3600}, "time_s lies in the future"),
    "milliseconds": ("blocks", {"time_s": NOW_S * 1000}, "time_s lies in the future"),
    "since boot": ("links", {"time_s": 12.0}, "time_s lies in the future, or more than a day ago"),
    "a step back": ("blocks", {"time_s": NOW_S - 4000}, "before an earlier row of the same node"),
    "an unknown node": ("blocks", {"node": "stranger"}, "node is not in this cluster"),
    "an unknown peer": ("links", {"peer": "stranger"}, "peer is not in this cluster"),
    "a link to itself": ("links", {"node": "edge", "peer": "edge"}, "node and peer are the same"),
    "a time of zero": ("links", {"seconds": 0.0}, "seconds must be above 0"),
    "a negative time": ("blocks", {"seconds": -0.1}, "seconds must be above 0"),
    "no payload": ("links", {"payload_bytes": 0.0}, "payload_bytes must be above 0"),
    "an impossibly fast link": ("links", {"seconds": 1e-9, "payload_bytes": 1e6}, "faster than any link"),
    "an unknown source": ("links", {"source": "guess"}, "source must be active or passive"),
    "no tokens": ("blocks", {"tokens": 0}, "tokens must lie within"),
    "a negative context": ("blocks", {"context_tokens": -1}, "context_tokens must lie within"),
    "a pass without sessions": ("blocks", {"sessions": 0}, "sessions must lie within"),
    "an unknown block": ("blocks", {"block": "layer.99"}, "block is not in this model"),
    "an unknown phase": ("blocks", {"phase": "training"}, "phase must be prefill or decode"),
    "a wrong kind": ("blocks", {"block": "head", "kind": "embed"}, "kind is not that of the block"),
    "a missing time": ("blocks", {"seconds": np.nan}, "seconds is missing"),
    "seconds in milliseconds": ("blocks", {"seconds": 450.0}, "seconds / tokens is more than a minute"),
}


@pytest.fixture(scope="module")
def checked(
    clean: Telemetry, features: Features, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Telemetry, ValidTelemetry, dict[str, tuple[str, int]]]:
    """Telemetry with all bad rows among good ones, its validation, and the table and row of each case."""
    dirty, places = clean, {}
    for case, (table, values, _) in BAD.items():
        row = len(getattr(clean, table)) - 1 - sum(place[0] == table for place in places.values())
        places[case] = (table, row)
        dirty = _with(dirty, table, row, values)
    return dirty, validate_telemetry(dirty, NODES, features, NOW_S, tmp_path_factory.mktemp("quarantine")), places


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_goes_to_quarantine_with_the_reason(
    checked: tuple[Telemetry, ValidTelemetry, dict[str, tuple[str, int]]], case: str
) -> None:
    _, valid, places = checked
    (table, row), (_, _, reason) = places[case], BAD[case]
    rows = sorted(place[1] for place in places.values() if place[0] == table)
    (path,) = (path for path in valid.quarantine if path.name.startswith(table))
    bad = pd.read_parquet(path)
    assert reason in bad["reason"][rows.index(row)]
    assert list(bad.columns) == [*TABLES[table], "reason"]


@pytest.mark.parametrize("table", TABLES)
def test_no_good_row_goes_to_quarantine(
    checked: tuple[Telemetry, ValidTelemetry, dict[str, tuple[str, int]]], table: str
) -> None:
    dirty, valid, places = checked
    good = getattr(dirty, table).drop(index=[row for name, row in places.values() if name == table])
    pd.testing.assert_frame_equal(getattr(valid.telemetry, table), good)


def test_the_cases_break_every_rule_except_the_missing_columns() -> None:
    reasons = [reason for _, _, reason in BAD.values()] + ["the row is a duplicate", "gpu_utilization must lie"]
    for rule in (rule for rules in RULES.values() for rule in rules):
        assert rule.reason.endswith("is missing") or any(reason in rule.reason for reason in reasons), rule.reason


@examples(5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.sets(st.integers(0, 71), max_size=30))
def test_exactly_the_bad_rows_are_removed(clean: Telemetry, features: Features, tmp_path: Path, rows: set[int]) -> None:
    blocks = clean.blocks.copy()
    blocks.loc[sorted(rows), "seconds"] = -1.0
    dirty = Telemetry(clean.nodes, clean.links, blocks)
    valid = validate_telemetry(dirty, NODES, features, NOW_S, tmp_path)
    assert (valid.telemetry.blocks["seconds"] > 0).all()
    assert len(valid.telemetry.blocks) == len(blocks) - len(rows)


def test_a_row_with_a_time_in_the_future_does_not_invalidate_later_rows(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    dirty = _with(clean, "nodes", 0, {"time_s": NOW_S + 3600})
    valid = validate_telemetry(dirty, NODES, features, NOW_S, tmp_path)
    assert len(valid.telemetry.nodes) == len(clean.nodes) - 1


def test_times_may_interleave_between_nodes(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    shuffled = clean.nodes.sort_values(["node", "time_s"])  # each node in order, the nodes one after another
    valid = validate_telemetry(Telemetry(shuffled, clean.links, clean.blocks), NODES, features, NOW_S, tmp_path)
    assert valid.failed == 0


def test_one_of_two_equal_rows_is_kept(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    twice = Telemetry.concat([clean, Telemetry(*(getattr(clean, name).tail(3) for name in TABLES))])
    valid = validate_telemetry(twice, NODES, features, NOW_S, tmp_path)
    for name in TABLES:
        assert len(getattr(valid.telemetry, name)) == len(getattr(clean, name))


def test_a_named_index_with_repeated_values_hides_no_bad_row(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    dirty = _with(clean, "blocks", 5, {"seconds": -1.0})
    dirty.blocks.index = pd.Index([7] * len(dirty.blocks), name="row")
    valid = validate_telemetry(dirty, NODES, features, NOW_S, tmp_path)
    assert len(valid.telemetry.blocks) == len(clean.blocks) - 1
    assert (valid.telemetry.blocks["seconds"] > 0).all()


def test_a_gpu_use_above_one_is_bad_and_an_absent_gpu_is_not(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    dirty = _with(clean, "nodes", 11, {"gpu_utilization": 1.5})
    assert len(validate_telemetry(dirty, NODES, features, NOW_S, tmp_path).telemetry.nodes) == len(clean.nodes) - 1


@pytest.mark.parametrize(
    ("change", "need", "message"),
    [
        (lambda t: _without(t, "nodes", "edge"), Need(), "0 reports of edge"),
        (lambda t: _without(t, "links", "edge"), Need(messages=3), "0 messages edge -> cloud"),
        (lambda t: t, Need(passes=1000), "decode passes of head"),
        (lambda t: Telemetry.from_rows({}), Need(), "0 reports of home-a"),
    ],
    ids=["node", "link", "passes", "nothing"],
)
def test_too_few_good_rows_are_a_data_error_that_names_the_missing_rows(
    clean: Telemetry,
    features: Features,
    tmp_path: Path,
    change: Callable[[Telemetry], Telemetry],
    need: Need,
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        validate_telemetry(change(clean), NODES, features, NOW_S, tmp_path, need=need)


def _without(telemetry: Telemetry, table: str, node: str) -> Telemetry:
    kept = {name: getattr(telemetry, name) for name in TABLES}
    return Telemetry(**kept | {table: kept[table].query("node != @node")})


def test_a_lost_node_need_not_report(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    valid = validate_telemetry(_without(clean, "nodes", "edge"), NODES, features, NOW_S, tmp_path, lost_nodes=["edge"])
    assert set(valid.telemetry.nodes["node"]) == set(NODES) - {"edge"}


def test_a_table_with_mostly_bad_rows_is_not_used(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    blocks = clean.blocks.assign(seconds=np.where(np.arange(len(clean.blocks)) % 3 > 0, -1.0, 1e-3))
    with pytest.raises(DataError, match="blocks: 24 of 72 rows are valid"):
        validate_telemetry(Telemetry(clean.nodes, clean.links, blocks), NODES, features, NOW_S, tmp_path)
    assert len(list(tmp_path.glob("blocks-*.parquet"))) == 1


def test_a_missing_column_or_a_wrong_type_is_a_data_error(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    short = Telemetry(clean.nodes.drop(columns="cpu_utilization"), clean.links, clean.blocks)
    with pytest.raises(DataError, match="nodes: no column cpu_utilization"):
        validate_telemetry(short, NODES, features, NOW_S, tmp_path)
    words = Telemetry(clean.nodes, clean.links.assign(seconds="soon"), clean.blocks)
    with pytest.raises(DataError, match="links: a column has the wrong type"):
        validate_telemetry(words, NODES, features, NOW_S, tmp_path)


def test_a_rule_that_cannot_be_evaluated_stops_the_validation(
    clean: Telemetry, features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Rule("never", "ExpectColumnValuesToBeBetween", "no_such_column", (("min_value", 0), ("max_value", 1)))
    monkeypatch.setitem(RULES, "nodes", (*RULES["nodes"], wrong))
    forget_suites()
    with pytest.raises(DataError, match="'never' cannot be evaluated"):
        validate_telemetry(clean, NODES, features, NOW_S, tmp_path)
    forget_suites()


def test_the_page_shows_every_rule_and_loads_nothing_from_elsewhere(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    valid = validate_telemetry(_with(clean, "links", 3, {"seconds": 0.0}), NODES, features, NOW_S, tmp_path)
    page = render_html(valid, "A & B")
    assert page.count("<tr class=") == sum(len(rules) for rules in RULES.values())
    assert page.count('class="bad"') == sum(1 for fault in valid.faults if fault.failed)
    assert "A &amp; B" in page
    assert "http" not in page
    assert str(valid.quarantine[0]) in page


def test_the_result_of_every_rule_of_every_table_is_reported(
    checked: tuple[Telemetry, ValidTelemetry, dict[str, tuple[str, int]]],
) -> None:
    dirty, valid, places = checked
    assert [(fault.table, fault.rule) for fault in valid.faults] == [
        (name, rule) for name, rules in RULES.items() for rule in rules
    ]
    assert {(fault.table, fault.rows) for fault in valid.faults} == {
        (name, len(getattr(dirty, name))) for name in TABLES
    }
    assert {fault.failed for fault in valid.faults if fault.rule.reason == "cpu_utilization is missing"} == {1}
    assert valid.failed >= len(places)
    assert {path.name for path in valid.quarantine} == {f"{name}-{NOW_S:.3f}.parquet" for name in TABLES}


def test_a_row_that_fails_several_rules_has_all_reasons(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    dirty = _with(clean, "links", 4, {"peer": "stranger", "payload_bytes": 0.0})
    valid = validate_telemetry(dirty, NODES, features, NOW_S, tmp_path / "new" / "folder")
    bad = pd.read_parquet(valid.quarantine[0])
    assert bad["reason"].tolist() == ["payload_bytes must be above 0 and at most 1e12; peer is not in this cluster"]
    assert valid.failed == 2


def test_tables_without_rows_pass_if_none_are_needed(clean: Telemetry, features: Features, tmp_path: Path) -> None:
    only_nodes = Telemetry(clean.nodes, clean.links.head(0), clean.blocks.head(0))
    valid = validate_telemetry(only_nodes, NODES, features, NOW_S, tmp_path)
    assert valid.failed == 0
    assert len(valid.faults) == sum(map(len, RULES.values()))


def test_the_error_names_the_quarantine_only_if_rows_failed(
    clean: Telemetry, features: Features, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"0 reports of home-a; .*0 reports of cloud$"):
        validate_telemetry(Telemetry.from_rows({}), NODES, features, NOW_S, tmp_path)
    dirty = _with(clean, "links", 3, {"seconds": 0.0})
    with pytest.raises(DataError, match=r"passes of layer.* \(the rows that failed are in .*\)$"):
        validate_telemetry(dirty, NODES, features, NOW_S, tmp_path, need=Need(passes=1000))
