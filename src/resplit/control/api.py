"""The control API: flows and operators observe, propose and operate over HTTP, with a token.

Translates between JSON and the controller's parts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from resplit.config import ClusterConfig
from resplit.control.cluster_view import ClusterView
from resplit.control.controller import Controller
from resplit.control.invalid_requests import invalid_request
from resplit.control.monitor import Monitor
from resplit.control.operations import Operator
from resplit.control.token_gate import TokenGate
from resplit.cost.model import CostModel
from resplit.decide import Decision, History, PastMove, Ready, Settings
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import ConfigError, ResplitError, http_status
from resplit.estimate import RECORDING, Estimates
from resplit.policies import POLICIES, make_policy
from resplit.problem import problem_from_json, problem_to_json
from resplit.session_records import SessionRecord
from resplit.status import ClusterStatus, ModelStatus, NodeStatus, ReportedState
from resplit.strict_json import StrictRoute
from resplit.telemetry.rows import TelemetryRows
from resplit.types import RequestClass
from resplit.wire.commands import Emulate
from resplit.wire.emulated_link import Shape

_Index = Annotated[int, Query(ge=0, lt=2**63)]
_Seconds = Annotated[float, Query(ge=0, allow_inf_nan=False)]


def _shipped(policy: str) -> str:
    """The name of a policy of resplit; ValueError for others. A caller must not choose which code is imported."""
    if policy not in POLICIES:
        raise ValueError(f"is not one of {', '.join(POLICIES)}")
    return policy


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Done(_Body):
    """The reply of a call that only does something."""


class TrustBody(_Body):
    """Whether a node is trusted from now on."""

    on: bool


class ProblemBody(_Body):
    """The latest problem, and the cost model with which it was posed, both as JSON."""

    problem: dict[str, Any]
    cost: dict[str, Any] | None = None


class FastLoopBody(_Body):
    """How the fast loop decides, and for how many seconds from now; 0 stops it."""

    policy: Annotated[str, AfterValidator(_shipped)] = "resplit"
    settings: Settings
    for_s: Annotated[float, Field(ge=0, le=3600)]


class MoveBody(_Body):
    """A move that was deployed, and the settings with which it was decided."""

    move: PastMove
    settings: Settings


class NodeEmulationBody(_Body):
    """A change of an emulated node; None leaves a value as it is."""

    node: str
    slowdown: Annotated[float, Field(gt=0)] | None = None
    background_utilization: Annotated[float, Field(ge=0, lt=1)] | None = None


class LinkEmulationBody(_Body):
    """A change of an emulated link, in both directions; None sets what the cluster file declares."""

    between: tuple[str, str]
    latency_s: Annotated[float, Field(ge=0)] | None = None
    bandwidth_bytes_per_s: Annotated[float, Field(gt=0)] | None = None


class KillBody(_Body):
    """The emulated node whose process is to end at once."""

    node: str


def create_control_api(controller: Controller, operator: Operator, monitor: Monitor, token: str) -> FastAPI:
    """The application that answers below `/control`; every call needs the bearer token."""

    api = FastAPI(title="resplit control", docs_url=None, redoc_url=None)
    api.add_middleware(TokenGate, token=token)
    for router in (
        _present(controller, monitor),
        _past(controller),
        _decisions(controller),
        _planning(controller, monitor),
        _operation(operator),
        _emulation(controller),
    ):
        api.include_router(router)
    api.add_exception_handler(ResplitError, _error_response)
    api.add_exception_handler(RequestValidationError, invalid_request)
    return api


def _present(controller: Controller, monitor: Monitor) -> APIRouter:
    """Calls that read the present state of the cluster."""
    router, view = APIRouter(), controller.view

    @router.get("/status")
    async def status() -> ClusterStatus:
        return _cluster_status(controller, monitor)

    @router.get("/model")
    async def model() -> ModelStatus:
        live = controller.live
        return ModelStatus(
            name=view.model.name,
            note=view.model.note,
            features=view.rules.features,
            epoch=live.epoch if live else 0,
            placement=live.placement if live else None,
            lost=tuple(view.unreachable),
            drained=tuple(sorted(view.rules.drained)),
        )

    @router.get("/telemetry")
    async def telemetry(since_s: _Seconds = 0.0) -> TelemetryRows:
        return monitor.rows(since_s)

    @router.get("/demand")
    async def demand(window_s: _Seconds = 30.0) -> list[RequestClass]:
        return view.gateway.demand(window_s)

    @router.get("/estimates")
    async def estimates() -> Estimates:
        return controller.fast_loop.estimates()

    @router.get("/ready")
    async def ready() -> Ready:
        return controller.readiness.ready()

    return router


def _past(controller: Controller) -> APIRouter:
    """Calls that read what happened since the controller started."""
    router = APIRouter()

    @router.get("/records")
    async def records(skip: _Index = 0) -> list[SessionRecord]:
        return controller.view.gateway.records(skip)

    @router.get("/epochs")
    async def epochs() -> list[LiveEpoch]:
        return controller.deployment.history

    @router.get("/observations")
    async def observations() -> Response:
        # Written here: the framework's JSON has no NaN.
        return Response(RECORDING.dump_json(controller.fast_loop.recording()), media_type="application/json")

    @router.get("/problems/{epoch}")
    async def problem_of(epoch: int) -> dict[str, Any]:
        posed = controller.fast_loop.posed.get(epoch)
        return {"problem": problem_to_json(posed) if posed else None}

    return router


def _decisions(controller: Controller) -> APIRouter:
    """Calls that read and extend the decision log and the history of moves."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/decisions")
    async def decisions(since: _Index = 0) -> list[dict[str, Any]]:
        return [decision.to_json() for decision in controller.decisions(since)]

    @router.post("/decisions")
    async def log_decision(decision: Decision) -> Done:
        controller.log.append_decision(decision)
        return Done()

    @router.get("/moves")
    async def moves() -> History:
        return controller.moves.history

    @router.put("/moves")
    async def set_moves(history: History) -> Done:
        controller.moves.set(history)
        return Done()

    @router.post("/moves")
    async def add_move(body: MoveBody) -> Done:
        controller.moves.moved(body.move, body.settings)
        return Done()

    return router


