"""Garbage collections while millions of objects are made."""

import gc

import pytest

from resplit.process.garbage import rare_collections


class Node:
    def __init__(self) -> None:
        self.other = self  # only a collection frees it


def collections(objects: int) -> int:
    """How many collections the making of so many objects causes, all of which are garbage."""
    before = sum(generation["collections"] for generation in gc.get_stats())
    for _ in range(objects):
        Node()
    return sum(generation["collections"] for generation in gc.get_stats()) - before


def test_garbage_is_collected_rarely_meanwhile_and_as_usual_afterwards() -> None:
    usual = collections(100_000)
    with rare_collections():
        assert collections(100_000) < usual / 10
        assert collections(500_000) >= 1  # but it is
    assert collections(100_000) == pytest.approx(usual, abs=2)


def test_collections_are_as_usual_after_an_error_too() -> None:
    usual = gc.get_threshold()
    with pytest.raises(ValueError, match="meanwhile"), rare_collections():
        raise ValueError("meanwhile")
    assert gc.get_threshold() == usual
