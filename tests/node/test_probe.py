"""Block timings in telemetry: some of every kind, but not too many."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.node.probe import some_of_each
from tests.support.properties import examples

ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["embed", "layer", "head"]),
            "phase": st.sampled_from(["prefill", "decode"]),
            "sessions": st.integers(1, 3),
        }
    ),
    max_size=200,
)


@examples(100, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS)
def test_between_four_and_eight_timings_of_each_kind_of_pass_are_reported(rows: list[dict[str, Any]]) -> None:
    numbered = [row | {"number": number} for number, row in enumerate(rows)]
    reported = some_of_each(numbered)
    before, after = (
        Counter((row["kind"], row["phase"], row["sessions"] > 1) for row in each) for each in (numbered, reported)
    )
    assert set(after) == set(before)
    assert all(min(4, before[key]) <= number <= 8 for key, number in after.items())
    assert all(row in numbered for row in reported)
