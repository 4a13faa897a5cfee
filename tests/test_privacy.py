"""The privacy rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.privacy import exposed_blocks


@dataclass(frozen=True)
class Block:
    private: bool


PRIVATE, PUBLIC = Block(True), Block(False)


def test_only_private_blocks_on_untrusted_nodes_are_exposed() -> None:
    blocks = [PRIVATE, PRIVATE, PUBLIC, PUBLIC, PRIVATE]
    assert exposed_blocks(["a", "b", "a", "b", "b"], blocks, {"a"}) == [1, 4]
    assert exposed_blocks(["a", "b", "a", "b", "b"], blocks, ("a", "b")) == []


@given(cells=st.lists(st.tuples(st.sampled_from("abc"), st.booleans())), trusted=st.frozensets(st.sampled_from("abc")))
def test_no_block_is_exposed_exactly_when_each_private_block_is_on_a_trusted_node(
    cells: list[tuple[str, bool]], trusted: frozenset[str]
) -> None:
    exposed = exposed_blocks([node for node, _ in cells], [Block(private) for _, private in cells], trusted)
    assert (exposed == []) == all(node in trusted for node, private in cells if private)
    assert exposed == sorted(exposed)


def test_a_placement_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="longer"):
        exposed_blocks(["a"], [PRIVATE, PRIVATE], ["a"])
