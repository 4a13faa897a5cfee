"""Compiled functions, with and without a folder for the compiled code."""

from __future__ import annotations

import pytest
from numba.core import caching

from resplit.planner.kernels import kernel


def test_without_a_folder_to_write_to_a_function_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # what a user without a home finds

    @kernel()
    def twice(number):
        return 2 * number

    assert twice(21) == 42
