"""The memory of decisions."""

from __future__ import annotations

from resplit.decide import History, PastMove, Settings
from resplit.decide.state import alike

OLD, NEW = ("a",) * 20, ("a",) * 10 + ("b",) * 10
OPTIONS = Settings(bar_s=100.0)


def test_only_what_was_rolled_back_is_barred_and_not_for_ever() -> None:
    move = PastMove(5.0, "re-split", OLD, NEW, 1.0, 1.1)
    assert not History().moved(move, OPTIONS).bars(NEW, 6.0)
    undone = History().moved(PastMove(50.0, "rollback", NEW, OLD, 2.0, 1.1), OPTIONS)
    assert undone.bars(NEW, 149.0)
    assert not undone.bars(NEW, 150.0)
    assert not undone.bars(OLD, 60.0)
    assert undone.moved(PastMove(200.0, "re-split", OLD, NEW, 1.0, 1.1), OPTIONS).barred == ()


def test_a_cut_shifted_by_a_block_or_two_of_twenty_is_the_same_idea() -> None:
    assert alike(NEW, ("a",) * 12 + ("b",) * 8)
    assert not alike(NEW, ("a",) * 13 + ("b",) * 7)
