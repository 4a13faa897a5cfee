"""The check whether a result of Great Expectations can be trusted."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.expectations import conclusive

NONE = {"raised_exception": False, "exception_message": None}
RAISED = {"raised_exception": True, "exception_message": "no such column"}


def test_success_without_failed_rows_and_failure_with_some_are_conclusive() -> None:
    assert conclusive(True, [], NONE)
    assert conclusive(False, [3], NONE)
    assert conclusive(True, [], {"metric a": NONE, "metric b": NONE})


@pytest.mark.parametrize(
    ("success", "rows", "exceptions"),
    [
        (True, [3], NONE),
        (False, [], NONE),
        (True, None, NONE),
        (False, None, NONE),
        (True, [], RAISED),
        (False, [3], RAISED),
        (True, [], {"metric a": NONE, "metric b": RAISED}),
    ],
)
def test_a_contradiction_a_missing_list_or_an_exception_is_not_conclusive(
    success: bool, rows: list[int] | None, exceptions: dict[str, Any]
) -> None:
    assert not conclusive(success, rows, exceptions)
