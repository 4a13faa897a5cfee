"""What every engine offers: it holds blocks and the key/value caches of sessions, and runs segments over batches.

Engines differ in how they compute a block. Which caches exist, what they weigh, and how they travel is the same for
all, and stands here. No type of a numerical library leaves an engine: callers see bytes, names and numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from resplit.errors import CapacityError, DataError, ResplitError
from resplit.model.activation import Activation, token_ids
from resplit.model.room import cache_room
from resplit.model.spec import ModelSpec

# A prompt may be cut into passes at multiples of this many positions without a change of any bit.
CHUNK_TOKENS = 8
# A pass may have at most this many drafts: the head computes the logits of each.
MOST_DRAFTS = 63


@dataclass(frozen=True)
class SessionRows:
    """Consecutive positions of one session in a pass, from `start` on.

    `values` is token ids (1, tokens) if the segment begins with the embedding, else hidden states (1, tokens, width).
    `capacity` is the number of tokens that the session may cache. With `stepwise`, every position gets the bits that it
    would get in a pass of its own. The last `drafts` positions are guesses: they count as held only once a later pass
    begins after them. The head answers for them and for the position before, or for none without `logits`. With
    `scored` it answers for every position.
    """

    session: str
    start: int
    capacity: int
    values: Activation
    stepwise: bool = False
    drafts: int = 0
    logits: bool = True
    scored: bool = False

    @cached_property
    def tokens(self) -> int:
        """Positions in this pass; 0 for a malformed tensor."""
        return self.values.shape[1] if len(self.values.shape) > 1 else 0

    @cached_property
    def end(self) -> int:
        """The position after the last one."""
        return self.start + self.tokens

    @property
    def answers(self) -> int:
        """The number of positions, the last ones, whose logits are wanted."""
        if self.scored:
            return self.tokens
        return self.drafts + 1 if self.logits else 0


class SessionCache(ABC):
    """Keys and values of one session in one block; `length` positions are cached and may grow to `capacity`.

    Of these, the positions from `sure` on are drafts, which the session's next pass keeps or cuts off.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.sure = 0

    @property
    def held(self) -> int:
        """The number of cached positions without drafts."""
        return min(self.length, self.sure)

    @property
    def room(self) -> int:
        """The positions for which it takes memory."""
        return cache_room(self.length, self.capacity)

    def ensure_room(self, end: int) -> None:
        """CapacityError if the cache cannot grow to `end` positions."""
        if end > self.capacity:
            raise CapacityError(f"a session's cache is full: {end} tokens, room for {self.capacity}")

    def crop(self, length: int) -> None:
        """Discard the positions from `length` on."""
        self.length = min(self.length, length)

    @abstractmethod
    def read(self, first: int, last: int) -> Activation:
        """Keys and values at positions `first..last-1`, (2, heads, positions, width)."""

    @abstractmethod
    def append(self, part: Activation) -> None:
        """Append keys and values, (2, heads, positions, width)."""


Cache = TypeVar("Cache", bound=SessionCache)


