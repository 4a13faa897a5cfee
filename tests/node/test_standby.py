"""Stand-by blocks of a node: loaded where memory is free, used by the next epoch, and gone before anything else."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Collection
from pathlib import Path

import pytest

from resplit.errors import CommandRefusedError
from resplit.model.source import StoredModel
from resplit.node.hosting import Hosting
from resplit.shards.kept import KeptShards
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from resplit.wire.commands import Standby, Trust, WrappedShard, to_body
from tests.support.in_process import InProcessCluster, in_process, until
from tests.support.two_nodes import LATER, MIDDLE, commit, layer_bytes, prepare, take_caches, two_node_config


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(two_node_config(), stored_model, tmp_path) as running:
        yield running


async def stand_by(nodes: InProcessCluster, blocks: tuple[int, ...], ready: Collection[int]) -> None:
    """Have `plain` keep blocks ready, and wait until those stand by that should."""
    placement = ["plain" if block in blocks else "trusted" for block in range(8)]
    shards = {int(block): shard for block, shard in nodes.prepare_body("plain", placement, 1)["shards"].items()}
    body = to_body(Standby(blocks, nodes.model.spec, nodes.private, {}))
    await nodes.command("plain", "standby", body | {"shards": shards})

    async def are_ready() -> bool:
        return set((await nodes.state("plain")).standby.blocks) == set(ready)

    await until(are_ready, 30)  # blocks are loaded at low priority


async def test_an_epoch_uses_stand_by_blocks_without_loading_them(nodes: InProcessCluster) -> None:
    await stand_by(nodes, (3, 2), (2, 3))
    state = await nodes.state("plain")
    assert state.blocks == ()
    assert state.standby.blocks == (3, 2)
    assert state.standby.memory_bytes == state.held_bytes > 0
    assert state.standby.loaded_bytes > 0
    assert state.standby.processor_s > 0
    assert await prepare(nodes, MIDDLE, 1) == {"loaded": []}
    state = await nodes.state("plain")
    assert (state.blocks, state.standby.blocks) == ((2, 3), ())


async def test_a_block_that_should_stand_by_stays_loaded_without_its_caches_when_its_epoch_ends(
    nodes: InProcessCluster,
) -> None:
    await prepare(nodes, MIDDLE, 1)
    await commit(nodes, 1)
    await stand_by(nodes, (2, 3), ())
    await take_caches(nodes, "s", [2], 64)
    await prepare(nodes, LATER, 2)
    await commit(nodes, 2)
    await nodes.command("plain", "release", {"epoch": 2}, 2)
    state = await nodes.state("plain")
    assert (state.blocks, state.standby.blocks) == ((3, 4), (2,))
    assert (state.sessions, state.copies) == (0, ())
    assert await prepare(nodes, MIDDLE, 3) == {"loaded": []}


async def test_a_command_replaces_the_one_before_it(nodes: InProcessCluster) -> None:
    await stand_by(nodes, (2, 3), (2, 3))
    await stand_by(nodes, (4, 3), (4, 3))
    await stand_by(nodes, (), ())

    async def nothing_is_held() -> bool:  # a block that was just loaded goes when its load has ended
        return (await nodes.state("plain")).held_bytes == 0

    await until(nothing_is_held)


async def test_stand_by_blocks_fill_only_free_memory_and_make_way_for_an_epoch(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    memory = f"{2.5 * layer_bytes(stored_model, 64):.0f} B"
    async with in_process(two_node_config(memory), stored_model, tmp_path) as small:
        weights = layer_bytes(stored_model, 0)
        fits = int(2.5 * layer_bytes(stored_model, 64) // weights)
        await stand_by(small, (2, 3, 4, 5, 6), (2, 3, 4, 5, 6)[:fits])
        assert await prepare(small, ["trusted"] * 5 + ["plain", "plain", "trusted"], 1) == {
            "loaded": [block for block in (5, 6) if block not in (2, 3, 4, 5, 6)[:fits]]
        }
        state = await small.state("plain")
        assert state.held_bytes <= state.memory_bytes
        assert state.blocks == (5, 6)


async def test_a_private_block_stands_by_on_no_untrusted_node(nodes: InProcessCluster) -> None:
    with pytest.raises(CommandRefusedError, match="privacy"):
        await stand_by(nodes, (0, 2), ())
    assert (await nodes.state("plain")).held_bytes == 0


async def test_a_block_without_a_shard_is_refused(nodes: InProcessCluster) -> None:
    body = to_body(Standby((2, 99), nodes.model.spec, nodes.private, {}))
    with pytest.raises(CommandRefusedError, match=r"malformed.*\[2, 99\] have no shard"):
        await nodes.command("plain", "standby", body)


async def test_the_end_of_trust_drops_private_stand_by_blocks_from_memory_and_disk_at_once(
    stored_model: StoredModel, tmp_path: Path
) -> None:
    registry, keyring = Registry(f"memory://{uuid.uuid4().hex}"), Keyring(tmp_path / "keyring.json")
    package(stored_model, registry, keyring)
    entries = [keyring[block.name] for block in stored_model.features(1)]
    keys = {entry.shard: entry.key for entry in entries}
    kept = KeptShards(registry, tmp_path / "kept")
    hosting = Hosting("trusted", two_node_config(), kept, lambda wrapped, shard: keys[shard])
    shards = {block: WrappedShard(entries[block].shard, entries[block].sealed_bytes, b"") for block in (0, 2)}
    await hosting.stand_by(Standby((0, 2), stored_model.spec, frozenset({0}), shards))

    async def are_ready() -> bool:
        return hosting.standby.state(hosting.executor).blocks == (0, 2)

    await until(are_ready, 30)  # blocks are loaded at low priority
    sizes = (entries[0].sealed_bytes, entries[2].sealed_bytes)
    assert hosting.standby.state(hosting.executor).disk_bytes == sum(sizes)
    await hosting.trust(Trust(trusted=False, private=frozenset({0})))
    assert hosting.running().engine.blocks == hosting.running().memory.standby == (2,)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {entries[2].shard}
    hosting.running().close()
    await hosting.tasks.stop()
