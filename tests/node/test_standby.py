"""Stand-by blocks of a node: loaded where memory is free, used by the next epoch, and gone before anything else."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from types import SimpleNamespace

import pytest

from resplit.errors import CommandRefusedError
from resplit.model.source import StoredModel
from resplit.node import standby as standby_module
from resplit.node.hosting import Hosting
from resplit.shards import kept as kept_module
from resplit.shards.kept import KeptShards
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from resplit.status import StandbyState
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


class OwnDisk:
    """A trusted node in this process that keeps shards in a folder of its own; commands are given to it directly."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        registry, keyring = Registry(f"memory://{uuid.uuid4().hex}"), Keyring(folder / "keyring.json")
        package(model, registry, keyring)
        self.entries = [keyring[block.name] for block in model.features(1)]
        keys = {entry.shard: entry.key for entry in self.entries}
        self.folder = folder / "kept"
        self.hosting = Hosting(
            "trusted", two_node_config(), KeptShards(registry, self.folder), lambda wrapped, shard: keys[shard]
        )

    async def stand_by(self, model: StoredModel, blocks: tuple[int, ...]) -> None:
        """Have blocks kept ready, and wait until they are loaded."""
        entries = {block: self.entries[block] for block in blocks}
        shards = {block: WrappedShard(entry.shard, entry.sealed_bytes, b"") for block, entry in entries.items()}
        await self.hosting.stand_by(Standby(blocks, model.spec, frozenset({0}), shards))

        async def are_loaded() -> bool:
            return self.state.blocks == blocks

        await until(are_loaded, 30)  # blocks are loaded at low priority

    @property
    def state(self) -> StandbyState:
        return self.hosting.standby.state(self.hosting.executor)


@pytest.fixture
async def own_disk(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[OwnDisk]:
    node = OwnDisk(stored_model, tmp_path)
    yield node
    node.hosting.running().close()
    await node.hosting.tasks.stop()


async def test_the_end_of_trust_drops_private_stand_by_blocks_from_memory_and_disk_at_once(
    own_disk: OwnDisk, stored_model: StoredModel
) -> None:
    await own_disk.stand_by(stored_model, (0, 2))
    assert own_disk.state.disk_bytes == sum(own_disk.entries[block].sealed_bytes for block in (0, 2))
    await own_disk.hosting.trust(Trust(trusted=False, private=frozenset({0})))
    running = own_disk.hosting.running()
    assert running.engine.blocks == running.memory.standby == (2,)
    assert {path.name for path in own_disk.folder.iterdir()} == {own_disk.entries[2].shard}


async def test_on_a_full_disk_blocks_stand_by_in_memory_and_are_kept_when_there_is_room(
    own_disk: OwnDisk, stored_model: StoredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standby_module, "_AGAIN_AFTER_S", 0.01)
    with monkeypatch.context() as disk:
        disk.setattr(kept_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        await own_disk.stand_by(stored_model, (2, 3))
        assert own_disk.state.disk_bytes == 0

    async def are_kept() -> bool:
        return own_disk.state.disk_bytes == sum(own_disk.entries[block].sealed_bytes for block in (2, 3))

    await until(are_kept, 30)
