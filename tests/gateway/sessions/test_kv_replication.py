"""Replicas are on nodes that may have them, within their room, and neighbours are together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resplit.config import ClusterConfig
from resplit.gateway.sessions.kv_replication import choose_stand_bys
from resplit.types import BlockFeatures

NODES = ("alpha", "beta", "gamma", "delta")
BLOCKS = 6
CACHED = range(1, BLOCKS - 1)

placements = st.lists(st.sampled_from(NODES), min_size=BLOCKS, max_size=BLOCKS)


def cluster(memory: dict[str, str], trusted: tuple[str, ...] = ("alpha", "beta")) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alpha",
            "trusted": list(trusted),
            "nodes": [{"name": name, "memory": memory.get(name, "10 KiB")} for name in NODES],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 10,
        }
    )


def features() -> tuple[BlockFeatures, ...]:
    """A chain of blocks of 500 bytes whose first layer is private. A cached token takes 10 bytes in each layer."""
    kinds = ["embed", *["layer"] * (BLOCKS - 2), "head"]
    return tuple(
        BlockFeatures(f"{kind}.{i}", kind, 1, 1, 1, 500, 10 if kind == "layer" else 0, 1, i < 2, 0)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    )


@given(placements, st.sets(st.sampled_from(NODES)), st.dictionaries(st.sampled_from(CACHED), st.sampled_from(NODES)))
def test_a_replica_is_never_on_its_host_nor_on_a_node_that_may_not_have_it(
    placement: list[str], connected: set[str], current: dict[int, str]
) -> None:
    chosen = choose_stand_bys(cluster({}), features(), placement, connected, current)
    assert all(chosen[block] in connected - {placement[block]} for block in chosen)
    assert chosen.get(1, "alpha") in ("alpha", "beta")
    for block in set(chosen) & set(current):  # a replica stays where it is if it may
        allowed = current[block] in connected - {placement[block]} and (
            block != 1 or current[block] in ("alpha", "beta")
        )
        assert not allowed or chosen[block] == current[block]


def test_replicas_take_only_room_that_is_not_reserved() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "beta", "alpha"]
    # Beta needs 1800 bytes for its own blocks. Gamma, without blocks, has room for two replicas, delta for none.
    small = cluster({"alpha": "1600 B", "beta": "1899 B", "gamma": "200 B", "delta": "99 B"})
    assert choose_stand_bys(small, features(), placement, NODES, {}) == {2: "gamma", 3: "gamma"}


def test_neighbouring_blocks_are_replicated_together_on_the_node_with_most_room() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "alpha", "alpha"]
    chosen = choose_stand_bys(cluster({"delta": "20 KiB", "beta": "15 KiB"}), features(), placement, NODES, {})
    assert chosen == {1: "beta", 2: "delta", 3: "delta", 4: "delta"}
