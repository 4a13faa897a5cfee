"""What a decision is made from besides the problem: settings, what was measured, and what was done before.

Values only: time comes in as a number, and a new history is returned, never changed in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["Barred", "History", "Measured", "PastMove", "Settings", "alike"]

Placement = tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    """How eager to move. Shares are relative (0.05 is 5 %)."""

    horizon_s: float = 120.0  # a move must pay for itself by the requests expected in this time
    threshold: float = 0.05  # least gain per request, as a share of today's objective ...
    uncertainty_weight: float = 1.0  # ... to which this many times the cost model's relative error is added
    cooldown_s: float = 30.0  # after a move, none for its own sake
    trial_s: float = 120.0  # a move is on trial for so long
    trial_requests: int = 10  # and is judged by at least so many requests
    rollback_margin: float = 0.15  # undone where requests take longer than they would have without it by more
    bar_s: float = 600.0  # what was undone is not tried again for so long
    switch_s: float = 0.05  # pause of a switch on a link without latency
    registry_bytes_per_s: float | None = 1e8  # at which a node fetches weights; None: over its link from the source
    solver: str = "relax"
    time_limit_s: float = 1.0  # of each of the two plans
    work_limit: int | None = None  # in solver steps instead, for the same answer each time
    tolerance: float = 0.01  # within it a plan that moves fewer bytes is preferred


@dataclass(frozen=True)
class Measured:
    """Requests that arrived and ended under today's placement, since the last move or within a window before now.

    `slo_missed` names the classes that miss their objective; `error_s` is the standard error of the mean latency.
    """

    latency_s: float
    requests: int
    slo_missed: tuple[str, ...] = ()
    error_s: float = 0.0


@dataclass(frozen=True)
class PastMove:
    """A change of placement that was deployed. `latency_before_s` was measured just before it (None: nothing was, or
    the old placement could not go on), `predicted_before_s` is what it was priced at, `error_before_s` the
    standard error of what was measured."""

    at_s: float
    action: str
    before: Placement
    after: Placement
    latency_before_s: float | None
    predicted_before_s: float
    error_before_s: float = 0.0


@dataclass(frozen=True)
class Barred:
    """A placement that was undone, and until when it is not to be tried again."""

    placement: Placement
    until_s: float


@dataclass(frozen=True)
class History:
    """The last move, and what is barred."""

    last: PastMove | None = None
    barred: tuple[Barred, ...] = ()

    def moved(self, move: PastMove, settings: Settings) -> History:
        """The history once `move` was deployed: a rollback bars what it undid."""
        still = tuple(bar for bar in self.barred if bar.until_s > move.at_s)
        if move.action == "rollback":
            still += (Barred(move.before, move.at_s + settings.bar_s),)
        return replace(self, last=move, barred=still)

    def bars(self, placement: Placement, now_s: float) -> bool:
        """Whether this placement, or one much like it, is barred now."""
        return any(bar.until_s > now_s and alike(bar.placement, placement) for bar in self.barred)


def alike(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two placements differ in at most a tenth of their blocks: the same idea, a cut shifted a little."""
    return sum(a != b for a, b in zip(one, other, strict=True)) <= len(one) / 10
