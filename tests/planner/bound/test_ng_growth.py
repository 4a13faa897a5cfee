from __future__ import annotations

import numpy as np

from resplit.planner.bound.ng_growth import MOST_LABELS, Curriculum
from resplit.planner.bound.ng_paths import Detour, Memory

DETOURS = [Detour(0, (1,), 0.3), Detour(2, (1, 3), 0.2), Detour(3, (2,), 0.1), Detour(1, (0, 2), 0.05)]


def remembered(memory: Memory) -> list[bool]:
    return [bool(memory.near[list(detour.between), detour.node].all()) for detour in DETOURS]


def test_the_most_harmful_detours_are_remembered_first() -> None:
    plan = Curriculum(Memory.of(4))

    assert plan.learn(DETOURS, few=True)

    assert remembered(plan.memory) == [True, True, True, False]


def test_too_many_labels_lead_to_fewer_detours_then_to_others_and_at_last_to_more_labels() -> None:
    plan = Curriculum(Memory.of(4))
    plan.learn(DETOURS, few=True)
    seen = []

    while plan.retreat():
        seen.append(remembered(plan.memory))

    assert seen[:4] == np.eye(4, dtype=bool).tolist()
    assert plan.most_labels == MOST_LABELS


def test_what_was_affordable_stays_in_mind() -> None:
    plan = Curriculum(Memory.of(4))
    plan.learn(DETOURS[:1], few=True)
    plan.learn(DETOURS[1:], few=False)

    plan.retreat()

    assert remembered(plan.memory)[0]


def test_whole_contents_count_once_nothing_else_is_left_to_remember() -> None:
    plan = Curriculum(Memory.of(4, coarse=True))

    assert plan.memory.coarse
    assert plan.learn([], few=True)
    assert not plan.memory.coarse
    assert not plan.learn([], few=True)
