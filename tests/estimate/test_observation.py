"""Recorded observations: kept as text, and shown to the detector again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.alarms import read, replayed
from resplit.errors import DataError
from resplit.estimate import RECORDING, LinkSeen, NodeSeen, Observation, Recording
from tests.estimate.test_calm import EVERY_S, calm_pass, linked
from tests.estimate.test_cluster import FEATURES, model

PASSES = 3000
NOTICED_WITHIN = 3  # passes after a node became twice as slow


def recorded(seed: int, slow_from: int = PASSES) -> Recording:
    """Passes and probes with noise and stalls. The node "far" is twice as slow from pass `slow_from` on."""
    rng = np.random.default_rng(seed)
    seen = [Observation(0.0, cost=linked(model())), Observation(0.0, node=NodeSeen("spare", float("nan"), 0.1))]
    for index, at_s in enumerate(np.arange(0.0, PASSES * EVERY_S, EVERY_S).tolist()):
        done = calm_pass(rng, at_s)
        if index >= slow_from:
            near, far = done.segments
            far = replace(far, computed_s=2 * far.computed_s, first_half_s=2 * far.first_half_s)
            done = replace(done, segments=(near, far))
        seen.append(Observation(at_s, done=done))
        if index % 10 == 0:
            seen += [Observation(at_s, link=LinkSeen("near", "far", 64, 0.004 * float(rng.uniform(1.0, 1.5))))]
    return Recording(FEATURES, "near", tuple(seen))


def test_a_recording_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    path, recording = tmp_path / "calm.json", recorded(0)
    path.write_bytes(RECORDING.dump_json(recording))
    again = read(path)
    assert again.observations[2:] == recording.observations[2:]
    assert np.isnan(again.observations[1].node.reference_s)  # type: ignore[union-attr]
    assert again.duration_s == pytest.approx((PASSES - 1) * EVERY_S)


def test_alarms_are_counted_by_the_hour(tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_bytes(RECORDING.dump_json(recorded(0, slow_from=PASSES // 2)))
    assert " times slower\n" in replayed([path])
    assert replayed([path, path]).endswith("2 alarms in 1200 s: 6.0 in an hour")


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.json: is no recording"):
        read(tmp_path / "other.json")


@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_becomes_twice_as_slow_is_noticed_within_a_few_passes_and_nothing_else_is(seed: int) -> None:
    slow_from = PASSES // 2
    (change,) = recorded(seed, slow_from).changes()
    assert change.subject == "far"
    assert slow_from <= change.at_s / EVERY_S < slow_from + NOTICED_WITHIN
