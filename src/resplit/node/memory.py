"""Memory accounting of one node: weights, the caches of its blocks, and KV replicas, which are freed for both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from resplit.errors import CapacityError
from resplit.model.engines.base import Engine


def reserved_bytes(engine: Engine[Any], blocks: Iterable[int], kv_tokens: float) -> float:
    """Bytes of the weights of `blocks` and of their caches for `kv_tokens` cached tokens (constraint (4))."""
    features = [engine.features[block] for block in blocks]
    return sum(each.weight_bytes + kv_tokens * each.kv_bytes_per_token for each in features)


class Memory:
    """Keeps weights and caches together within `limit_bytes`.

    Loaded blocks have room for `kv_tokens` cached tokens reserved. KV replicas, which are caches of blocks that this
    node does not host, use only what remains. They are freed, oldest first, as soon as anything else needs their room.
    """

    def __init__(self, engine: Engine[Any], limit_bytes: float, kv_tokens: float) -> None:
        # Blocks that are about to be loaded: their caches do not count as replicas.
        self.expected: frozenset[int] = frozenset()
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._kv_tokens = kv_tokens

    def replicas(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes of each KV replica, oldest first."""
        return [cache for cache in self._engine.caches() if not self._hosts(cache[1])]

    def ensure_block(self, block: int) -> None:
        """CapacityError if the weights of `block` do not fit."""
        self._ensure(self._engine.features[block].weight_bytes, f"block {self._engine.features[block].name}")

    def ensure_caches(self, session: str, first: int, last: int, capacity: int) -> None:
        """CapacityError if caches of `session` in the hosted blocks `first..last` do not fit."""
        more_bytes = self._engine.missing_cache_bytes(session, first, last, capacity)
        if more_bytes:
            self._ensure(more_bytes, f"the cache of session {session}")

    def ensure_cache(self, session: str, block: int, capacity: int) -> None:
        """CapacityError if a cache of `session` in `block`, hosted here or not, does not fit."""
        if self._hosts(block):
            self.ensure_caches(session, block, block, capacity)
        else:
            self._ensure_replica(session, block, capacity)

    def _hosts(self, block: int) -> bool:
        return block in self._engine.blocks or block in self.expected

    def _ensure_replica(self, session: str, block: int, capacity: int) -> None:
        """A replica takes neither reserved room nor the room of another replica."""
        more_bytes = self._engine.missing_cache_bytes(session, block, block, capacity)
        reserved = reserved_bytes(self._engine, self._engine.blocks, self._kv_tokens)
        replicated = sum(size for _, _, size in self.replicas())
        if more_bytes > self._limit_bytes - reserved - replicated:
            raise CapacityError(f"no room for a replica of the cache of session {session}")

    def _ensure(self, more_bytes: float, what: str) -> None:
        """Make room for `more_bytes`, by freeing replicas if necessary."""
        free_bytes = self._limit_bytes - self._engine.held_bytes
        for session, block, size in self.replicas() if more_bytes > free_bytes else ():
            if more_bytes <= free_bytes:
                break
            self._engine.close(session, (block,))
            free_bytes += size
        if more_bytes > free_bytes:
            raise CapacityError(f"{what} needs {more_bytes / 2**20:.1f} MiB, {free_bytes / 2**20:.1f} MiB are free")
