"""Packages a model: every block sealed once into the registry, under a name that tells nothing."""

from __future__ import annotations

import hashlib

import structlog

from resplit.model.source import StoredModel
from resplit.shards.keyring import Keyring
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, seal

_log = structlog.get_logger(__name__)


def package(model: StoredModel, registry: Registry, keyring: Keyring) -> int:
    """Put every block of `model` that is not there yet into the registry; how many were written.

    A second packaging of the same model writes nothing. ShardError where the registry cannot be written.
    """
    written = 0
    for block in model.spec.chain().specs:
        plain = model.tensors(block.name)
        content = hashlib.sha256(plain).hexdigest()
        known = keyring.find(block.name, content)
        if known is None or not registry.has(known.shard):
            key = new_key()
            keyring.add(block.name, content, registry.put(seal(plain, key)), key)
            written += 1
    _log.info("packaged", model=model.name, written=written, registry=registry.url)
    return written
