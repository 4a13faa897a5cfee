"""How much memory a session's caches take: what they use, in steps, not what they may grow to."""

from __future__ import annotations

_STEP = 16  # positions; gateway and nodes count alike, so that what one grants the others have


def cache_room(positions: int, capacity: int) -> int:
    """The positions for which a session that caches `positions` of at most `capacity` takes room."""
    return min(capacity, -(-positions // _STEP) * _STEP)
