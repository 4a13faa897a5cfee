"""Observe: the cluster's telemetry and live state, from the controller."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.status import ModelStatus
from resplit.telemetry import Telemetry


@task(name="profile", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def profile(client: ControlClient) -> Telemetry:
    """Have every node time its blocks and links, and take all telemetry there is."""
    client.profile()
    return client.telemetry(0.0)


@task(name="observe", retries=1, retry_delay_seconds=0.5, cache_policy=NO_CACHE)
def observe(client: ControlClient, since_s: float) -> tuple[Telemetry, ModelStatus]:
    """Telemetry not older than `since_s` (seconds since 1970), and what is live."""
    return client.telemetry(since_s), client.model()
