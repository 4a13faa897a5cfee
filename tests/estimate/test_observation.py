"""Recorded observations: kept as text, and shown to the detector again."""

from __future__ import annotations

import numpy as np
import pytest

from resplit.estimate import RECORDING
from tests.support.near_and_far import EVERY_S, PASSES, recorded

NOTICED_WITHIN = 3  # passes after a node became twice as slow


def test_a_recording_is_the_same_after_it_was_written_and_read() -> None:
    recording = recorded(0)
    again = RECORDING.validate_json(RECORDING.dump_json(recording))
    assert again.observations[2:] == recording.observations[2:]
    assert np.isnan(again.observations[1].node.reference_s)  # type: ignore[union-attr]
    assert again.duration_s == pytest.approx((PASSES - 1) * EVERY_S)


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_becomes_twice_as_slow_is_noticed_within_a_few_passes_and_nothing_else_is(seed: int) -> None:
    slow_from = PASSES // 2
    (change,) = recorded(seed, slow_from).changes()
    assert change.subject == "far"
    assert slow_from <= change.at_s / EVERY_S < slow_from + NOTICED_WITHIN
