"""Which detours the paths shall remember next: a few at a time, fewer where labels become too many. Prices nothing."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field

from resplit.planner.bound.ng_paths import Detour, Memory

__all__ = ["Curriculum"]

LEAST_PORTION = 3  # detours at once, or a quarter of the nodes
FIRST_LABELS, MOST_LABELS = 400_000, 1_600_000  # of one pricing: about 0.3 and 1 s


@dataclass
class Curriculum:
    """`memory` is what the paths remember now, `safe` what they remembered when that was last affordable."""

    memory: Memory
    most_labels: int = FIRST_LABELS
    safe: Memory = field(init=False)
    _pending: list[Detour] = field(default_factory=list)
    _portion: int = field(init=False)
    _refined: bool = False  # whether exact contents were tried
    _dear: set[tuple[int, tuple[int, ...]]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.safe = self.memory
        self._portion = self._usual = max(LEAST_PORTION, len(self.memory.near) // 4)

    def afresh(self) -> Curriculum:
        """The same, with what was too dear before to be tried again: for fewer placements."""
        new = copy(self)
        new._pending, new._dear = list(self._pending), set()
        return new

    def learn(self, detours: list[Detour], few: bool) -> bool:
        """Takes up the most harmful of the `detours` that the last mixture took, more while the labels are `few`;
        False where none is left."""
        self.safe = self.memory
        self._pending = [detour for detour in detours if (detour.node, detour.between) not in self._dear]
        self._portion = self._usual if few else min(self._portion, LEAST_PORTION)
        return self._advance()

    def retreat(self) -> bool:
        """The labels were too many: takes up fewer of the same detours, or others; False where none is left."""
        if self._portion > 1 and len(self._pending) > 1:
            self._portion = max(1, min(self._portion, len(self._pending)) // 3)
        elif self._pending:
            tried = self._pending.pop(0)
            self._dear.add((tried.node, tried.between))
        return self._advance()

    def _advance(self) -> bool:
        while self._pending:
            memory = self.safe.joined(self._pending[: self._portion])
            if memory.fits:
                self.memory = memory
                return True
            self._pending.pop()
        if self.safe.coarse and not self._dear and not self._refined:
            self.memory, self._refined = Memory(self.safe.near, coarse=False), True
            return True
        return self._afford_more()

    def _afford_more(self) -> bool:
        """More labels, once nothing else is left to try with fewer."""
        if not self._dear or self.most_labels >= MOST_LABELS:
            return False
        self.most_labels = MOST_LABELS
        self._dear.clear()
        self.memory = self.safe
        return True
