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
    """A chain of blocks of 500 bytes; the first layer is private. A cached token takes 10 bytes of each layer."""
    kinds = ["embed", *["layer"] * (BLOCKS - 2), "head"]
    return tuple(
        BlockFeatures(f"{kind}.{i}", kind, 1, 1, 1, 500, 10 if kind == "layer" else 0, 1, i < 2, 0)  # type: ignore[arg-type]
        for i, kind in enumerate(kinds)
    )


@given(placements, st.sets(st.sampled_from(NODES)), st.dictionaries(st.sampled_from(CACHED), st.sampled_from(NODES)))
def test_a_copy_is_never_with_its_host_nor_with_a_node_that_may_not_have_it(
    placement: list[str], answering: set[str], kept: dict[int, str]
) -> None:
    chosen = choose_stand_bys(cluster({}), features(), placement, answering, kept)
    assert all(chosen[block] in answering - {placement[block]} for block in chosen)
    assert chosen.get(1, "alpha") in ("alpha", "beta")
    for block in set(chosen) & set(kept):  # who keeps a copy goes on, where it may
        allowed = kept[block] in answering - {placement[block]} and (block != 1 or kept[block] in ("alpha", "beta"))
        assert not allowed or chosen[block] == kept[block]


def test_a_node_keeps_copies_only_in_room_that_nothing_is_reserved_in() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "beta", "alpha"]
    # beta: 1800 bytes for its own; gamma and delta host nothing: one has room for two copies, the other for none.
    small = cluster({"alpha": "1600 B", "beta": "1899 B", "gamma": "200 B", "delta": "99 B"})
    assert choose_stand_bys(small, features(), placement, NODES, {}) == {2: "gamma", 3: "gamma"}


def test_neighbours_are_kept_together_where_there_is_most_room() -> None:
    placement = ["alpha", "alpha", "beta", "beta", "alpha", "alpha"]
    chosen = choose_stand_bys(cluster({"delta": "20 KiB", "beta": "15 KiB"}), features(), placement, NODES, {})
    assert chosen == {1: "beta", 2: "delta", 3: "delta", 4: "delta"}
