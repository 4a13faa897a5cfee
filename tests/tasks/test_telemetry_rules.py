"""The columns that are derived for the rules, and the limits of the rules."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from resplit.telemetry.tables import TABLES, Telemetry
from tasks.telemetry_rules import RULES, Rule, _between, _complete, _one_of, _present, derive

NOW_S = 1000.0
EXAMPLE = {"str": "x", "float64": 1.0, "int64": 1, "bool": False}


def derived(table: str, *rows: dict[str, object]) -> pd.DataFrame:
    plain = {column: EXAMPLE[kind] for column, kind in TABLES[table].items()} | {"time_s": NOW_S - 10}
    telemetry = Telemetry.from_rows({table: [plain | row for row in rows]})
    return derive(table, getattr(telemetry, table), {"embed": "embed", "layer.0": "layer"}, NOW_S)


def test_a_row_is_ahead_of_now_or_behind_the_newest_row_of_its_node() -> None:
    times = [("a", 990.0), ("a", 995.0), ("a", 992.0), ("b", 980.0), ("a", 1005.0), ("a", 996.0)]
    table = derived("nodes", *({"node": node, "time_s": time_s} for node, time_s in times))
    assert table["ahead_s"].tolist() == [-10.0, -5.0, -8.0, -20.0, 5.0, -4.0]
    assert table["behind_s"].fillna(0.0).tolist()[:4] == [0.0, 0.0, 3.0, 0.0]
    assert table["behind_s"].tolist()[5] == 0.0


def test_reports_with_equal_time_and_node_and_messages_with_equal_columns_are_repeated() -> None:
    reports = derived("nodes", {"cpu_utilization": 0.1}, {"cpu_utilization": 0.2}, {"node": "b"})
    assert reports["repeated"].tolist() == [False, True, False]
    messages = derived("links", {"seconds": 0.1}, {"seconds": 0.2}, {"seconds": 0.1})
    assert messages["repeated"].tolist() == [False, False, True]


def test_own_use_exceeds_the_total_by_their_difference() -> None:
    assert derived("nodes", {"own_utilization": 0.5, "cpu_utilization": 0.2})["own_excess"].tolist() == [0.3]


def test_a_message_gets_a_rate_unless_its_time_is_zero() -> None:
    table = derived("links", {"payload_bytes": 6.0, "seconds": 2.0}, {"seconds": 0.0}, {"node": "y"})
    assert table["bytes_per_s"].tolist()[0] == 3.0
    assert math.isnan(table["bytes_per_s"].tolist()[1])
    assert table["to_itself"].tolist() == [True, True, False]


def test_a_pass_gets_a_time_per_token_and_a_check_of_its_kind() -> None:
    table = derived(
        "blocks",
        {"block": "embed", "kind": "embed", "seconds": 6.0, "tokens": 3},
        {"block": "layer.0", "kind": "embed", "tokens": 0},
        {"block": "unknown", "kind": "embed"},
    )
    assert table["s_per_token"].tolist()[0] == 2.0
    assert math.isnan(table["s_per_token"].tolist()[1])
    assert table["other_kind"].tolist() == [False, True, False]


LIMITS = {
    "ahead_s": (-86_400, 1),
    "behind_s": (-math.inf, 0),
    "cpu_utilization": (0, 1 + 1e-6),
    "own_utilization": (0, 1 + 1e-6),
    "gpu_utilization": (0, 1 + 1e-6),
    "reference_s": (0, 600),
    "own_excess": (-1, 0.05),
    "memory_free_bytes": (0, 1e15),
    "memory_held_bytes": (0, 1e15),
    "seconds": (0, 600),
    "payload_bytes": (0, 1e12),
    "bytes_per_s": (0, 1e11),
    "tokens": (1, 1e6),
    "sessions": (1, 1e4),
    "context_tokens": (0, 1e7),
    "s_per_token": (0, 60),
}


@pytest.mark.parametrize("column", LIMITS)
def test_the_limits_of_a_column_are_as_documented(column: str) -> None:
    found = {
        (dict(rule.arguments)["min_value"], dict(rule.arguments)["max_value"])
        for rules in RULES.values()
        for rule in rules
        if rule.column == column and rule.expectation == "ExpectColumnValuesToBeBetween"
    }
    assert found == {LIMITS[column]}


def test_every_column_with_limits_is_documented() -> None:
    between = "ExpectColumnValuesToBeBetween"
    assert {rule.column for rules in RULES.values() for rule in rules if rule.expectation == between} == set(LIMITS)


def test_times_and_sizes_must_be_above_zero() -> None:
    strict = {
        rule.column for rules in RULES.values() for rule in rules if dict(rule.arguments).get("strict_min") is True
    }
    assert strict == {"seconds", "payload_bytes", "reference_s"}


def test_each_kind_of_rule_names_its_expectation_column_arguments_and_reason() -> None:
    assert _present("node") == Rule("node is missing", "ExpectColumnValuesToNotBeNull", "node")
    limits = (("min_value", 0), ("max_value", 9.5))
    between = ("ExpectColumnValuesToBeBetween", "seconds")
    assert _between("seconds", 0, 9.5, "too long") == Rule("too long", *between, (*limits, ("strict_min", False)))
    assert _between("seconds", 0, 9.5, "wrong", strict=True) == Rule("wrong", *between, (*limits, ("strict_min", True)))
    assert _one_of("phase", "prefill", "decode", reason="unknown") == Rule(
        "unknown", "ExpectColumnValuesToBeInSet", "phase", (("value_set", ("prefill", "decode")),)
    )


def test_every_column_must_be_present_except_the_optional_ones() -> None:
    reports = [rule.column for rule in _complete("nodes")]
    assert reports == [column for column in TABLES["nodes"] if column not in ("gpu_utilization", "reference_s")]
    assert [rule.column for rule in _complete("links")] == list(TABLES["links"])


def test_a_row_up_to_a_second_ahead_counts_as_the_newest_of_its_node() -> None:
    times = (NOW_S + 1.0, NOW_S + 0.5, NOW_S + 1.5, NOW_S)
    table = derived("nodes", *({"node": "a", "time_s": time_s} for time_s in times))
    assert table["behind_s"].fillna(-9.0).tolist() == [0.0, 0.5, -9.0, 1.0]
