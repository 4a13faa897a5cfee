"""What of a session's caches can be restored, and who keeps copies: over all ways in which they may lie about."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from resplit.gateway.sessions.kv_transfer import plan_restore

NODES = ("alpha", "beta", "gamma", "delta")
BLOCKS = 6
CACHED = range(1, BLOCKS - 1)

placements = st.lists(st.sampled_from(NODES), min_size=BLOCKS, max_size=BLOCKS)
lengths = st.dictionaries(st.sampled_from(CACHED), st.integers(0, 40))
helds = st.dictionaries(st.sampled_from(NODES), lengths)


@given(helds, placements, st.lists(st.integers(1, 12), max_size=12))
def test_what_is_restored_is_whole_passes_as_many_as_every_block_has(
    held: dict[str, dict[int, int]], placement: list[str], steps: list[int]
) -> None:
    plan = plan_restore(held, placement, CACHED, steps)
    assert plan.positions == sum(steps[: plan.steps])
    best = [max((there.get(block, 0) for there in held.values()), default=0) for block in CACHED]
    assert plan.positions == max([0, *(end for end in accumulate(steps) if end <= min(best))])


@given(helds, placements, st.lists(st.integers(1, 12), max_size=12))
def test_once_all_caches_have_gone_their_ways_each_host_has_what_is_restored(
    held: dict[str, dict[int, int]], placement: list[str], steps: list[int]
) -> None:
    plan = plan_restore(held, placement, CACHED, steps)
    there = {block: held.get(placement[block], {}).get(block, 0) for block in CACHED}
    for transfer in plan.transfers:
        assert transfer.first == there[transfer.block]  # no hole, and nothing twice
        assert held[transfer.source][transfer.block] >= transfer.last
        assert transfer.target == placement[transfer.block] != transfer.source
        there[transfer.block] = transfer.last
    assert all(length >= plan.positions for length in there.values())


def test_nothing_goes_anywhere_where_every_host_has_kept_its_caches() -> None:
    held = {"alpha": {1: 9, 2: 9}, "beta": {3: 9, 4: 9}}
    plan = plan_restore(held, ["alpha"] * 3 + ["beta"] * 3, CACHED, [7, 1, 1])
    assert (plan.steps, plan.positions, plan.transfers) == (3, 9, ())
