"""Random numbers for the noise of times and reports."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["normals"]

_AT_ONCE = 1024


def normals(rng: np.random.Generator) -> Iterator[float]:
    """The same standard normal numbers that `rng` gives one by one, but drawn many at once, which takes less time."""
    while True:
        yield from rng.standard_normal(_AT_ONCE).tolist()