def _planning(controller: Controller, monitor: Monitor) -> APIRouter:
    """Calls of flows: profile, set the latest problem, arm the fast loop, propose a placement."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/profile")
    async def profile() -> Done:
        await controller.membership.introduce()
        await controller.membership.profile()
        for name in controller.view.reachable:
            await monitor.poll(name)
        return Done()

    @router.post("/problem")
    async def set_problem(body: ProblemBody) -> Done:
        cost = CostModel.from_plain(body.cost) if body.cost else None
        controller.planner.set_problem(problem_from_json(body.problem))
        if cost:
            controller.fast_loop.set_model(cost)
        return Done()

    @router.put("/fast_loop")
    async def arm(body: FastLoopBody) -> Done:
        controller.fast_loop.arm(make_policy(body.policy), body.settings, body.for_s)
        return Done()

    @router.post("/proposals")
    async def propose(proposal: Proposal) -> LiveEpoch:
        return await controller.deploy(proposal)

    return router


def _operation(operator: Operator) -> APIRouter:
    """Calls of operators: change the cluster file or single nodes. Each returns the changes in words."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/cluster")
    async def cluster() -> dict[str, Any]:
        return dict(operator.desired.effective)

    @router.put("/cluster")
    async def apply(content: dict[str, Any]) -> dict[str, list[str]]:
        return {"changes": await operator.apply(content)}

    @router.post("/nodes/{node}/drain")
    async def drain(node: str) -> dict[str, list[str]]:
        return {"changes": await operator.drain(node)}

    @router.post("/nodes/{node}/join")
    async def join(node: str) -> dict[str, list[str]]:
        return {"changes": await operator.join(node)}

    @router.post("/nodes/{node}/trust")
    async def trust(node: str, body: TrustBody) -> dict[str, list[str]]:
        return {"changes": await operator.trust(node, body.on)}

    return router


def _emulation(controller: Controller) -> APIRouter:
    """Calls that change emulated nodes and links."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/emulation/node")
    async def emulate_node(body: NodeEmulationBody) -> Done:
        await controller.membership.emulate(body.node, Emulate(body.slowdown, body.background_utilization))
        return Done()

    @router.post("/emulation/link")
    async def emulate_link(body: LinkEmulationBody) -> Done:
        one, other = body.between
        shape = _link_shape(controller.view.cluster, body)
        await controller.membership.emulate(one, Emulate(links={other: shape}))
        await controller.membership.emulate(other, Emulate(links={one: shape}))
        if controller.view.cluster.source in body.between:
            node = other if one == controller.view.cluster.source else one
            controller.view.gateway.set_link(node, shape)
        return Done()

    @router.post("/emulation/kill")
    async def kill_node(body: KillBody) -> Done:
        await controller.membership.kill(body.node)
        return Done()

    return router


def _link_shape(cluster: ClusterConfig, body: LinkEmulationBody) -> Shape:
    """The shape that a link is to have; ConfigError if the links of this cluster are real."""
    declared = cluster.link(*body.between)
    if declared is None:
        raise ConfigError(" and ".join(body.between), "the links of this cluster are real, or this is one node")
    latency_s = declared.latency if body.latency_s is None else body.latency_s
    return Shape(latency_s, body.bandwidth_bytes_per_s or declared.bandwidth)


async def _error_response(request: Request, error: Exception) -> JSONResponse:
    # The client reads 409 as "refused, plan again". A lost node is 503: another plan would not help.
    status = 503 if http_status(error) == 503 else 409
    return JSONResponse({"error": {"message": str(error), "type": type(error).__name__}}, status)


def _cluster_status(controller: Controller, monitor: Monitor) -> ClusterStatus:
    live, view = controller.live, controller.view
    newest = controller.deployment.history[-1] if controller.deployment.history else None
    return ClusterStatus(
        cluster=view.cluster.name,
        model=view.model.name,
        note=view.model.note,
        blocks=tuple(block.name for block in view.rules.features),
        epoch=live.epoch if live else 0,
        placement=live.placement if live else None,
        action=newest.action if newest else None,
        predicted_latency_s=newest.predicted_latency_s if newest else None,
        plan_note=newest.note if newest else "",
        emulation_warning=controller.emulation_warning(),
        readiness=controller.readiness.status(),
        spent=controller.spent,
        nodes=tuple(_node_status(view, monitor, name) for name in view.addresses),
        **vars(view.gateway.status()),
    )


def _node_status(view: ClusterView, monitor: Monitor, name: str) -> NodeStatus:
    state = replace(monitor.states.get(name, ReportedState(name, pid=None)), trusted=name in view.cluster.trusted)
    return NodeStatus(
        **vars(state),
        address=str(view.addresses[name]),
        answers=name in view.gateway.connected_nodes(),
        drained=name in view.rules.drained,
        fault=view.gateway.faults().get(name),
        clock_ahead_s=view.gateway.clocks_ahead_s().get(name, 0.0),
    )
