"""The comparison of runs as a table and in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resplit.comparison import MEASURES, compare, comparison_text, summaries
from resplit.errors import DataError
from resplit.metrics import summarise
from tests.test_metrics import record, request


def test_the_comparison_shows_every_measure_of_every_run_in_shown_units() -> None:
    static = summarise(record([request(0.0, 1.5)], tokens=[1.5]))
    text = comparison_text(compare({"static": static, "adaptive": replace(static, latency_mean_s=0.25)}))
    lines = text.splitlines()
    assert lines[0].split() == ["static", "adaptive"]
    assert lines[2].split() == ["Latency,", "mean", "ms", "1500", "250"]
    assert len(lines) == 2 + len(MEASURES)
    assert len({len(line) for line in lines}) == 1


def test_runs_are_compared_static_first_and_never_two_of_one_name() -> None:
    static, adaptive = record([]), replace(record([]), policy="resplit")
    undisturbed = replace(static, scenario="undisturbed")
    assert list(summaries([undisturbed, adaptive, static])) == ["static", "adaptive", "undisturbed"]
    with pytest.raises(DataError, match="two runs are called 'static'"):
        summaries([static, adaptive, static])
