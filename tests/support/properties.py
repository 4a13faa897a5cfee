"""How many random examples a test tries: all that it asks for, or a tenth when the tests are to be quick."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

_QUICK = os.environ.get("RESPLIT_QUICK_TESTS") == "1"
_MIN_EXAMPLES = 3


def repeats(count: int) -> int:
    """`count`, or with RESPLIT_QUICK_TESTS=1 (`make test-fast`) a tenth of it."""
    return max(_MIN_EXAMPLES, count // 10) if _QUICK else count


def examples(count: int, **options: Any) -> settings:
    """Settings for `repeats(count)` examples, without a deadline: a slow machine does not make a property fail."""
    return settings(max_examples=repeats(count), deadline=None, **options)
