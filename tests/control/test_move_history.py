"""The history of moves: what survives a restart, a damaged file, a full disk, and two loops that move at once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from resplit.control.move_history import Moves
from resplit.decide import History, PastMove, Settings
from resplit.errors import CapacityError, ConfigError

A, B = ("a", "a"), ("a", "b")
SETTINGS = Settings(bar_s=100.0)


def move(at_s: float, action: str = "re-split") -> PastMove:
    return PastMove(at_s, action, B, A, None, 1.1)


def test_a_restart_continues_with_the_moves_and_the_bars_that_were_written(tmp_path: Path) -> None:
    moves = Moves(tmp_path / "history.json")
    assert moves.history == History()
    moves.moved(move(1.0, "rollback"), SETTINGS)
    moves.moved(move(2.0), SETTINGS)
    again = Moves(tmp_path / "history.json").history
    assert again == moves.history
    assert again.last == move(2.0)
    assert again.bars(B, 50.0)


def test_a_move_away_from_an_overloaded_placement_is_written_as_plain_json(tmp_path: Path) -> None:
    moves = Moves(tmp_path / "history.json")
    escape = replace(move(1.0), predicted_before_s=math.inf)
    moves.moved(escape, SETTINGS)
    assert "Infinity" not in (tmp_path / "history.json").read_text()
    assert Moves(tmp_path / "history.json").history.last == escape


def test_a_move_of_one_loop_does_not_undo_a_newer_move_of_the_other(tmp_path: Path) -> None:
    moves = Moves(tmp_path / "history.json")
    moves.moved(move(2.0), SETTINGS)
    moves.moved(move(1.0, "redistribute"), SETTINGS)
    assert moves.history.last == move(2.0)


@pytest.mark.parametrize("content", ["", "{", '{"last": 1}', '{"barred": [{"placement": ["a"]}]}'])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    file = tmp_path / "history.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"history\.json: is not a history of moves"):
        Moves(file)


def test_a_move_counts_although_its_file_cannot_be_written_but_a_history_that_is_set_must_be(tmp_path: Path) -> None:
    moves = Moves(tmp_path / "no such folder" / "history.json")
    moves.moved(move(1.0), SETTINGS)
    assert moves.history.last == move(1.0)
    with pytest.raises(CapacityError, match=r"history\.json: cannot be written \(No such file or directory\)"):
        moves.set(History())
