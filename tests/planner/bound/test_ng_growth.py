"""The growth of ng-neighbourhoods."""

from __future__ import annotations

import numpy as np

from resplit.planner.bound.ng_growth import MAX_LABELS, NeighbourhoodGrowth
from resplit.planner.bound.ng_paths import Cycle, Neighbourhoods

CYCLES = [Cycle(0, (1,), 0.3), Cycle(2, (1, 3), 0.2), Cycle(3, (2,), 0.1), Cycle(1, (0, 2), 0.05)]


def covered(neighbourhoods: Neighbourhoods) -> list[bool]:
    return [bool(neighbourhoods.contains[list(cycle.between), cycle.node].all()) for cycle in CYCLES]


def test_the_cycles_with_the_largest_gain_are_excluded_first() -> None:
    growth = NeighbourhoodGrowth(Neighbourhoods.of(4))

    assert growth.extend(CYCLES, few_labels=True)

    assert covered(growth.neighbourhoods) == [True, True, True, False]


def test_too_many_labels_lead_to_fewer_cycles_then_to_others_and_finally_to_more_labels() -> None:
    growth = NeighbourhoodGrowth(Neighbourhoods.of(4))
    growth.extend(CYCLES, few_labels=True)
    seen = []

    while growth.reduce():
        seen.append(covered(growth.neighbourhoods))

    assert seen[:4] == np.eye(4, dtype=bool).tolist()
    assert growth.max_labels == MAX_LABELS


def test_affordable_neighbourhoods_are_kept() -> None:
    growth = NeighbourhoodGrowth(Neighbourhoods.of(4))
    growth.extend(CYCLES[:1], few_labels=True)
    growth.extend(CYCLES[1:], few_labels=False)

    growth.reduce()

    assert covered(growth.neighbourhoods)[0]


def test_exact_states_are_used_once_no_cycle_is_left() -> None:
    growth = NeighbourhoodGrowth(Neighbourhoods.of(4, coarse=True))

    assert growth.neighbourhoods.coarse
    assert growth.extend([], few_labels=True)
    assert not growth.neighbourhoods.coarse
    assert not growth.extend([], few_labels=True)
