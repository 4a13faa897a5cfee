"""Observe: read telemetry and the live state from the controller."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.cluster.client import ControlClient
from resplit.status import ModelStatus
from resplit.telemetry.tables import Telemetry


@task(name="profile", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)
def profile(client: ControlClient) -> Telemetry:
    """Have every node time its blocks and links; returns all telemetry."""
    client.profile()
    return client.telemetry(0.0)


@task(name="observe", retries=1, retry_delay_seconds=0.5, cache_policy=NO_CACHE)
def observe(client: ControlClient, since_s: float) -> tuple[Telemetry, ModelStatus]:
    """Telemetry from `since_s` on (seconds since 1970), and the live state."""
    return client.telemetry(since_s), client.model()
