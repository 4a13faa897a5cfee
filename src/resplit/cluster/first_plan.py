"""The placement problem for a running cluster, and its first plan: profile, fit, plan, deploy.

Uses the same cost and planner code as the flows. A first plan needs no workflow engine.
"""

from __future__ import annotations

import time
from dataclasses import replace

import structlog

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import ClusterConfig
from resplit.control.planning import context_warning, without
from resplit.cost import CostModel, fit_cost_model, node_readings, problem_from
from resplit.decide import DecisionOutcome, History, Settings, decide
from resplit.epochs import Proposal
from resplit.errors import InfeasibleError
from resplit.files import write_atomically
from resplit.planner.best_effort import BestEffortPlan, solve_best_effort
from resplit.status import ModelStatus
from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures, Problem, segments_of

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
        node_readings(telemetry.nodes),
        client.demand(window_s),
        live.placement,
        live.lost,
    )
    client.set_problem(problem, cost)
    return without(problem, live.drained)


def first_plan(cluster: Cluster) -> str:
    """Profile a fresh cluster, plan for the declared demand and deploy. Returns the placement in one line.

    InfeasibleError, with the planner's reason, if no placement is possible.
    """
    with ControlClient(cluster.url, cluster.token) as client:
        live, _, posed = _measured(cluster, client, since_s=0.0)
        _warn_of_context(posed, cluster.config)
        found = plan_or_fail(posed)
        client.propose(proposal_of(found, "initial", live.epoch))
    assert found.plan.placement is not None
    return describe(found.plan.placement, live.features)


def _warn_of_context(problem: Problem, cluster: ClusterConfig) -> None:
    """Say on this terminal what the controller says in its log: a context that takes longer than the deadline."""
    if warning := context_warning(problem, cluster.limits.context_tokens, cluster.limits.deadline):
        _log.warning(warning)


def measure_again(cluster: Cluster) -> None:
    """Profile a cluster that was measured on a busy machine, and move to a better placement if there is one.

    The decision is logged. ResplitError if the controller does not answer, or another epoch went live meanwhile.
    """
    with ControlClient(cluster.url, cluster.token) as client:
        live, cost, posed = _measured(cluster, client, since_s=time.time())
        if posed.current is None:
            return
        decision = decide(
            posed, now_s=time.time(), settings=Settings(), history=History(), uncertainty=cost.uncertainty
        )
        if decision.action != "keep":
            deployed = client.propose(decision.proposal(live.epoch)).epoch
            decision = replace(decision, outcome=DecisionOutcome(deployed=deployed))
        client.log_decision(decision)
        _log.info("nodes were timed again on a quiet machine", action=decision.action, reason=decision.reason)


def _measured(cluster: Cluster, client: ControlClient, since_s: float) -> tuple[ModelStatus, CostModel, Problem]:
    """Profile the cluster, and keep the cost model fitted to the telemetry from `since_s` on (seconds since 1970)."""
    client.profile()
    telemetry, live = client.telemetry(since_s), client.model()
    cost = fit_cost_model(telemetry, live.features)
    # The control loop reads this file and continues from it.
    write_atomically(cluster.state / "cost.json", cost.to_json())
    return live, cost, problem_now(client, cluster.config, cost, telemetry, live, 1.0)


def plan_or_fail(problem: Problem) -> BestEffortPlan:
    """A plan for as much of the demand as can be served; InfeasibleError with the reason if there is none."""
    found = solve_best_effort(problem)
    if found.plan.placement is None:
        raise InfeasibleError(f"no placement: {found.plan.reason}")
    if found.note:
        _log.warning("the cluster cannot serve the whole demand within its ceilings", note=found.note)
    return found


def proposal_of(found: BestEffortPlan, action: str, based_on: int) -> Proposal:
    """A plan as a proposal to the controller."""
    plan = found.plan
    return Proposal(
        placement=plan.placement or (),
        action=action,
        based_on=based_on,
        predicted_latency_s=plan.terms.latency_s if plan.terms else None,
        lower_bound=plan.lower_bound,
        note=found.note,
    )


def describe(placement: tuple[str, ...], features: tuple[BlockFeatures, ...]) -> str:
    """A placement in one line: which blocks are on which node."""
    return " -> ".join(
        f"{segment.node}[{features[segment.first].name}..{features[segment.last].name}]"
        for segment in segments_of(placement)
    )
