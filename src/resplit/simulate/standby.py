"""Stand-by blocks of the nodes in simulated time, as `node/standby.py` and `node/memory.py` keep them.

They use only memory that is free, and are dropped before anything else, the least wanted first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from resplit.node.standby import REST
from resplit.simulate.agenda import Agenda

__all__ = ["SimulatedStandby"]


class SimulatedStandby:
    """The blocks that stand by on each of `nodes`. `load_s` says how long a node takes to load a block.

    `holds` says whether a node has a block for an epoch, `free_bytes` how much memory a node has beside what epochs
    and caches take.
    """

    def __init__(
        self,
        nodes: Sequence[str],
        weight_bytes: Sequence[float],
        load_s: Callable[[str, int], float],
        holds: Callable[[str, int], bool],
        free_bytes: Callable[[str], float],
        agenda: Agenda,
    ) -> None:
        self._weight_bytes = weight_bytes
        self._load_s = load_s
        self._holds = holds
        self._free_bytes = free_bytes
        self._agenda = agenda
        self._wanted: dict[str, tuple[int, ...]] = dict.fromkeys(nodes, ())  # the most wanted first
        self._loaded: dict[str, list[int]] = {node: [] for node in nodes}  # in the same order
        self._loading: set[str] = set()  # nodes that load a block, or rest after one

    def keep(self, wanted: Mapping[str, Sequence[int]]) -> None:
        """Tell each node what to keep ready from now on."""
        for node, blocks in wanted.items():
            self._wanted[node] = tuple(blocks)
            loaded = self._loaded[node]
            loaded[:] = sorted((block for block in loaded if block in blocks), key=list(blocks).index)
            self._load_next(node)

    def of(self, node: str) -> tuple[int, ...]:
        """The blocks that stand by on a node now."""
        loaded = self._loaded[node]
        free_bytes = self._free_bytes(node) - sum(self._weight_bytes[block] for block in loaded)
        while loaded and free_bytes < 0:
            free_bytes += self._weight_bytes[loaded.pop()]
        return tuple(loaded)

    def claim(self, node: str, block: int) -> bool:
        """Whether an epoch takes a block that stands by, which then does so no more."""
        if block not in self.of(node):
            return False
        self._loaded[node].remove(block)
        return True

    def retire(self, node: str, block: int) -> None:
        """An epoch needs a block no more: it becomes the least wanted one, if it is wanted."""
        if block in self._wanted[node]:
            self._loaded[node].append(block)

    def forget(self, node: str) -> None:
        """A node went down, with all that stood by."""
        self._loaded[node].clear()
        self._wanted[node] = ()

    def _load_next(self, node: str) -> None:
        if node in self._loading:
            return
        ready = self.of(node)
        for block in self._wanted[node]:
            if block not in ready and not self._holds(node, block) and self._has_room(node, block):
                self._loading.add(node)
                took_s = self._load_s(node, block)
                self._agenda.after(took_s, self._loaded_one, node, block, took_s)
                return

    def _loaded_one(self, node: str, block: int, took_s: float) -> None:
        if block in self._wanted[node] and not self._holds(node, block) and self._has_room(node, block):
            loaded, order = self._loaded[node], list(self._wanted[node])
            loaded[:] = sorted({*loaded, block}, key=order.index)
        self._agenda.after(REST * took_s, self._rested, node)

    def _rested(self, node: str) -> None:
        self._loading.discard(node)
        self._load_next(node)

    def _has_room(self, node: str, block: int) -> bool:
        taken = sum(self._weight_bytes[each] for each in self.of(node))
        return self._weight_bytes[block] <= self._free_bytes(node) - taken
