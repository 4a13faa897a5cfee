"""Copies of caches on a node that does not host their blocks: they take free room only, and make way."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from resplit.errors import CapacityError
from resplit.model.source import StoredModel
from tests.support.in_process import InProcessCluster, in_process
from tests.support.two_nodes import cache_parts, commit, layer_bytes, prepare, two_node_config

ONE = ["trusted", "trusted", "plain", *["trusted"] * 5]
TWO = ["trusted", "trusted", "plain", "plain", *["trusted"] * 4]
KV_TOKENS = 64


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """`plain` has room for two layers and the caches that it reserves room for, and not for a byte more."""
    async with in_process(
        two_node_config(f"{2 * layer_bytes(stored_model, KV_TOKENS):.0f} B"), stored_model, tmp_path
    ) as running:
        yield running


async def copies(nodes: InProcessCluster) -> list[int]:
    state = await nodes.state("plain")
    assert state["held_bytes"] <= state["memory_bytes"]
    copied: list[int] = state["copies"]
    return copied


async def test_a_copy_takes_no_room_that_is_reserved(nodes: InProcessCluster) -> None:
    await prepare(nodes, TWO, 1)
    with pytest.raises(CapacityError, match="no room for a replica"):
        await nodes.peer("plain").cache(cache_parts("s", 4, KV_TOKENS))
    assert await copies(nodes) == []


async def test_a_copy_makes_way_for_a_block_and_its_caches(nodes: InProcessCluster) -> None:
    await prepare(nodes, ONE, 1)
    await nodes.peer("plain").cache([*cache_parts("s", 4, KV_TOKENS), *cache_parts("s", 5, KV_TOKENS)])
    assert await copies(nodes) == [4, 5]
    await prepare(nodes, TWO, 2)
    for number in range(4):  # all that is reserved for both blocks
        for block in (2, 3):
            await nodes.peer("plain").cache(cache_parts(f"real-{number}", block, KV_TOKENS // 4))
    assert await copies(nodes) == []
    assert (await nodes.state("plain"))["sessions"] == 4


async def test_a_copy_becomes_the_cache_where_its_block_comes_to_it(nodes: InProcessCluster) -> None:
    await prepare(nodes, ONE, 1)
    await nodes.peer("plain").cache(cache_parts("s", 3, KV_TOKENS))
    assert await copies(nodes) == [3]
    await prepare(nodes, TWO, 2)
    assert await copies(nodes) == []
    assert await nodes.peer("plain").begin_attempt("s", 1) == {3: 4}


async def test_what_a_dead_epoch_leaves_is_kept_as_copies_until_room_is_needed(nodes: InProcessCluster) -> None:
    await prepare(nodes, TWO, 1)
    await commit(nodes, 1)
    await nodes.peer("plain").cache(cache_parts("s", 3, KV_TOKENS))
    order = nodes.prepare_body("plain", ONE, 2) | {"replace_current": True}
    await nodes.command("plain", "prepare", order, 2)
    assert await copies(nodes) == [3]
    assert await nodes.peer("plain").begin_attempt("s", 1) == {3: 4}
    await nodes.peer("plain").close_sessions(["s"])
    assert await copies(nodes) == []
