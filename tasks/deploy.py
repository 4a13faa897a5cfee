"""Deploy: propose a placement to the controller, which checks it and writes the epoch."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import proposal_of
from resplit.decide import Decision
from resplit.epochs import LiveEpoch
from resplit.planner.best_effort import BestEffortPlan


@task(name="deploy plan", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def deploy_plan(client: ControlClient, plan: BestEffortPlan, based_on: int) -> int:
    """Deploy a first plan; returns the new epoch."""
    return client.propose(proposal_of(plan, "initial", based_on)).epoch


# No retry: a refused proposal is outdated, and the next tick makes a new one.
@task(name="deploy decision", cache_policy=NO_CACHE)
def deploy_decision(client: ControlClient, decision: Decision, based_on: int) -> LiveEpoch:
    """Deploy the placement of a decision, which was made under epoch `based_on`."""
    return client.propose(decision.proposal(based_on))
