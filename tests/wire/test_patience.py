"""Some useless messages are accepted at once, and a few in each second."""

from __future__ import annotations

from resplit.wire.patience import Patience


def test_the_first_ones_are_borne_and_the_next_after_a_while() -> None:
    patience = Patience(most=3, per_s=2)
    assert [patience.note(10.0) for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    assert patience.note(11.0) == 0.5
    assert patience.note(100.0) == 0.0


def test_a_large_message_counts_as_several() -> None:
    assert Patience(most=3, per_s=2).note(10.0, 5.0) == 1.0
