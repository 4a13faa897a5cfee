"""The noise of the simulator."""

from __future__ import annotations

import itertools

import numpy as np

from resplit.simulate.noise import normals


def test_numbers_drawn_at_once_are_those_that_are_drawn_one_by_one() -> None:
    one_by_one = np.random.default_rng(7)

    drawn = list(itertools.islice(normals(np.random.default_rng(7)), 3000))

    assert drawn == [one_by_one.standard_normal() for _ in range(3000)]
