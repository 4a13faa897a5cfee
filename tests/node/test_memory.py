"""Memory accounting: blocks and caches fit or are refused, and KV replicas are freed to make room."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from resplit.errors import CapacityError, ModelError
from resplit.model.activation import Activation
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine
from resplit.model.source import StoredModel
from resplit.node.memory import Memory, reserved_bytes

KV_TOKENS = 64
CAPACITY = 16


@pytest.fixture
def engine(stored_model: StoredModel) -> Engine[Any]:
    """Holds one layer, block 2."""
    engine = open_engine(stored_model.spec)
    engine.load(2, stored_model.content("layer.1"))
    return engine


def layer_bytes(engine: Engine[Any]) -> float:
    return engine.features[2].weight_bytes


def cache_bytes(engine: Engine[Any]) -> float:
    return CAPACITY * engine.features[2].kv_bytes_per_token


def store_cache(engine: Engine[Any], session: str, block: int) -> None:
    """Four positions of a cache of one layer: (2, heads, positions, width)."""
    engine.import_cache(session, block, 0, CAPACITY, Activation("float32", (2, 2, 4, 16), bytes(2 * 2 * 4 * 16 * 4)))


def test_reserved_bytes_are_weights_and_full_caches(engine: Engine[Any]) -> None:
    layer = engine.features[2]
    assert reserved_bytes(engine, (), KV_TOKENS) == 0
    assert reserved_bytes(engine, (2, 3), KV_TOKENS) == 2 * (layer.weight_bytes + KV_TOKENS * layer.kv_bytes_per_token)
    assert reserved_bytes(engine, (0,), KV_TOKENS) == engine.features[0].weight_bytes


def test_a_block_fits_to_the_last_byte(engine: Engine[Any]) -> None:
    Memory(engine, 2 * layer_bytes(engine), 0).ensure_block(3)
    with pytest.raises(CapacityError, match=r"block layer\.2 needs"):
        Memory(engine, 2 * layer_bytes(engine) - 1, 0).ensure_block(3)


def test_a_cache_of_a_hosted_block_fits_to_the_last_byte_and_is_counted_once(engine: Engine[Any]) -> None:
    exact = layer_bytes(engine) + cache_bytes(engine)
    Memory(engine, exact, KV_TOKENS).ensure_cache("s", 2, CAPACITY, CAPACITY)
    with pytest.raises(CapacityError, match="the cache of session s needs"):
        Memory(engine, exact - 1, KV_TOKENS).ensure_cache("s", 2, CAPACITY, CAPACITY)
    store_cache(engine, "s", 2)
    Memory(engine, exact, KV_TOKENS).ensure_caches("s", 2, 2, CAPACITY, CAPACITY)


def test_a_replica_uses_only_what_is_neither_reserved_nor_replicated(engine: Engine[Any]) -> None:
    exact = reserved_bytes(engine, (2,), KV_TOKENS) + 2 * cache_bytes(engine)
    memory = Memory(engine, exact, KV_TOKENS)
    for block in (3, 4):
        memory.ensure_cache("s", block, CAPACITY, CAPACITY)
        store_cache(engine, "s", block)
    memory.ensure_cache("s", 4, CAPACITY, CAPACITY)  # exists already
    with pytest.raises(CapacityError, match="no room for a replica of the cache of session s"):
        memory.ensure_cache("s", 5, CAPACITY, CAPACITY)
    assert memory.replicas() == [("s", 3, cache_bytes(engine)), ("s", 4, cache_bytes(engine))]


def test_a_cache_of_an_expected_block_is_no_replica(engine: Engine[Any]) -> None:
    memory = Memory(engine, layer_bytes(engine) + cache_bytes(engine), KV_TOKENS)
    with pytest.raises(CapacityError, match="replica"):
        memory.ensure_cache("s", 3, CAPACITY, CAPACITY)
    memory.expected = frozenset({3})
    memory.ensure_cache("s", 3, CAPACITY, CAPACITY)
    store_cache(engine, "s", 3)
    assert memory.replicas() == []


def test_only_as_many_replicas_as_necessary_are_freed_oldest_first(engine: Engine[Any]) -> None:
    for block in (3, 4, 5):
        store_cache(engine, "old", block)
    memory = Memory(engine, layer_bytes(engine) + 3 * cache_bytes(engine), 0)
    memory.ensure_caches("new", 2, 2, CAPACITY, CAPACITY)
    assert [block for _, block, _ in memory.replicas()] == [4, 5]
    store_cache(engine, "new", 2)
    memory.ensure_caches("newer", 2, 2, 2 * CAPACITY, 2 * CAPACITY)
    assert memory.replicas() == []


def test_replicas_stay_when_there_is_room(engine: Engine[Any]) -> None:
    store_cache(engine, "old", 3)
    memory = Memory(engine, layer_bytes(engine) + 2 * cache_bytes(engine), 0)
    memory.ensure_caches("new", 2, 2, CAPACITY, CAPACITY)
    assert len(memory.replicas()) == 1


def test_stand_by_blocks_use_free_memory_and_go_before_replicas_the_least_wanted_first(
    engine: Engine[Any], stored_model: StoredModel
) -> None:
    memory = Memory(engine, 3 * layer_bytes(engine) + cache_bytes(engine), 0)
    store_cache(engine, "old", 5)
    loaded = [memory.stand_by(b, stored_model.content(f"layer.{b - 1}"), lambda: True) for b in (3, 4, 6)]
    assert loaded == [True, True, False]
    assert (memory.hosted, memory.standby) == ((2,), (3, 4))
    memory.ensure_caches("new", 2, 2, CAPACITY, CAPACITY)
    assert (memory.standby, len(memory.replicas())) == ((3,), 1)


def test_a_claimed_stand_by_block_is_hosted_and_never_freed_for_others(
    engine: Engine[Any], stored_model: StoredModel
) -> None:
    memory = Memory(engine, 2 * layer_bytes(engine), 0)
    assert memory.stand_by(3, stored_model.content("layer.2"), lambda: True)
    memory.claim([3, 7])
    assert memory.hosted == (2, 3)
    with pytest.raises(CapacityError):
        memory.ensure_block(4)


def test_a_replica_needs_no_more_room_beside_stand_by_blocks(engine: Engine[Any], stored_model: StoredModel) -> None:
    memory = Memory(engine, 2 * layer_bytes(engine), 0)
    assert memory.stand_by(3, stored_model.content("layer.2"), lambda: True)
    memory.ensure_cache("s", 3, CAPACITY, CAPACITY)  # of a block that stands by: it is a replica
    assert memory.standby == ()


def test_a_block_that_is_no_longer_allowed_does_not_stand_by(engine: Engine[Any], stored_model: StoredModel) -> None:
    memory = Memory(engine, 9 * layer_bytes(engine), 0)
    assert not memory.stand_by(3, stored_model.content("layer.2"), lambda: False)
    assert engine.blocks == (2,)


def test_a_cache_takes_room_as_it_is_used_in_steps(engine: Engine[Any]) -> None:
    store_cache(engine, "s", 2)
    per_position = engine.features[2].kv_bytes_per_token
    assert engine.missing_cache_bytes("s", 2, 2, CAPACITY, 100) == 0
    assert engine.missing_cache_bytes("s", 2, 2, CAPACITY + 1, 100) == CAPACITY * per_position
    assert engine.missing_cache_bytes("new", 2, 2, 5, 7) == 7 * per_position
    memory = Memory(engine, layer_bytes(engine) + 2 * cache_bytes(engine), KV_TOKENS)
    memory.ensure_caches("s", 2, 2, 2 * CAPACITY, 100)
    with pytest.raises(CapacityError, match="the cache of session s needs"):
        memory.ensure_caches("s", 2, 2, 2 * CAPACITY + 1, 100)


class LoadingStandby:
    """Block 3 as a stand-by block whose load lasts until `end`. `limit` layers fit."""

    def __init__(self, engine: Engine[Any], model: StoredModel, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.memory = Memory(engine, limit * layer_bytes(engine), 0)
        self._begun, self._go_on, load = threading.Event(), threading.Event(), engine.load

        def slow(block: int, content: bytes) -> None:
            self._begun.set()
            assert self._go_on.wait(60)
            load(block, content)

        monkeypatch.setattr(engine, "load", slow)
        self._pool = ThreadPoolExecutor(2)
        self._standing = self._pool.submit(self.memory.stand_by, 3, model.content("layer.2"), lambda: True)
        assert self._begun.wait(60)

    def meanwhile(self, work: Callable[[], None]) -> None:
        """Do something while the block is being loaded; TimeoutError if that waits for the load."""
        doing = self._pool.submit(work)
        try:
            doing.result(30)
        finally:
            if not doing.done():
                self._go_on.set()

    def end(self) -> bool:
        """Whether the block stands by once its load has ended."""
        self._go_on.set()
        return self._standing.result(60)


@pytest.fixture
def loading(
    engine: Engine[Any], stored_model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], LoadingStandby]:
    return lambda limit: LoadingStandby(engine, stored_model, limit, monkeypatch)


def test_what_needs_the_room_of_a_stand_by_block_does_not_wait_for_its_load(
    engine: Engine[Any], loading: Callable[[int], LoadingStandby]
) -> None:
    standby = loading(2)
    capacity = int(layer_bytes(engine) / engine.features[2].kv_bytes_per_token) // CAPACITY * CAPACITY
    standby.meanwhile(lambda: standby.memory.ensure_caches("s", 2, 2, capacity, capacity))
    cache = Activation("float32", (2, 2, capacity, 16), bytes(2 * 2 * capacity * 16 * 4))
    engine.import_cache("s", 2, 0, capacity, cache)
    assert not standby.end()
    assert (engine.blocks, standby.memory.standby) == ((2,), ())


def test_a_block_that_must_not_stand_by_any_more_is_gone_once_its_load_has_ended(
    engine: Engine[Any], loading: Callable[[int], LoadingStandby]
) -> None:
    standby = loading(9)
    standby.meanwhile(lambda: standby.memory.keep_standby(()))
    assert not standby.end()
    assert (engine.blocks, standby.memory.standby) == ((2,), ())


@pytest.mark.parametrize("dropped_before", [False, True])
def test_a_block_that_an_epoch_claims_during_its_load_is_hosted(
    engine: Engine[Any], loading: Callable[[int], LoadingStandby], dropped_before: bool
) -> None:
    standby = loading(9)
    if dropped_before:
        standby.meanwhile(lambda: standby.memory.keep_standby(()))
    standby.meanwhile(lambda: standby.memory.claim([3]))
    assert standby.end()
    assert (standby.memory.hosted, standby.memory.standby) == ((2, 3), ())


def test_a_block_that_cannot_be_loaded_does_not_stand_by(engine: Engine[Any], stored_model: StoredModel) -> None:
    memory = Memory(engine, 9 * layer_bytes(engine), 0)
    with pytest.raises(ModelError):
        memory.stand_by(3, stored_model.content("head"), lambda: True)
    assert (engine.blocks, memory.standby, memory._standby) == ((2,), (), [])


def test_caches_are_counted_rarely_and_room_is_given_as_if_they_were_always(engine: Engine[Any]) -> None:
    limit = reserved_bytes(engine, (2,), KV_TOKENS) + 4.5 * cache_bytes(engine)
    memory, rng, outcomes = Memory(engine, limit, KV_TOKENS), random.Random(5), set[bool]()
    for _ in range(200):
        session, block = f"s{rng.randrange(3)}", rng.choice((3, 4, 5))
        if rng.random() < 0.4:
            engine.close(session, (block,))
            continue
        fits = [_fits(each, session, block) for each in (Memory(engine, limit, KV_TOKENS), memory)]
        assert fits[0] == fits[1]
        outcomes.add(fits[0])
        if fits[0]:
            store_cache(engine, session, block)
    assert outcomes == {True, False}


def _fits(memory: Memory, session: str, block: int) -> bool:
    try:
        memory.ensure_cache(session, block, CAPACITY, CAPACITY)
    except CapacityError:
        return False
    return True
