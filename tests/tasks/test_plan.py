"""The files that the control loop keeps between its ticks."""

from __future__ import annotations

import math
from pathlib import Path

from resplit.decide import History, PastMove, Settings
from tasks.plan import load_configurations, load_history, save_history


def test_a_loaded_history_equals_the_saved_one_even_with_an_infinite_price(tmp_path: Path) -> None:
    move = PastMove(3.0, "re-split", ("a", "b"), ("b", "b"), None, math.inf)
    history = History().moved(move, Settings())
    save_history(history, tmp_path / "history.json")
    assert load_history(tmp_path / "history.json") == history
    assert load_history(tmp_path / "none.json") == History()


def test_only_configurations_that_were_kept_are_found(tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    assert load_configurations(tmp_path, [1, 2, 3]) == {2: tmp_path / "2"}
