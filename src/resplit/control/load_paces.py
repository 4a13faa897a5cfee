"""How long a node may take to load blocks: as long as the bytes need at the pace of earlier loads, with a margin.

A slow node cannot extend this time without end: paces below a fixed one do not count.
"""

from __future__ import annotations

import statistics
from collections import defaultdict

# The pace before anything was loaded, and the slowest that counts: a registry behind a link of about 34 Mbit/s.
SLOWEST_BYTES_PER_S = 4 * 2**20
_MARGIN = 4.0  # a load may take so many times as long as earlier ones: a registry or a disk may be busy


class LoadPaces:
    """The paces at which the nodes of one cluster loaded blocks so far."""

    def __init__(self) -> None:
        self._loads: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))  # bytes and seconds

    def note(self, node: str, loaded_bytes: float, seconds: float) -> None:
        """Note a load of a node."""
        if loaded_bytes > 0 and seconds > 0:
            before_bytes, before_s = self._loads[node]
            self._loads[node] = before_bytes + loaded_bytes, before_s + seconds

    def limit_s(self, node: str, load_bytes: float) -> float:
        """The seconds in which a node must have loaded this many bytes.

        A node that has loaded nothing so far is expected to be as fast as the median of the others.
        """
        paces = {name: loaded / seconds for name, (loaded, seconds) in self._loads.items()}
        usual = paces.get(node) or (statistics.median(paces.values()) if paces else 0.0)
        return load_bytes / max(SLOWEST_BYTES_PER_S, usual / _MARGIN)
