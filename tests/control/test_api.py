"""What the control API tells of a cluster, and how it emulates links."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest
from fastapi import Request

from resplit.control.api import LinkEmulationBody, _cluster_status, _error_response, _link_shape, create_control_api
from resplit.control.controller import Controller
from resplit.control.monitor import Monitor
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import ConfigError, DataError, NodeLostError, ResplitError
from resplit.pass_times import TimeByNode
from resplit.status import ClusterStatus, GatewayStatus, NodeStatus, ReadinessStatus, ReportedState
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import Route
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


def shown(live: Route | None, *history: LiveEpoch) -> ClusterStatus:
    """The status of a cluster of two nodes, one of which is in every way unlike the other."""
    gateway = SimpleNamespace(
        status=lambda: GatewayStatus(3, 2, "yes", 40),
        connected_nodes=lambda: {A},
        faults=lambda: {B: "its report cannot be read"},
        clocks_ahead_s=lambda: {B: 7.5},
    )
    view: Any = SimpleNamespace(
        cluster=SimpleNamespace(name="home", trusted=(A,)),
        model=SimpleNamespace(name="a model", note="of four bits"),
        rules=SimpleNamespace(features=(), drained={B}),
        addresses={A: Address("127.0.0.1", 1), B: Address("127.0.0.1", 2)},
        gateway=gateway,
    )
    controller: Any = SimpleNamespace(
        view=view,
        live=live,
        deployment=SimpleNamespace(history=list(history)),
        emulation_warning=lambda: "this machine is busy",
        readiness=SimpleNamespace(status=lambda: ReadinessStatus(("beta lost",), 2, 1.5)),
        spent=TimeByNode(1.0, 2.0, 3.0, 4),
    )
    monitor: Any = SimpleNamespace(states={B: ReportedState(B, 4711, trusted=True, sessions=5)})
    return _cluster_status(controller, monitor)


def test_the_status_has_what_each_part_of_the_controller_knows() -> None:
    first = LiveEpoch(1, 0.0, "initial", (A,), 9.0, None, 0.0, 0.0)
    newest = replace(first, epoch=2, action="recover", predicted_latency_s=0.25, note="half of the demand")
    assert shown(Route(2, (A,), {}), first, newest) == ClusterStatus(
        cluster="home",
        model="a model",
        note="of four bits",
        blocks=(),
        epoch=2,
        placement=(A,),
        action="recover",
        predicted_latency_s=0.25,
        nodes=(
            NodeStatus(
                node=A, pid=None, trusted=True, address="127.0.0.1:1", answers=True, drained=False, clock_ahead_s=0.0
            ),
            NodeStatus(
                node=B,
                pid=4711,
                trusted=False,  # whatever it says
                sessions=5,
                address="127.0.0.1:2",
                answers=False,
                drained=True,
                fault="its report cannot be read",
                clock_ahead_s=7.5,
            ),
        ),
        sessions=3,
        waiting=2,
        ready="yes",
        plan_note="half of the demand",
        readiness=ReadinessStatus(("beta lost",), 2, 1.5),
        spent=TimeByNode(1.0, 2.0, 3.0, 4),
        emulation_warning="this machine is busy",
        cached_tokens=40,
    )


def test_before_the_first_epoch_the_status_has_no_placement() -> None:
    status = shown(None)
    assert (status.epoch, status.placement, status.action, status.predicted_latency_s, status.plan_note) == (
        0, None, None, None, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/decisions"),
        ("PUT", "/moves"),
        ("POST", "/proposals"),
        ("PUT", "/fast_loop"),
        ("PUT", "/cluster"),
        ("POST", "/emulation/node"),
    ],
)
async def test_every_body_is_read_strictly(method: str, path: str) -> None:
    nothing: Any = MagicMock()  # no part is reached
    app = create_control_api(nothing, nothing, nothing, "secret")
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control", headers=headers) as api:
        answer = await api.request(method, path, content=b'{"a": NaN}')
    assert answer.status_code == 422
    assert "a number that is not finite, or too large" in answer.json()["error"]["message"]
