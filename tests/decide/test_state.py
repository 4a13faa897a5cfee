"""The history of moves and the bars on placements."""

from __future__ import annotations

import math
from dataclasses import replace

from pydantic import TypeAdapter

from resplit.decide import History, PastMove, Settings
from resplit.decide.state import Barred, similar

OLD, NEW = ("a",) * 20, ("a",) * 10 + ("b",) * 10
SETTINGS = Settings(bar_s=100.0)


def test_only_a_placement_that_was_rolled_back_is_barred_and_only_for_a_time() -> None:
    move = PastMove(5.0, "re-split", OLD, NEW, 1.0, 1.1)
    assert not History().moved(move, SETTINGS).bars(NEW, 6.0)
    undone = History().moved(PastMove(50.0, "rollback", NEW, OLD, 2.0, 1.1), SETTINGS)
    assert undone.bars(NEW, 149.0)
    assert not undone.bars(NEW, 150.0)
    assert not undone.bars(OLD, 60.0)
    assert undone.moved(PastMove(200.0, "re-split", OLD, NEW, 1.0, 1.1), SETTINGS).barred == ()


def test_the_history_holds_the_last_move_and_forgets_bars_that_have_ended() -> None:
    undone = History().moved(PastMove(50.0, "rollback", NEW, OLD, 2.0, 1.1), SETTINGS)
    again = PastMove(149.0, "rollback", OLD, NEW, 1.0, 1.1)
    both = undone.moved(again, SETTINGS)
    assert both.last == again
    assert both.barred == (Barred(NEW, 150.0), Barred(OLD, 249.0))
    last = replace(again, at_s=150.0, action="re-split")
    assert both.moved(last, SETTINGS) == History(last, (Barred(OLD, 249.0),))


def test_a_move_that_is_told_late_adds_its_bar_but_does_not_replace_a_newer_move() -> None:
    newer = PastMove(60.0, "redistribute", OLD, NEW, 1.0, 1.1)
    late = PastMove(50.0, "rollback", NEW, OLD, 2.0, 1.1)
    assert History().moved(newer, SETTINGS).moved(late, SETTINGS) == History(newer, (Barred(NEW, 150.0),))


def test_a_move_away_from_an_overloaded_placement_survives_json() -> None:
    history, json = History(PastMove(5.0, "re-split", OLD, NEW, None, math.inf)), TypeAdapter(History)
    assert json.validate_json(json.dump_json(history)) == history


def test_placements_that_differ_in_at_most_a_tenth_of_the_blocks_are_similar() -> None:
    assert similar(NEW, ("a",) * 12 + ("b",) * 8)
    assert not similar(NEW, ("a",) * 13 + ("b",) * 7)
