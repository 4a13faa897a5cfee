"""Memory accounting of one node: weights and caches of its blocks, and what is freed for both.

That are KV replicas, and before them stand-by blocks, which the next epoch may need.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Sequence
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

    Stand-by blocks are loaded, but no epoch of this node needs them. They use only memory that is free, and are freed
    before anything else, the least wanted first. Several threads may use this.
    """

    def __init__(self, engine: Engine[Any], limit_bytes: float, kv_tokens: float) -> None:
        # Blocks that are about to be loaded: their caches do not count as replicas.
        self.expected: frozenset[int] = frozenset()
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._kv_tokens = kv_tokens
        self._standby: list[int] = []  # the most wanted first, with one that is being loaded
        self._loading: int | None = None  # the stand-by block that is being loaded
        self._unloading: int | None = None  # the same one if it is unloaded again as soon as it is loaded
        # Replicas may take at least so many bytes more, as long as these blocks are loaded, stand by and are expected.
        self._replica_room: tuple[object, float] = (None, 0.0)
        self._changing = threading.Lock()  # held while blocks become stand-by blocks, or cease to be; never for long

    @property
    def standby(self) -> tuple[int, ...]:
        """The stand-by blocks, the most wanted first, without one that is being loaded."""
        return tuple(block for block in self._standby if block in self._engine.blocks)

    @property
    def hosted(self) -> tuple[int, ...]:
        """The loaded blocks without stand-by blocks."""
        return tuple(block for block in self._engine.blocks if self._is_hosted(block))

    def claim(self, blocks: Collection[int]) -> None:
        """Those of `blocks` that are stand-by blocks are hosted from now on."""
        with self._changing:
            self._standby = [block for block in self._standby if block not in blocks]
            if self._unloading in blocks:
                self._unloading = None

    def retire(self, block: int) -> None:
        """A hosted block becomes the least wanted stand-by block."""
        with self._changing:
            self._standby.append(block)

    def stand_by(self, block: int, content: bytes, allowed: Callable[[], bool]) -> bool:
        """Load a stand-by block, the least wanted one, if there is room and it is still `allowed`.

        Returns whether it stands by. It does not if its room was needed meanwhile: nobody waits for the load.
        """
        with self._changing:
            size_bytes = self._engine.features[block].weight_bytes
            if block in self._engine.blocks or size_bytes > self._free_bytes or not allowed():
                return False
            self._standby.append(block)  # first: no other thread may take it for a block that is hosted
            self._loading = block
        try:
            self._engine.load(block, content)
        finally:
            stands_by = self._end_loading(block)
        return stands_by

    def _end_loading(self, block: int) -> bool:
        """The load of a stand-by block has ended. Returns whether the block is kept."""
        with self._changing:
            gone = self._unloading == block or block not in self._engine.blocks
            self._loading = self._unloading = None
            if gone:
                self._standby = [each for each in self._standby if each != block]
                self._engine.unload(block)
            while self._standby and self._free_bytes < 0:  # caches were made meanwhile
                self._evict_last()
            return block in self._engine.blocks

    def keep_standby(self, wanted: Sequence[int]) -> None:
        """Free the stand-by blocks that are not `wanted`, and take the order of the others from there."""
        with self._changing:
            for block in set(self._standby).difference(wanted):
                self._standby.remove(block)
                self._free(block)
            self._standby.sort(key=list(wanted).index)

    def has_room_for(self, block: int) -> bool:
        """Whether a stand-by block would fit."""
        return self._engine.features[block].weight_bytes <= self._free_bytes

    def replicas(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes of each KV replica, oldest first."""
        return [cache for cache in self._engine.caches() if not self._hosts(cache[1])]

    def ensure_block(self, block: int) -> None:
        """CapacityError if the weights of `block` do not fit."""
        self._ensure(self._engine.features[block].weight_bytes, f"block {self._engine.features[block].name}")

    def ensure_caches(self, session: str, first: int, last: int, end: int, capacity: int) -> None:
        """CapacityError if caches of `session` in the hosted blocks `first..last` cannot grow to `end` positions.

        Also if the session alone could never use its whole `capacity`.
        """
        more_bytes = self._engine.missing_cache_bytes(session, first, last, end, capacity)
        if more_bytes:
            self._ensure_possible(session, range(first, last + 1), capacity)
            self._ensure(more_bytes, f"the cache of session {session}")

    def ensure_cache(self, session: str, block: int, end: int, capacity: int) -> None:
        """CapacityError if a cache of `session` in `block`, hosted here or not, cannot grow to `end` positions."""
        if self._hosts(block):
            self.ensure_caches(session, block, block, end, capacity)
        else:
            self._ensure_replica(session, block, end, capacity)

    def _hosts(self, block: int) -> bool:
        return block in self.expected or (block in self._engine.blocks and self._is_hosted(block))

    def _is_hosted(self, loaded: int) -> bool:
        return loaded not in self._standby and loaded != self._unloading

    def _ensure_replica(self, session: str, block: int, end: int, capacity: int) -> None:
        """A replica takes neither reserved room nor the room of another replica."""
        more_bytes = self._engine.missing_cache_bytes(session, block, block, end, capacity)
        self._ensure_possible(session, (block,), capacity)
        self._take_replica_room(more_bytes, session)
        self._evict(more_bytes)

    def _take_replica_room(self, more_bytes: float, session: str) -> None:
        """CapacityError unless replicas may take so much more.

        All caches are counted only when what was known to be free is used up: parts of replicas are many.
        """
        blocks = self._engine.blocks, tuple(self._standby), self._unloading, self.expected
        counted, room_bytes = self._replica_room
        if counted != blocks or more_bytes > room_bytes:
            reserved = reserved_bytes(self._engine, self.hosted, self._kv_tokens)
            room_bytes = self._limit_bytes - reserved - sum(size for _, _, size in self.replicas())
        if more_bytes > room_bytes:
            raise CapacityError(f"no room for a replica of the cache of session {session}")
        self._replica_room = blocks, room_bytes - more_bytes

    def _ensure_possible(self, session: str, blocks: Iterable[int], capacity: int) -> None:
        """An engine may reserve addresses for the whole capacity, so that has a bound too."""
        whole_bytes = capacity * sum(self._engine.features[block].kv_bytes_per_token for block in blocks)
        if whole_bytes > self._limit_bytes:
            raise CapacityError(
                f"the cache of session {session} needs up to {whole_bytes / 2**20:.1f} MiB, "
                f"this node has {self._limit_bytes / 2**20:.1f} MiB"
            )

    def _ensure(self, more_bytes: float, what: str) -> None:
        """Make room for `more_bytes`, by freeing stand-by blocks and then replicas if necessary."""
        self._evict(more_bytes)
        free_bytes = self._free_bytes
        for session, block, size in self.replicas() if more_bytes > free_bytes else ():
            if more_bytes <= free_bytes:
                break
            self._engine.close(session, (block,))
            free_bytes += size
        if more_bytes > free_bytes:
            raise CapacityError(f"{what} needs {more_bytes / 2**20:.1f} MiB, {free_bytes / 2**20:.1f} MiB are free")

    @property
    def _free_bytes(self) -> float:
        return self._limit_bytes - self._engine.held_bytes

    def _evict(self, more_bytes: float) -> None:
        """Free stand-by blocks until `more_bytes` are free, or none is left."""
        if not self._standby or more_bytes <= self._free_bytes:
            return
        with self._changing:
            while self._standby and more_bytes > self._free_bytes:
                self._evict_last()

    def _evict_last(self) -> None:
        self._free(self._standby.pop())

    def _free(self, block: int) -> None:
        """Unload a block that stood by, at once or when its load has ended."""
        if block == self._loading:
            self._unloading = block
        else:
            self._engine.unload(block)
