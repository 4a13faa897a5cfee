"""What the control API tells of a cluster, and how it emulates links."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
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
from resplit.control.planning import load_problem
from resplit.decide import Ready, Settings
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import ConfigError, DataError, NodeLostError, ResplitError
from resplit.estimate import RECORDING
from resplit.pass_times import TimeByNode
from resplit.policies import Policy, make_policy
from resplit.problem import problem_to_json
from resplit.status import ClusterStatus, GatewayStatus, NodeStatus, ReadinessStatus, ReportedState
from resplit.wire.addresses import Address
from resplit.wire.commands import Emulate
from resplit.wire.emulated_link import Shape
from resplit.wire.routes import Route
from tests.support.cluster_file import cluster
from tests.support.constant_passes import constant_model
from tests.support.controllers import FIRST, REQUEST, SECOND, operator_of, served
from tests.support.in_process import InProcessCluster, deploy
from tests.support.latest_problem import problem_of
from tests.support.three_nodes import A, B, C, three_node_config


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
    proposal = Proposal(tuple(FIRST), "re-split", 0, 0.25, note="half of the demand")
    assert (await api.post("/proposals", json=asdict(proposal))).json()["epoch"] == 1
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
    assert (model["epoch"], model["placement"], model["lost"]) == (2, status["placement"], [C])
    assert model["drained"] == [C]
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
    armed: list[tuple[Policy, Settings, float]] = []
    controller.fast_loop.arm = lambda *how: armed.append(how)
    refused = await api.put("/fast_loop", json={"policy": "os:system", "settings": {}, "for_s": 60})
    assert refused.status_code == 422
    assert "is not one of" in refused.json()["error"]["message"]
    assert (await api.put("/fast_loop", json={"settings": {}, "for_s": -1})).status_code == 422
    assert armed == []
    settings = {"horizon_s": 99.0}
    assert (await api.put("/fast_loop", json={"policy": "static", "settings": settings, "for_s": 60})).json() == {}
    ((policy, how, for_s),) = armed
    assert (type(policy), how, for_s) == (type(make_policy("static")), Settings(horizon_s=99.0), 60.0)


async def test_a_problem_is_planned_with_and_its_cost_model_is_compared_with(
    api: httpx.AsyncClient, controller: Controller, nodes: InProcessCluster
) -> None:
    problem, cost = problem_to_json(problem_of(nodes.config, nodes.features, SECOND)), constant_model()
    assert (await api.post("/problem", json={"problem": problem, "cost": asdict(cost)})).json() == {}
    latest = load_problem(nodes.folder / "latest_problem.json")
    assert latest is not None
    assert problem_to_json(latest) == problem
    recording = RECORDING.validate_json((await api.get("/observations")).content)
    assert [seen.cost for seen in recording.observations] == [cost]
    assert (await api.post("/problem", json={"problem": problem})).json() == {}
    assert RECORDING.validate_json((await api.get("/observations")).content) == recording
    assert set((await api.get("/estimates")).json()["rates_rps"]) == {"chat"}


async def test_records_are_told_from_a_number_on_and_problems_by_the_epoch_that_was_planned_for_them(
    api: httpx.AsyncClient, controller: Controller, nodes: InProcessCluster
) -> None:
    await deploy(controller, FIRST)
    for new_tokens in (2, 3):
        await served(nodes, replace(REQUEST, max_new_tokens=new_tokens))
    counts = [each["new_tokens"] for each in (await api.get("/records")).json()]
    assert counts == [2, 3]
    assert [each["new_tokens"] for each in (await api.get("/records", params={"skip": 1})).json()] == [3]
    problem = problem_of(nodes.config, nodes.features, FIRST)
    controller.fast_loop.posed[1] = problem
    assert (await api.get("/problems/1")).json() == {"problem": problem_to_json(problem)}
    assert (await api.get("/problems/2")).json() == {"problem": None}


async def test_the_history_of_moves_is_replaced_and_extended(api: httpx.AsyncClient) -> None:
    move = {"at_s": 5.0, "action": "re-split", "before": [A], "after": [B], "latency_before_s": 1.0}
    move |= {"predicted_before_s": 2.0}
    assert (await api.post("/moves", json={"move": move, "settings": {}})).json() == {}
    history = (await api.get("/moves")).json()
    assert (history["last"]["at_s"], history["last"]["after"]) == (5.0, [B])
    assert (await api.put("/moves", json=history | {"last": None})).json() == {}
    assert (await api.get("/moves")).json() == history | {"last": None}


async def test_an_operator_is_told_the_changes_in_words(api: httpx.AsyncClient, nodes: InProcessCluster) -> None:
    file = (await api.get("/cluster")).json()
    assert [node["name"] for node in file["nodes"]] == [A, B, C]
    for method, path, body, change in [
        ("POST", f"/nodes/{C}/drain", None, "gamma is drained"),
        ("POST", f"/nodes/{C}/join", None, "gamma is used again"),
        ("POST", f"/nodes/{C}/trust", {"on": True}, "gamma is trusted"),
        ("POST", f"/nodes/{C}/trust", {"on": False}, "gamma is not trusted any more"),
        ("PUT", "/cluster", file | {"trusted": [A]}, "beta is not trusted any more"),
    ]:
        assert (await api.request(method, path, json=body)).json() == {"changes": [change]}


async def test_the_placements_that_stand_ready_are_told(api: httpx.AsyncClient, controller: Controller) -> None:
    controller.readiness.ready = lambda: Ready((tuple(SECOND),), frozenset({(3, C)}))
    assert (await api.get("/ready")).json() == {"placements": [SECOND], "loaded": [[3, C]]}


async def test_emulated_hardware_changes_where_the_call_says(
    api: httpx.AsyncClient, controller: Controller, nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: list[tuple[Any, ...]] = []

    async def emulate(node: str, change: Emulate) -> None:
        changed.append((node, change))

    async def kill(node: str) -> None:
        changed.append((node, "killed"))

    emulated = three_node_config(links={"default": {"latency": "9 ms", "bandwidth": "8 Mbit/s"}})
    monkeypatch.setattr(controller.view, "cluster", emulated)
    monkeypatch.setattr(controller.view.gateway, "set_link", lambda *link: changed.append(("gateway", *link)))
    monkeypatch.setattr(controller.membership, "emulate", emulate)
    monkeypatch.setattr(controller.membership, "kill", kill)

    async def after(call: str, body: dict[str, Any]) -> list[tuple[Any, ...]]:
        changed.clear()
        assert (await api.post(f"/emulation/{call}", json=body)).json() == {}
        return changed

    body = {"node": B, "slowdown": 2.0, "background_utilization": 0.5}
    assert await after("node", body) == [(B, Emulate(2.0, 0.5))]
    assert await after("kill", {"node": B}) == [(B, "killed")]
    shape = Shape(0.5, 1e6)
    between_nodes = [(B, Emulate(links={C: shape})), (C, Emulate(links={B: shape}))]
    assert await after("link", {"between": [B, C], "latency_s": 0.5}) == between_nodes
    for one, other in ((A, B), (B, A)):
        ends = [(one, Emulate(links={other: shape})), (other, Emulate(links={one: shape})), ("gateway", B, shape)]
        assert await after("link", {"between": [one, other], "latency_s": 0.5}) == ends


async def test_a_call_on_a_node_that_is_unknown_or_real_hardware_is_refused(api: httpx.AsyncClient) -> None:
    shape = {"latency_s": 0.1, "bandwidth_bytes_per_s": 1e6}
    for call, body in [
        ("kill", {"node": "attic"}),
        ("node", {"node": "attic", "slowdown": 2}),
        ("node", {"node": A, "slowdown": 2}),
        ("link", {"between": [A, "attic"], **shape}),
        ("link", {"between": ["attic", A], **shape}),
        ("link", {"between": [A, A], **shape}),
    ]:
        answer = await api.post(f"/emulation/{call}", json=body)
        assert answer.status_code == 409, (body, answer.text)
    real = await api.post("/emulation/node", json={"node": A, "slowdown": 2})
    assert "alpha is real hardware" in real.json()["error"]["message"]


async def test_a_proposal_that_breaks_a_rule_is_refused_with_the_reason(api: httpx.AsyncClient) -> None:
    refused = await api.post("/proposals", json={"placement": ["nobody"] * 8, "action": "initial", "based_on": 0})
    assert refused.status_code == 409
    assert "no node is called 'nobody'" in refused.json()["error"]["message"]


async def test_decisions_that_a_flow_logs_are_told_from_a_number_on(api: httpx.AsyncClient) -> None:
    assert (await api.post("/decisions", json={"at_s": 1.0, "action": "keep", "reason": "calm"})).json() == {}
    (entry,) = (await api.get("/decisions")).json()
    assert (entry["id"], entry["action"], entry["reason"]) == (1, "keep", "calm")
    assert (await api.get("/decisions", params={"since": 1})).json() == []


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


@pytest.fixture
def border() -> httpx.AsyncClient:
    """A client of an API whose requests reach no part of a controller."""
    app = create_control_api(*[MagicMock()] * 3, "secret")
    headers = {"Authorization": "Bearer secret"}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://control", headers=headers)


@pytest.mark.parametrize("wrong", ["", "Bearer ", "Bearer secret2", "secret", "Bearer gehëim".encode()])
async def test_every_call_needs_the_token(border: httpx.AsyncClient, wrong: str | bytes) -> None:
    for path in ("/status", "/model", "/telemetry", "/records", "/epochs", "/decisions", "/docs", "/nothing"):
        assert (await border.get(path, headers={"Authorization": wrong})).status_code == 401
    assert (await border.post("/proposals", json={}, headers={"Authorization": wrong})).status_code == 401


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_there_is_no_page_that_loads_scripts_from_elsewhere(border: httpx.AsyncClient, path: str) -> None:
    assert (await border.get(path)).status_code == 404


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
async def test_every_body_is_read_strictly(border: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await border.request(method, path, content=b'{"a": NaN}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert "a number that is not finite, or too large" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "rule"),
    [
        ("/proposals", {"placement": [A], "action": "initial", "based_on": -1}, "based_on: Input should be greater"),
        ("/proposals", {"placement": [A], "surprise": 1}, "action: Field required"),
        ("/decisions", {"action": "keep"}, "at_s: Field required"),
        ("/emulation/node", {"node": A, "slowdown": 0}, "slowdown: Input should be greater than 0"),
    ],
)
async def test_a_body_that_breaks_its_schema_is_refused_with_the_place(
    border: httpx.AsyncClient, path: str, body: dict[str, Any], rule: str
) -> None:
    answer = await border.post(path, json=body)
    assert answer.status_code == 422
    assert answer.json()["error"]["message"].startswith(f"body.{rule}")


@pytest.mark.parametrize(
    "query", ["records?skip=-1", "decisions?since=1e99", "demand?window_s=-10", "demand?window_s=nan"]
)
async def test_an_impossible_number_is_refused(border: httpx.AsyncClient, query: str) -> None:
    assert (await border.get(f"/{query}")).status_code == 422
