"""The runs of the study of all scenarios."""

from __future__ import annotations

from flows.study_all import with_plain_runs


def test_a_saturated_run_needs_the_plain_run_in_whose_row_it_stands() -> None:
    assert with_plain_runs(["static-saturated", "adaptive", "adaptive-saturated"]) == [
        "static",
        "static-saturated",
        "adaptive",
        "adaptive-saturated",
    ]
