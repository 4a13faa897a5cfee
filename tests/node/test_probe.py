"""Block timings in telemetry: some of every kind, but not too many."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.node.probe import some_of_each
from resplit.telemetry.rows import BlockRow
from tests.support.properties import examples

PASSES = st.lists(
    st.tuples(st.sampled_from(["embed", "layer", "head"]), st.sampled_from(["prefill", "decode"]), st.integers(1, 3)),
    max_size=200,
)


@examples(100, suppress_health_check=[HealthCheck.too_slow])
@given(passes=PASSES)
def test_between_four_and_eight_timings_of_each_kind_of_pass_are_reported(passes: list[tuple[str, str, int]]) -> None:
    rows = [
        BlockRow(float(number), "a", kind, kind, phase, 1, 0, sessions, 0.1, emulated=True)
        for number, (kind, phase, sessions) in enumerate(passes)
    ]
    reported = some_of_each(rows)
    before, after = (Counter((row.kind, row.phase, row.sessions > 1) for row in each) for each in (rows, reported))
    assert set(after) == set(before)
    assert all(min(4, before[key]) <= number <= 8 for key, number in after.items())
    assert [row for row in rows if row in reported] == sorted(reported, key=lambda row: row.time_s)
