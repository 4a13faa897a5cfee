"""The comparison of runs as a table and in words."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from resplit.comparison import MEASURES, Row, change, compare, comparison_text, summaries, verdict
from resplit.errors import DataError
from resplit.metrics import summarise
from tests.support.run_tables import record, request
from tests.support.runs import synthetic_run


def test_the_table_shows_every_measure_of_every_run_in_its_unit() -> None:
    static = summarise(record([request(0.0, 1.5)], tokens=[1.5]))
    text = comparison_text(compare({"static": static, "adaptive": replace(static, latency_mean_s=0.25)}))
    lines = text.splitlines()
    assert lines[0].split() == ["static", "adaptive"]
    assert lines[2].split() == ["Latency,", "mean", "ms", "1500", "250"]
    assert len(lines) == 2 + len(MEASURES)
    assert len({len(line) for line in lines}) == 1


def test_static_comes_first_and_two_runs_with_one_label_are_refused() -> None:
    static, adaptive = record([]), replace(record([]), policy="resplit")
    undisturbed = replace(static, scenario="undisturbed")
    assert list(summaries([undisturbed, adaptive, static])) == ["static", "adaptive", "undisturbed"]
    with pytest.raises(DataError, match="two runs are labelled 'static'"):
        summaries([static, adaptive, static])


def test_the_verdict_says_so_when_the_adaptive_run_is_worse() -> None:
    swapped = [replace(synthetic_run("static"), policy="resplit"), replace(synthetic_run("resplit"), policy="static")]
    rows = compare(summaries(swapped))
    assert re.search(r"mean latency \d+\xa0ms against \d+\xa0ms \([\d.]+× as high\)", verdict(rows))
    by_field = {row.measure.field: change(row) for row in rows}
    assert by_field["qos_met"].startswith("−")
    assert by_field["privacy_violations"] == "the same"


def test_without_an_adaptive_run_there_is_no_verdict() -> None:
    assert verdict(compare(summaries([synthetic_run("static")]))) == ""


@pytest.mark.parametrize(
    ("field", "static", "adaptive", "words"),
    [
        ("latency_mean_s", 1.0, 0.25, "4.00× lower"),
        ("latency_mean_s", 1.0, 2.5, "2.50× as high"),
        ("latency_mean_s", 1.0, 1.0001, "the same"),
        ("latency_mean_s", 1.0, math.nan, ""),
        ("latency_mean_s", math.nan, 1.0, ""),
        ("qos_met", 0.5, 0.75, "+25.0 points"),
        ("qos_met", 0.75, 0.5, "−25.0 points"),
        ("downtime_incidents", 0.0, 2.0, "+2"),
        ("downtime_incidents", 2.0, 0.0, "−2"),
    ],
)
def test_a_change_is_a_ratio_or_a_difference_in_points_or_a_difference_from_zero(
    field: str, static: float, adaptive: float, words: str
) -> None:
    measure = next(measure for measure in MEASURES if measure.field == field)
    assert change(Row(measure, {"static": static, "adaptive": adaptive})) == words
