"""Creates HiGHS solver instances that print nothing."""

from __future__ import annotations

from typing import Any

import highspy
from highspy._core import _Highs  # `highspy.Highs` prints a banner on standard output before it can be silenced

__all__ = ["quiet_highs"]


def quiet_highs(**options: bool | int | float | str) -> Any:
    """A HiGHS instance without output, with one thread and with `options`. Raises ValueError for an invalid option.

    The result is `Any`, as highspy has no type annotations.
    """
    highs = _Highs()
    for name, value in {"output_flag": False, "threads": 1, **options}.items():
        if highs.setOptionValue(name, value) != highspy.HighsStatus.kOk:
            raise ValueError(f"HiGHS refuses {name} = {value}")
    return highs
