"""The inputs of a decision besides the problem: settings, measurements and the history of moves.

Values only. Time is passed in as a number, and `History.moved` returns a new history.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, ConfigDict

__all__ = [
    "NOTHING_READY",
    "Barred",
    "History",
    "Measured",
    "PastMove",
    "Placement",
    "Ready",
    "Settings",
    "Unbounded",
    "similar",
]

Placement = tuple[str, ...]
# JSON has no infinity: it is written as null.
Unbounded = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value)]


@dataclass(frozen=True)
class Settings:
    """How readily the orchestrator moves. Shares are relative: 0.05 is 5 %."""

    horizon_s: float = 120.0  # a move must pay off within the requests expected in this time
    threshold: float = 0.05  # least gain per request, as a share of the current objective
    uncertainty_weight: float = 1.0  # this many times the cost model's relative error is added to the threshold
    cooldown_s: float = 30.0  # least time between two optional moves
    trial_s: float = 120.0  # a move is on trial for this time
    trial_requests: int = 10  # least number of requests that can judge a move
    rollback_margin: float = 0.15  # a trial fails if requests take longer by more than this share
    bar_s: float = 600.0  # a placement that was rolled back is not tried again for this time
    switch_s: float = 0.05  # pause of a switch over links without latency
    registry_bytes_per_s: float | None = 1e8  # rate at which a node loads weights; None: over its link from the source
    solver: str = "relax"
    time_limit_s: float = 1.0  # for each of the two plans
    work_limit: int | None = None  # solver steps instead of time, so that answers repeat exactly
    tolerance: float = 0.01  # among plans within this share of the best, the one that moves fewer bytes is taken


@dataclass(frozen=True)
class Measured:
    """Requests that arrived and completed under the current placement, within a window before now.

    `slo_missed` names the classes that missed their service objective; `error_s` is the standard error of the mean
    latency.
    """

    latency_s: float
    requests: int
    slo_missed: tuple[str, ...] = ()
    error_s: float = 0.0


@dataclass(frozen=True)
class PastMove:
    """A change of placement that was deployed at `at_s`.

    `latency_before_s` was measured just before it, with the standard error `error_before_s`; it is None if nothing was
    measured or the old placement could not serve. `predicted_before_s` is the latency at which the old placement was
    priced then.
    """

    at_s: float
    action: str
    before: Placement
    after: Placement
    latency_before_s: float | None
    predicted_before_s: Unbounded  # infinite if the old placement was overloaded
    error_before_s: float = 0.0


@dataclass(frozen=True)
class Barred:
    """A placement that was rolled back and is not tried again before `until_s`."""

    placement: Placement
    until_s: float


@dataclass(frozen=True)
class History:
    """The last move and the barred placements."""

    last: PastMove | None = None
    barred: tuple[Barred, ...] = ()

    def moved(self, move: PastMove, settings: Settings) -> History:
        """The history after `move` was deployed. A rollback bars the placement that it left.

        A loop may report its move after the other loop has moved again: `last` stays the newest move.
        """
        barred = tuple(bar for bar in self.barred if bar.until_s > move.at_s)
        if move.action == "rollback":
            barred += (Barred(move.before, move.at_s + settings.bar_s),)
        newest = self.last if self.last and self.last.at_s > move.at_s else move
        return replace(self, last=newest, barred=barred)

    def bars(self, placement: Placement, now_s: float) -> bool:
        """Whether this placement or a similar one is barred now."""
        return any(bar.until_s > now_s and similar(bar.placement, placement) for bar in self.barred)


@dataclass(frozen=True)
class Ready:
    """What was prepared for likely changes: `placements`, and the `loaded` blocks that no epoch uses, with their nodes.

    A move there need not load them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}  # applies when a flow reads it

    placements: tuple[Placement, ...] = ()
    loaded: frozenset[tuple[int, str]] = frozenset()


NOTHING_READY = Ready()


def similar(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two placements differ in at most a tenth of their blocks, as after a small shift of a cut."""
    return sum(a != b for a, b in zip(one, other, strict=True)) <= len(one) / 10
