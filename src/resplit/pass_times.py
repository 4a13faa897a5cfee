"""Where the time of a pass went: how long it waited and computed at each segment of its route.

Each node measures with its own clock, so clocks need not agree. The gateway measures the whole pass. What is left are
the hops between nodes, messages and all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PassTime", "SegmentTime", "TimeByNode", "TimeSpent"]


@dataclass(frozen=True, slots=True)
class SegmentTime:
    """One segment of a pass: blocks `first..last` on `node`.

    It waited `waited_s` for a batch that took `computed_s`. The batch computed a decode step of `decodes` sessions and
    `prefill_tokens` tokens of a prompt. `background_utilization` is the share of the node that others used meanwhile.
    The first half of the blocks took `first_half_s` of the batch; 0 where that is not known. The prompt's tokens ran
    through all blocks, or through the first or the second half of them only (`prompt_half` 1 or 2).
    """

    node: str
    first: int
    last: int
    waited_s: float
    computed_s: float
    background_utilization: float
    decodes: int
    prefill_tokens: int
    first_half_s: float = 0.0
    prompt_half: int = 0

    def halves(self) -> tuple[SegmentTime, ...]:
        """The segment as two, one for each half of its blocks, if the time of the first one is known.

        They are measured one after the other, so that what delays the node for a moment delays one of them only.
        """
        blocks = self.last - self.first + 1
        if blocks < 2 or not 0 < self.first_half_s < self.computed_s:
            return (self,)
        middle = self.first + blocks // 2
        return (
            self._part(self.first, middle - 1, self.first_half_s, self.prompt_half != 2),
            self._part(middle, self.last, self.computed_s - self.first_half_s, self.prompt_half != 1),
        )

    def _part(self, first: int, last: int, computed_s: float, prefills: bool) -> SegmentTime:
        """As `dataclasses.replace` makes it, in a third of the time: each pass needs two."""
        return SegmentTime(
            self.node,
            first,
            last,
            self.waited_s,
            computed_s,
            self.background_utilization,
            self.decodes,
            self.prefill_tokens if prefills else 0,
        )

    @property
    def node_s(self) -> float:
        """The time of the batch without what background load added."""
        return self.computed_s * (1 - self.background_utilization)


@dataclass(frozen=True, slots=True)
class PassTime:
    """One pass along a route: `tokens` positions from `start` on, ended at `at_s` (monotonic clock of the gateway).

    Where a prompt ran in several parts, the segments are those of the last part. If it `followed` another pass without
    the gateway, it crossed no link from or to the gateway, and began when the token before it came.
    """

    epoch: int
    start: int
    tokens: int
    at_s: float
    total_s: float
    segments: tuple[SegmentTime, ...]
    followed: bool = False

    def spent_s(self) -> tuple[float, float, float]:
        """Seconds in the queues of all nodes, in their batches, and between the nodes.

        Those between the nodes and the gateway are among the latter, unless the pass followed another one.
        """
        waited_s = computed_s = 0.0
        for segment in self.segments:
            waited_s += segment.waited_s
            computed_s += segment.computed_s
        return waited_s, computed_s, max(0.0, self.total_s - waited_s - computed_s)


@dataclass
class TimeSpent:
    """Where the time of several passes went, in seconds."""

    waited_s: float = 0.0
    computed_s: float = 0.0
    hops_s: float = 0.0

    def add(self, done: PassTime) -> None:
        """Add a pass."""
        waited_s, computed_s, hops_s = done.spent_s()
        self.waited_s += waited_s
        self.computed_s += computed_s
        self.hops_s += hops_s


@dataclass
class TimeByNode(TimeSpent):
    """Where the time of `passes` passes went, and how much of it was at each node."""

    passes: int = 0
    nodes: dict[str, TimeSpent] = field(default_factory=dict)

    def add(self, done: PassTime) -> None:
        """Add a pass."""
        super().add(done)
        self.passes += 1
        for segment in done.segments:
            node = self.nodes.get(segment.node) or self.nodes.setdefault(segment.node, TimeSpent())
            node.waited_s += segment.waited_s
            node.computed_s += segment.computed_s
