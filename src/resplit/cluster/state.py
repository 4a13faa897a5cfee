"""From a cluster that runs to one that serves: profile, fit, plan, deploy; and the problem as it stands at any time.

Uses the same cost and planner code as the flows, without them: a first plan needs no pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import ClusterConfig
from resplit.control.planning import without
from resplit.cost import CostModel, fit_cost_model, node_states, problem_from
from resplit.errors import InfeasibleError
from resplit.files import write_atomically
from resplit.planner.partial_demand import solve_partial_demand
from resplit.telemetry import Telemetry
from resplit.types import BlockFeatures, Plan, Problem, RequestClass, segments_of

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Live:
    """What the controller runs now, the nodes that do not answer, and those that are to run nothing."""

    epoch: int
    placement: tuple[str, ...] | None
    features: tuple[BlockFeatures, ...]
    lost: tuple[str, ...]
    drained: tuple[str, ...] = ()

    @property
    def unused(self) -> tuple[str, ...]:
        """The nodes that no plan can use."""
        return (*self.lost, *self.drained)


def live_of(client: ControlClient) -> Live:
    """The model's blocks, and the placement that is live."""
    model = client.model()
    features = tuple(BlockFeatures(**block) for block in model["features"])
    placement = tuple(model["placement"]) if model["placement"] else None
    return Live(model["epoch"], placement, features, tuple(model["lost"]), tuple(model["drained"]))


def problem_now(
    client: ControlClient,
    cluster: ClusterConfig,
    cost: CostModel,
    telemetry: Telemetry,
    live: Live,
    window_s: float,
) -> Problem:
    """The placement problem for the cluster's present state and the demand of the last `window_s` seconds.

    The controller is given it as well, but for who is drained: that may end before the next one.
    """
    classes = [RequestClass(**seen) for seen in client.demand(window_s)]
    problem = problem_from(
        cost, live.features, cluster, node_states(telemetry.nodes), classes, live.placement, live.lost
    )
    client.set_problem(problem)
    return without(problem, live.drained)


def first_plan(cluster: Cluster) -> str:
    """Profile a fresh cluster, plan for the declared demand and deploy; a short description of the placement.

    InfeasibleError, with the planner's reason, where the model fits nowhere.
    """
    with ControlClient(cluster.url, cluster.token) as client:
        client.profile()
        telemetry = Telemetry.from_rows(client.telemetry(0.0))
        live = live_of(client)
        cost = fit_cost_model(telemetry, live.features)
        # Where the control loop looks for the model that it goes on from.
        write_atomically(cluster.state / "cost.json", cost.to_json())
        plan = plan_or_fail(problem_now(client, cluster.config, cost, telemetry, live, 1.0))
        client.propose(proposal_of(plan, "initial", live.epoch))
    assert plan.placement is not None
    return describe(plan.placement, live.features)


def plan_or_fail(problem: Problem) -> Plan:
    """A plan, for the part of the demand that can be carried; InfeasibleError with the reason where there is none."""
    plan, share = solve_partial_demand(problem)
    if plan.placement is None:
        raise InfeasibleError(f"no placement: {plan.reason}")
    if share < 1:
        _log.warning("the cluster carries a part of the declared demand; expect refusals (429) beyond it", share=share)
    return plan


def proposal_of(plan: Plan, action: str, based_on: int) -> dict[str, object]:
    """A plan as the controller takes it."""
    return {
        "placement": list(plan.placement or ()),
        "action": action,
        "based_on": based_on,
        "predicted_latency_s": plan.terms.latency_s if plan.terms else None,
        "lower_bound": plan.lower_bound,
    }


def describe(placement: tuple[str, ...], features: tuple[BlockFeatures, ...]) -> str:
    """A placement in one line: which blocks where."""
    return " -> ".join(
        f"{segment.node}[{features[segment.first].name}..{features[segment.last].name}]"
        for segment in segments_of(placement)
    )
