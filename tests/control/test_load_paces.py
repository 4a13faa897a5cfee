"""How long a node may take to load blocks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.control.load_paces import SLOWEST_BYTES_PER_S, LoadPaces

MIB = 2**20
LOADS = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1e12), st.floats(0, 1e6)), max_size=20)


def test_before_any_load_the_slowest_pace_counts() -> None:
    assert LoadPaces().limit_s("a", 100 * MIB) == pytest.approx(25.0)


def test_a_load_may_take_four_times_as_long_as_the_nodes_earlier_ones() -> None:
    paces = LoadPaces()
    paces.note("a", 300 * MIB, 2.0)
    paces.note("a", 100 * MIB, 2.0)
    assert paces.limit_s("a", 100 * MIB) == 4.0


def test_the_paces_of_other_nodes_do_not_count_for_a_node_that_has_loaded() -> None:
    paces = LoadPaces()
    for node, seconds in (("a", 2.0), ("b", 1.0), ("c", 1.0)):
        paces.note(node, 100 * MIB, seconds)
    assert paces.limit_s("a", 100 * MIB) == 8.0


def test_a_node_that_loaded_nothing_is_expected_to_be_as_fast_as_the_median_of_the_others() -> None:
    paces = LoadPaces()
    for node, seconds in (("a", 0.5), ("b", 1.0), ("c", 1e6)):
        paces.note(node, 100 * MIB, seconds)
    assert paces.limit_s("d", 100 * MIB) == pytest.approx(4.0)


@given(LOADS, st.floats(0, 1e12))
def test_no_node_can_draw_its_time_out_beyond_the_slowest_pace(
    loads: list[tuple[str, float, float]], wanted: float
) -> None:
    paces = LoadPaces()
    for load in loads:
        paces.note(*load)
    assert 0 <= paces.limit_s("a", wanted) <= wanted / SLOWEST_BYTES_PER_S
