"""The rules of measuring again: when a doubted node reports, how often doubted links are measured, how long moves wait.

Times and doubts are handed in: a cluster and the simulator measure again by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

__all__ = ["MEASURED_AGAIN_S", "MOST_MEASUREMENTS", "PAUSE_S", "SETTLE_S", "Link", "RepeatedMeasurements", "Series"]

MEASURED_AGAIN_S = 0.3  # a node that is doubted reports at once, but not more often than this
# A link that is still doubted is measured so many times, with pauses: what delays one message has passed then.
MOST_MEASUREMENTS, PAUSE_S = 3, 0.1
# A move away from a link waits so long for what is known about others that are doubted. A radio that degrades takes all
# links of its node, one detected after the other, and a move to another of them would have to be undone.
SETTLE_S = 0.6
Link = tuple[str, str]  # from one node to another; from a node to itself it stands for the node


@dataclass
class Series:
    """The measurements of some links that came into doubt together. `left` are those to be measured next."""

    links: tuple[Link, ...]
    left: list[Link] = field(default_factory=list)
    times: int = 0  # measurements so far

    def measured(self, doubted: Collection[Link]) -> None:
        """A measurement has ended, and now these links are doubted: only they are measured again."""
        self.times += 1
        self.left = [link for link in self.left if link in doubted]

    @property
    def is_over(self) -> bool:
        """Whether nothing is measured again: no link is doubted any more, or they were measured often enough."""
        return not self.left or self.times >= MOST_MEASUREMENTS


class RepeatedMeasurements:
    """The nodes of one cluster that were asked to report, and the links that are measured now."""

    def __init__(self) -> None:
        self._asked_s: dict[str, float] = {}  # by node
        self._links: set[Link] = set()  # of all series that are under way

    @property
    def are_under_way(self) -> bool:
        """Whether any link is measured, or will be after a pause."""
        return bool(self._links)

    def ask(self, node: str, now_s: float) -> bool:
        """Whether a doubted node is to report now. If it is, it counts as asked."""
        if now_s < self._asked_s.get(node, -math.inf) + MEASURED_AGAIN_S:
            return False
        self._asked_s[node] = now_s
        return True

    def begin(self, links: Sequence[Link]) -> Series | None:
        """The series that begins for doubted links; None if all of them are in one that is under way."""
        new = [link for link in links if link not in self._links]
        self._links.update(new)
        return Series(tuple(new), new) if new else None

    def end(self, series: Series) -> None:
        """A series is over: its links may be measured anew."""
        self._links.difference_update(series.links)
