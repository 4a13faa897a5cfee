"""The budget of a solver."""

from __future__ import annotations

import math

import pytest

from resplit.planner.budget import UNLIMITED, Budget


def test_a_work_limit_counts_steps_and_has_no_deadline() -> None:
    budget = Budget(0.0, work_limit=3)

    assert [budget.spend() for _ in range(3)] == [True, True, False]

    assert budget.spent
    assert budget.left_s == math.inf


def test_a_time_limit_is_spent_once_its_seconds_are_over() -> None:
    assert Budget(0.0).spent
    assert not Budget(60.0).spent
    assert not UNLIMITED.spent


def test_steps_spent_on_a_part_are_spent_on_the_whole() -> None:
    whole = Budget(1.0, work_limit=100)
    part = whole.part(0.25)

    part.spend(20)

    assert (part.steps_left, whole.steps_left) == (6, 80)
    assert whole.share_spent == pytest.approx(0.2)


def test_a_part_has_no_more_steps_than_the_whole() -> None:
    assert Budget(1.0, work_limit=0).part(1.0).steps_left == 0
    assert Budget(1.0, work_limit=5).part(1.0).steps_left == 5


def test_a_part_of_a_time_limit_ends_before_the_whole() -> None:
    whole = Budget(100.0)

    assert 49.0 < whole.part(0.5).left_s <= 50.0
