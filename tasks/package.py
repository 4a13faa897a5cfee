"""Package: seal the model's blocks as shards in the registry of a state folder."""

from __future__ import annotations

from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from resplit.config import ClusterConfig
from resplit.model.source import StoredModel, obtain
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package as seal_blocks
from resplit.shards.registry import Registry


@task(name="obtain model", retries=1, retry_delay_seconds=5, cache_policy=NO_CACHE)
def obtain_model(model: str, state: Path, cluster: ClusterConfig) -> StoredModel:
    """The model as one file for each block, fetched and converted the first time only."""
    return obtain(model, state / "models", cluster.weights, cluster.split, cluster.engine)


@task(name="package", retries=1, retry_delay_seconds=2, cache_policy=NO_CACHE)
def package(model: StoredModel, state: Path) -> int:
    """Seal the blocks that are not in the registry yet; returns the number of shards written."""
    return seal_blocks(model, Registry(str(state / "registry")), Keyring(state / "keyring.json"))
