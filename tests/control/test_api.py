"""What the control API tells of a cluster, and how it emulates links."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from fastapi import Request

from resplit.control.api import LinkEmulationBody, _error_response, _link_shape, create_control_api
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.epochs import Proposal
from resplit.errors import ConfigError, DataError, NodeLostError, ResplitError
from resplit.wire.emulated_link import Shape
from tests.support.cluster_file import cluster
from tests.support.controllers import FIRST, operator_of
from tests.support.in_process import InProcessCluster
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C


@pytest.fixture
def monitor(nodes: InProcessCluster) -> Monitor:
    return Monitor(nodes.router.peers, 8)


@pytest.fixture
async def api(nodes: InProcessCluster, controller: Controller, monitor: Monitor) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a cluster that has a problem to plan with and no placement yet."""
    controller.planner.set_problem(problem_of(nodes.config, nodes.features, FIRST))
    app = create_control_api(controller, operator_of(nodes, controller), monitor, "secret")
    headers = {"Authorization": "Bearer secret"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://control", headers=headers
    ) as client:
        yield client


async def test_before_the_first_placement_the_status_has_no_epoch_and_the_nodes_have_no_process_yet(
    api: httpx.AsyncClient, nodes: InProcessCluster
) -> None:
    status = (await api.get("/status")).json()
    assert (status["epoch"], status["placement"], status["action"], status["predicted_latency_s"]) == (
        0,
        None,
        None,
        None,
    )
    assert status["ready"] != "yes"
    assert [(each["node"], each["pid"]) for each in status["nodes"]] == [(A, None), (B, None), (C, None)]
    model = (await api.get("/model")).json()
    assert (model["epoch"], model["placement"], model["lost"], model["drained"]) == (0, None, [], [])
    assert [each["name"] for each in model["features"]] == [each.name for each in nodes.features]


async def test_the_status_tells_of_the_live_epoch_and_of_each_node(
    api: httpx.AsyncClient, nodes: InProcessCluster, controller: Controller, monitor: Monitor
) -> None:
    await controller.deploy(Proposal(tuple(FIRST), "re-split", 0, 0.25, note="half of the demand"))
    controller.emulation_warning = lambda: "this machine is busy"
    for name in (A, B, C):
        await monitor.poll(name)
    assert (await api.post(f"/nodes/{C}/drain")).json() == {"changes": ["gamma is drained"]}
    await nodes.stop(C)
    status = (await api.get("/status")).json()
    assert controller.live is not None
    assert (status["cluster"], status["model"]) == (nodes.config.name, nodes.model.name)
    assert (status["epoch"], status["action"], status["plan_note"]) == (2, "drain", "")
    assert tuple(status["placement"]) == controller.live.placement
    assert (status["ready"], status["emulation_warning"]) == ("yes", "this machine is busy")
    assert status["blocks"] == [each.name for each in nodes.features]
    seen = {each["node"]: each for each in status["nodes"]}
    assert {name: (each["trusted"], each["answers"], each["drained"]) for name, each in seen.items()} == {
        A: (True, True, False),
        B: (True, True, False),
        C: (False, False, True),
    }
    assert {name: each["address"] for name, each in seen.items()} == {
        name: str(address) for name, address in nodes.addresses.items()
    }
    assert all(each["pid"] and each["fault"] is None and each["clock_ahead_s"] < 1.0 for each in seen.values())
    model = (await api.get("/model")).json()
    assert (model["epoch"], model["lost"], model["drained"]) == (2, [C], [C])
    first = (await api.get("/epochs")).json()[0]
    assert (first["epoch"], first["action"], first["predicted_latency_s"]) == (1, "re-split", 0.25)
    assert first["note"] == "half of the demand"


async def test_telemetry_is_handed_out_from_a_time_on(api: httpx.AsyncClient) -> None:
    assert (await api.post("/profile")).json() == {}
    rows = (await api.get("/telemetry")).json()
    assert {row["node"] for row in rows["nodes"]} == {A, B, C}
    assert {row["node"] for row in rows["blocks"]} == {A, B, C}
    last_s = max(row["time_s"] for row in rows["nodes"])
    later = (await api.get("/telemetry", params={"since_s": last_s})).json()["nodes"]
    assert later == [row for row in rows["nodes"] if row["time_s"] == last_s]
    assert (await api.get("/telemetry", params={"since_s": last_s + 60})).json()["nodes"] == []


async def test_the_declared_demand_is_told_by_class(api: httpx.AsyncClient) -> None:
    (demand,) = (await api.get("/demand", params={"window_s": 5})).json()
    assert demand["name"] == "chat"


async def test_the_fast_loop_is_armed_only_with_a_policy_that_is_shipped(
    api: httpx.AsyncClient, controller: Controller
) -> None:
    refused = await api.put("/fast_loop", json={"policy": "os:system", "settings": {}, "for_s": 60})
    assert refused.status_code == 422
    assert "is not one of" in refused.json()["error"]["message"]
    assert (await api.put("/fast_loop", json={"settings": {}, "for_s": 60})).json() == {}
    assert (await api.put("/fast_loop", json={"settings": {}, "for_s": -1})).status_code == 422


async def test_a_call_on_an_unknown_node_is_refused(api: httpx.AsyncClient) -> None:
    unknown = await api.post("/emulation/kill", json={"node": "nobody"})
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (409, "ConfigError")


@pytest.mark.parametrize(("error", "status"), [(NodeLostError("beta is lost"), 503), (DataError("no problem"), 409)])
async def test_only_a_lost_node_is_503_because_another_plan_helps_against_all_else(
    error: ResplitError, status: int
) -> None:
    answer = await _error_response(Request({"type": "http"}), error)
    assert answer.status_code == status
    assert json.loads(bytes(answer.body)) == {"error": {"message": str(error), "type": type(error).__name__}}


def emulated(change: dict[str, float], folder: Path) -> Shape:
    return _link_shape(cluster(folder), LinkEmulationBody(between=("hub", "far"), **change))


def test_a_link_keeps_what_the_change_does_not_name(tmp_path: Path) -> None:
    declared = emulated({}, tmp_path)
    assert (declared.latency_s, declared.bandwidth_bytes_per_s) == (pytest.approx(0.009), 1e6)
    assert emulated({"latency_s": 0.5}, tmp_path) == replace(declared, latency_s=0.5)
    assert emulated({"latency_s": 0.0}, tmp_path) == replace(declared, latency_s=0.0)
    assert emulated({"bandwidth_bytes_per_s": 5e5}, tmp_path) == replace(declared, bandwidth_bytes_per_s=5e5)


def test_a_link_of_a_node_to_itself_cannot_be_emulated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hub and hub: the links of this cluster are real, or this is one node"):
        _link_shape(cluster(tmp_path), LinkEmulationBody(between=("hub", "hub")))
