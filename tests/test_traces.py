"""Trace files become changes and requests of a scenario."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from resplit.errors import DataError
from resplit.scenario import ScenarioConfig
from resplit.traces import TracedRequest, traced_requests, with_traces


def scenario(**trace: Any) -> ScenarioConfig:
    return ScenarioConfig.model_validate({"name": "traced", "duration": "10 s", "traces": [trace]})


def write(folder: Path, *lines: str) -> str:
    (folder / "trace.csv").write_text("\n".join(lines))
    return "trace.csv"


def test_requests_come_at_the_times_of_their_trace_and_are_scaled_and_clipped(tmp_path: Path) -> None:
    rows = ("arrival_s,prompt_tokens,output_tokens", "99,1,1", "100,20,4", "104,400,1000", "112,30,6", "121,9,9")
    traced = scenario(
        kind="requests",
        file=write(tmp_path, *rows),
        request_class="chat",
        shift="100 s",
        speed=2,
        scale=0.5,
        clip=[4, 99],
    )
    assert traced_requests(traced, tmp_path) == {
        "chat": [TracedRequest(0.0, 10, 4), TracedRequest(2.0, 99, 99), TracedRequest(6.0, 15, 4)]
    }
    thinned = traced.model_copy(update={"traces": (traced.traces[0].model_copy(update={"every": 2}),)})
    assert [request.at_s for request in traced_requests(thinned, tmp_path)["chat"]] == [0.0, 6.0]
    read = with_traces(traced, tmp_path)
    assert traced_requests(read, Path()) == traced_requests(traced, tmp_path)


def test_bandwidth_holds_from_the_row_that_the_start_is_in(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "lte.csv.gz", "wt") as file:
        file.write("trace_id,time_s,duration_s,throughput_bps\nbus,0,2,8e6\nbus,2,2,0\ncar,3,1,5\nbus,30,1,9e6\n")
    traced = scenario(kind="bandwidth", file="lte.csv.gz", trace_id="bus", between=["a", "b"], shift="1 s")
    changes = with_traces(traced, tmp_path).links
    assert [(change.at, change.bandwidth) for change in changes] == [(0.0, 1e6), (1.0, 125.0)]


def test_half_of_a_round_trip_is_the_latency_of_a_link(tmp_path: Path) -> None:
    file = write(tmp_path, "node_a,node_b,rtt_median_ms,rtt_max_ms", "0,5,20,30", "0,7,40,41", "5,7,10,11")
    traced = scenario(kind="rtt", file=file, nodes={"hub": "7", "far": "0"})
    assert [(c.between, c.latency) for c in with_traces(traced, tmp_path).links] == [(("hub", "far"), 0.02)]
    with pytest.raises(DataError, match=r"trace\.csv: has no row for the nodes 7 and 9"):
        with_traces(scenario(kind="rtt", file=file, nodes={"hub": "7", "far": "9"}), tmp_path)


def test_background_load_stays_below_the_whole_node(tmp_path: Path) -> None:
    file = write(tmp_path, "vm,time_s,duration_s,cpu_utilization,cpu_cores", "8,300,300,0.2,1", "8,600,300,1.0,1")
    traced = scenario(kind="background", file=file, vm="8", node="hub", shift="300 s", speed=60)
    changes = with_traces(traced, tmp_path).nodes
    assert [(change.at, change.background_utilization) for change in changes] == [(0.0, 0.2), (5.0, 0.98)]


def test_nodes_come_and_go(tmp_path: Path) -> None:
    file = write(tmp_path, "trace_id,time_s,event,node", "t,4,remove,n1", "u,5,remove,n1", "t,6,add,n1", "t,7,add,n3")
    traced = scenario(kind="churn", file=file, trace_id="t", nodes={"hub": "n1"})
    assert [(change.at, change.node, change.up) for change in with_traces(traced, tmp_path).nodes] == [
        (4.0, "hub", False),
        (6.0, "hub", True),
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["vm,time_s", "8,1"], "has no column 'cpu_utilization'; a background trace needs it"),
        (["vm,time_s,cpu_utilization", "9,1,0.5"], "vm has no '8'"),
        ([], "cannot be read: No columns to parse"),
    ],
)
def test_a_trace_of_another_shape_is_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    traced = scenario(kind="background", file=write(tmp_path, *lines), vm="8", node="hub")
    with pytest.raises(DataError, match=message):
        with_traces(traced, tmp_path)


def test_a_trace_that_is_not_there_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/traces/README\.md says where"):
        with_traces(scenario(kind="background", file="absent.csv", vm="8", node="hub"), tmp_path)
