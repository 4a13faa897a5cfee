"""The placement problem for a running cluster, and its first plan: profile, fit, plan, deploy.

Uses the same cost and planner code as the flows. A first plan needs no workflow engine.
"""

from __future__ import annotations

import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import ClusterConfig
from resplit.control.planning import without
from resplit.cost import CostModel, fit_cost_model, node_states, problem_from
from resplit.epochs import Proposal
from resplit.errors import InfeasibleError
from resplit.files import write_atomically
from resplit.planner.partial_demand import solve_partial_demand
from resplit.status import ModelStatus
from resplit.telemetry import Telemetry
from resplit.types import BlockFeatures, Plan, Problem, segments_of

_log = structlog.get_logger(__name__)


def problem_now(
    client: ControlClient,
    cluster: ClusterConfig,
    cost: CostModel,
    telemetry: Telemetry,
    live: ModelStatus,
    window_s: float,
) -> Problem:
    """The placement problem for the cluster's present state and the demand of the last `window_s` seconds.

    The controller gets the problem with the drained nodes, because they may join again before the next problem. The
    returned problem is without them.
    """
    problem = problem_from(
        cost,
        live.features,
        cluster,
        node_states(telemetry.nodes),
        client.demand(window_s),
        live.placement,
        live.lost,
    )
    client.set_problem(problem)
    return without(problem, live.drained)


def first_plan(cluster: Cluster) -> str:
    """Profile a fresh cluster, plan for the declared demand and deploy. Returns the placement in one line.

    InfeasibleError, with the planner's reason, if no placement is possible.
    """
    with ControlClient(cluster.url, cluster.token) as client:
        client.profile()
        telemetry, live = client.telemetry(0.0), client.model()
        cost = fit_cost_model(telemetry, live.features)
        # The control loop reads this file and continues from it.
        write_atomically(cluster.state / "cost.json", cost.to_json())
        plan = plan_or_fail(problem_now(client, cluster.config, cost, telemetry, live, 1.0))
        client.propose(proposal_of(plan, "initial", live.epoch))
    assert plan.placement is not None
    return describe(plan.placement, live.features)


def plan_or_fail(problem: Problem) -> Plan:
    """A plan for as much of the demand as can be served; InfeasibleError with the reason if there is none."""
    plan, share = solve_partial_demand(problem)
    if plan.placement is None:
        raise InfeasibleError(f"no placement: {plan.reason}")
    if share < 1:
        _log.warning(
            "the cluster can serve only a part of the declared demand; requests beyond it get 429", share=share
        )
    return plan


def proposal_of(plan: Plan, action: str, based_on: int) -> Proposal:
    """A plan as a proposal to the controller."""
    return Proposal(
        placement=plan.placement or (),
        action=action,
        based_on=based_on,
        predicted_latency_s=plan.terms.latency_s if plan.terms else None,
        lower_bound=plan.lower_bound,
    )


def describe(placement: tuple[str, ...], features: tuple[BlockFeatures, ...]) -> str:
    """A placement in one line: which blocks are on which node."""
    return " -> ".join(
        f"{segment.node}[{features[segment.first].name}..{features[segment.last].name}]"
        for segment in segments_of(placement)
    )
