"""Measure: serve a workload, and make a `RunRecord` of the cluster's reports about it."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.config import ClusterConfig
from resplit.cost import CostModel
from resplit.estimate.error import EstimateErrors, estimate_errors
from resplit.phases import phases_of
from resplit.recording import Observed, run_record
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig
from resplit.workload import ScheduledRequest
from tasks.workload import Sent, send


@task(name="serve workload", cache_policy=NO_CACHE)
def serve_workload(
    cluster: Cluster,
    model: str,
    requests: list[ScheduledRequest],
    scenario: ScenarioConfig,
    start_s: float,
    streams: int,
) -> Sent:
    """Send a workload, from `start_s` on (seconds since 1970), while the cluster changes on schedule; see `send`."""
    return send(cluster, model, requests, scenario, start_s, streams)


@task(name="errors of the estimate", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def measure_estimate(
    client: ControlClient, cluster: ClusterConfig, scenario: ScenarioConfig, cost: CostModel
) -> EstimateErrors:
    """The errors of the estimate at the end of a scenario, whose last phase still holds. It is relative to `cost`."""
    last = phases_of(cluster, scenario)[-1]
    return estimate_errors(cluster, client.model().features, cost, client.estimates(), last)


@task(name="measure", retries=1, retry_delay_seconds=1, cache_policy=NO_CACHE)
def measure(
    client: ControlClient,
    cluster: ClusterConfig,
    scenario: ScenarioConfig,
    policy: str,
    seed: int,
    sent: Sent,
    first_record: int,
    last_decision: int,
    foreseen_s: tuple[float, ...] = (),
    errors: EstimateErrors | None = None,
) -> RunRecord:
    """The record of the run `sent`.

    Session records before `first_record` and decisions up to the one numbered `last_decision` belong to earlier runs.
    At the changes at `foreseen_s` a policy that knows the scenario moves. `errors` are the estimate's at its end.
    """
    status = client.status()
    observed = Observed(
        start_s=sent.start_s,
        sessions=client.records(first_record),
        failed_connections=sent.failed_connections,
        node_reports=client.telemetry(sent.start_s).nodes,
        epochs=client.epochs(),
        decisions=tuple(client.decisions(last_decision)),
        blocks=status.blocks,
        nodes=status.nodes,
        foreseen_s=foreseen_s,
        estimate_errors=errors.medians() if errors else {},
    )
    return run_record(observed, cluster, scenario, policy, seed)
