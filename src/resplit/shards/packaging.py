"""Packages a model: seals every block into the registry, once."""

from __future__ import annotations

import hashlib
import json

import structlog

from resplit.model.source import StoredModel
from resplit.shards.keyring import Keyring, KeyringEntry
from resplit.shards.registry import Registry
from resplit.shards.sealing import new_key, seal

_log = structlog.get_logger(__name__)


def package(model: StoredModel, registry: Registry, keyring: Keyring) -> int:
    """Seal the blocks of `model` that the registry does not have yet, and return their number.

    A second call for the same model writes nothing. ShardError if the registry or the keyring cannot be written.
    """
    registry.delete_abandoned()
    written = 0
    for block in model.spec.blocks:
        plain = model.content(block.name)
        content = hashlib.sha256(plain).hexdigest()
        known = keyring.find(block.name, content)
        if known is None or not registry.has(known.shard, known.sealed_bytes):
            key = new_key()
            sealed = seal(plain, key)
            keyring.add(block.name, KeyringEntry(registry.put(sealed), len(sealed), key, content))
            written += 1
    _log.info("packaged", model=model.name, written=written, registry=registry.url)
    return written


def identity(model: StoredModel, keyring: Keyring) -> str:
    """A hash of the contents of all blocks of a packaged model: other weights have another one."""
    contents = [(block.name, keyring[block.name].content) for block in model.spec.blocks]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()