class Engine(ABC, Generic[Cache]):
    """Blocks and caches of one node.

    One thread runs passes. Other threads may at the same time load and drop blocks, and export or import caches of
    sessions that have no running pass.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.kinds = tuple(block.kind for block in spec.blocks)
        self.features = spec.blocks
        self._caches: dict[tuple[str, int], Cache] = {}
        # Shape, type and bytes of the hidden states of one position: those of a decode step, on every token's path.
        self._usual_input = (1, 1, spec.hidden_size), spec.activations, spec.hidden_size * _item_bytes(spec)
        self._caching = tuple(block for block in range(len(spec.blocks)) if self.has_cache(block))

    @property
    @abstractmethod
    def blocks(self) -> tuple[int, ...]:
        """Indices of the loaded blocks, in order."""

    @abstractmethod
    def load(self, block: int, content: bytes) -> None:
        """Load a block from its packaged content; ModelError if that belongs to another block."""

    @abstractmethod
    def unload(self, block: int) -> None:
        """Free a block's weights; the caches of its sessions stay."""

    @abstractmethod
    def run(
        self,
        first: int,
        last: int,
        batch: Sequence[SessionRows],
        after_block: Callable[[int], None] = lambda block: None,
    ) -> list[Activation | ResplitError]:
        """Run blocks `first..last` for all rows of `batch`; later positions in the sessions' caches are discarded.

        Each result is hidden states (1, tokens, width), or logits (answers, vocabulary) if `last` is the head.
        `after_block` is called after each block with its index. A session may appear once in a batch.

        DataError if a block is not loaded. What is wrong with one session's rows is its result, and stops no other:
        DataError if shape, dtype or positions do not match the block and the cache, CapacityError if a cache is full.
        """

    @abstractmethod
    def _new_cache(self, block: int, capacity: int) -> Cache:
        """An empty cache."""

    @property
    def held_bytes(self) -> float:
        """Bytes of the loaded weights, and of the caches as far as they are used."""
        weights = float(sum(self.features[block].weight_bytes for block in list(self.blocks)))  # blocks load in threads
        return weights + sum(size for _, _, size in self.caches())

    def drop(self, block: int) -> None:
        """Free a block and all its caches."""
        self.unload(block)
        self.drop_caches(block)

    def drop_caches(self, block: int) -> None:
        """Free all caches of a block."""
        for key in [key for key in list(self._caches) if key[1] == block]:
            self._caches.pop(key, None)

    def missing_cache_bytes(self, session: str, first: int, last: int, end: int, capacity: int) -> float:
        """Bytes by which caches of `session` in blocks `first..last` must grow to hold the positions before `end`.

        DataError if the model has no such block.
        """
        if last >= len(self.features):
            raise DataError(f"block {last}: the model has {len(self.features)}")
        needed, missing = cache_room(end, capacity), 0.0
        rooms: dict[tuple[int, int], int] = {}  # by length and capacity: those of a session are mostly the same
        for block in self._caching_from(first, last):
            cache = self._caches.get((session, block))
            if cache is None:
                missing += needed * self.features[block].kv_bytes_per_token
            elif cache.length < end:
                size = cache.length, cache.capacity
                if size not in rooms:
                    rooms[size] = cache.room
                if rooms[size] < needed:
                    missing += (needed - rooms[size]) * self.features[block].kv_bytes_per_token
        return missing

    def blank_input(self, block: int, tokens: int) -> Activation:
        """A valid input of a block, all zeros: the time of a pass does not depend on the values."""
        if self.kinds[block] == "embed":
            return token_ids([0] * tokens)
        items = tokens * self.spec.hidden_size
        data = bytes(items * _item_bytes(self.spec))
        return Activation(self.spec.activations, (1, tokens, self.spec.hidden_size), data)

    def close(self, session: str, blocks: Collection[int] | None = None) -> None:
        """Free all caches of a session, or those in `blocks`."""
        for key in [key for key in list(self._caches) if key[0] == session and (blocks is None or key[1] in blocks)]:
            self._caches.pop(key, None)

    def sessions(self) -> set[str]:
        """Sessions that have a cache here."""
        return {session for session, _ in list(self._caches)}

    def has_cache(self, block: int) -> bool:
        """Whether a block caches keys and values."""
        return self.features[block].kv_bytes_per_token > 0

    def caches(self) -> list[tuple[str, int, float]]:
        """Session, block and bytes of every cache as far as it is used, oldest first."""
        return [
            (session, block, self.features[block].kv_bytes_per_token * cache.room)
            for (session, block), cache in list(self._caches.items())
        ]

    def lengths(self, session: str) -> dict[int, int]:
        """Cached positions of a session by block, without drafts."""
        return {block: cache.held for (name, block), cache in list(self._caches.items()) if name == session}

    def capacity(self, session: str, block: int) -> int:
        """The capacity in tokens of the cache of `session` in `block`; DataError if there is none."""
        return self._held_cache(session, block).capacity

    def export_cache(self, session: str, block: int, first: int, last: int) -> Activation:
        """Positions `first..last-1` of a session's cache of one block, (2, heads, positions, width).

        DataError if not all of them are cached.
        """
        cache = self._held_cache(session, block)
        if not 0 <= first < last <= cache.length:
            raise DataError(f"cache of block {block}: {cache.length} positions held, {first}..{last - 1} requested")
        return cache.read(first, last)

    def import_cache(self, session: str, block: int, first: int, capacity: int, part: Activation) -> None:
        """Store a part of a cache from position `first` on; a late part with only cached positions is ignored.

        Drafts are not kept. DataError if the part begins after the cached positions, or has another shape than the
        block's caches.
        """
        self._check_part(block, part)
        cache = self._caches.get((session, block)) or self._new_cache(block, capacity)
        end = first + part.shape[2]
        if cache.held < first:
            raise DataError(f"cache of block {block}: {cache.held} positions held, the part begins at {first}")
        if end <= cache.held:
            return
        cache.ensure_room(end)
        cache.crop(first)
        cache.append(part)
        cache.sure = end
        self._caches[session, block] = cache  # not before: a refused cache must hold no memory

    def _held_cache(self, session: str, block: int) -> Cache:
        try:
            return self._caches[session, block]
        except KeyError:
            raise DataError(f"block {block} holds no cache of session {session}") from None

    def _caching_from(self, first: int, last: int) -> tuple[int, ...]:
        """Those of the blocks `first..last` that have caches."""
        return self._caching[bisect_left(self._caching, first) : bisect_right(self._caching, last)]

    def _cache_for(self, rows: SessionRows, block: int) -> Cache:
        """The cache for a pass over `rows`, cut back to their start."""
        key, start, end = (rows.session, block), rows.start, rows.end
        held = self._caches.get(key)
        cache = held or self._new_cache(block, rows.capacity)
        if cache.length < start:
            raise DataError(f"block {block} has {cache.length} positions of this session, the step begins at {start}")
        cache.ensure_room(end)
        cache.crop(start)
        cache.sure = end - rows.drafts
        if held is None:
            self._caches[key] = cache  # not before: a refused cache must hold no memory
        return cache

    def _check_part(self, block: int, part: Activation) -> None:
        part.ensure_valid()
        spec, shape = self.spec, part.shape
        fits = len(shape) == 4 and (shape[0], shape[1], shape[3]) == (2, spec.kv_heads, spec.head_width)
        known = 0 <= block < len(self.kinds) and self.has_cache(block)
        if not (fits and known and part.dtype == spec.activations):
            raise DataError(f"block {block} was given a cache of {part.dtype} {shape}")

    def ensure_input(self, rows: SessionRows, first: int) -> None:
        """DataError unless the values of `rows` are an input of block `first`."""
        shape, dtype = rows.values.shape, rows.values.dtype
        is_usual = (shape, dtype, len(rows.values.data)) == self._usual_input
        if is_usual and not rows.drafts and self.kinds[first] != "embed":
            return
        rows.values.ensure_valid()
        if self.kinds[first] == "embed":
            fits = dtype == "int64" and len(shape) == 2
        else:
            fits = dtype == self.spec.activations and len(shape) == 3 and shape[2] == self.spec.hidden_size
        if not fits or shape[0] != 1 or shape[1] < 1:
            raise DataError(f"block {first} was given {dtype} {shape}")
        if not 0 <= rows.drafts <= min(shape[1] - 1, MOST_DRAFTS) or (rows.drafts and not rows.stepwise):
            raise DataError(
                f"{rows.drafts} of {shape[1]} positions are drafts: at most {MOST_DRAFTS} may follow one, stepwise"
            )
        if self.kinds[first] == "embed":
            ids = np.frombuffer(rows.values.data, dtype=np.int64)
            if ids.min() < 0 or ids.max() >= self.spec.vocabulary:
                raise DataError("a token id is outside the vocabulary")


def _item_bytes(spec: ModelSpec) -> int:
    return 4 if spec.activations == "float32" else 2
