"""The figures of runs."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import pytest

from resplit.comparison import scenario_changes
from resplit.records import RunRecord, table
from tasks import plot_style, plots
from tests.support.runs import synthetic_run

STATIC, ADAPTIVE = synthetic_run("static", duration_s=40.0), synthetic_run("resplit", duration_s=40.0)


def with_changes(run: RunRecord, changes: list[tuple[float, str]]) -> RunRecord:
    rows = [{"time_s": time_s, "kind": "change", "label": label} for time_s, label in changes]
    return replace(run, events=table("events", rows))


def test_a_change_that_two_runs_share_is_listed_once_with_its_earliest_time() -> None:
    runs = {
        "static": with_changes(STATIC, [(9.51, "surge"), (20.0, "slow"), (30.0, "surge")]),
        "adaptive": with_changes(ADAPTIVE, [(9.49, "surge"), (20.2, "slow"), (30.1, "surge")]),
    }
    assert scenario_changes(runs) == [(9.49, "surge"), (20.0, "slow"), (30.0, "surge")]


def test_a_run_whose_only_placement_is_already_shown_gets_no_panel() -> None:
    runs = {"static": STATIC, "adaptive": ADAPTIVE, "undisturbed": STATIC}
    assert [axes.get_title(loc="left") for axes in plots.placement_figure(runs).axes] == ["static", "adaptive"]


def test_each_node_has_one_colour_in_all_runs() -> None:
    both = plot_style.node_colours([STATIC, ADAPTIVE])
    assert set(both) == {"hub", "desk", "phone", "tv", "cloud"}
    assert len(set(both.values())) == len(both)


def test_drawing_does_not_change_the_global_settings() -> None:
    before = {name: matplotlib.rcParams[name] for name in plot_style.STYLE}
    plot_style.svg(plots.qos_figure({"static": STATIC}), "qos")
    assert {name: matplotlib.rcParams[name] for name in plot_style.STYLE} == before


@pytest.mark.parametrize(("slowest_s", "scale"), [(3.0, "linear"), (300.0, "log")])
def test_the_latency_axis_is_logarithmic_only_if_few_values_would_compress_the_others(
    slowest_s: float, scale: str
) -> None:
    requests = ADAPTIVE.requests.assign(arrival_s=1.0, end_s=2.0, status=200)
    requests.loc[:2, "end_s"] = 1.0 + slowest_s
    (axes,) = plots.latency_figure({"adaptive": replace(ADAPTIVE, requests=requests)}).axes
    assert axes.get_yscale() == scale
