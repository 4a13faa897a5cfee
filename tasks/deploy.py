"""Deploy: propose a placement to the controller, which alone writes epochs."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.cluster.state import proposal_of
from resplit.decide import Decision
from resplit.epochs import Proposal
from resplit.types import Plan


@task(name="deploy plan", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def deploy_plan(client: ControlClient, plan: Plan, based_on: int) -> int:
    """Deploy a first plan; the epoch that is live then."""
    return client.propose(proposal_of(plan, "initial", based_on)).epoch


# No retry: a proposal that was refused is outdated, and the next tick makes a fresh one.
@task(name="deploy decision", cache_policy=NO_CACHE)
def deploy_decision(client: ControlClient, decision: Decision, based_on: int) -> int:
    """Deploy what was decided; the epoch that is live then."""
    chosen = decision.chosen
    proposal = Proposal(decision.placement, decision.action, based_on, chosen.latency_s, chosen.lower_bound)
    return client.propose(proposal).epoch
