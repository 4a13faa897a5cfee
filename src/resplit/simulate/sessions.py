"""Requests, routes and sessions as values of the simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from resplit.node.batching import SegmentPass
from resplit.pass_times import SegmentTime
from resplit.privacy import exposed_blocks
from resplit.session_records import SessionMove, SessionRecord
from resplit.simulate.admission import Place
from resplit.simulate.machines import Machine, segment_pass
from resplit.simulate.network import BackgroundTransfer
from resplit.types import BlockFeatures, Segment, segments_of
from resplit.workload import Arrival

__all__ = ["SimulatedPass", "SimulatedPreCopy", "SimulatedRoute", "SimulatedSession"]


@dataclass(frozen=True, eq=False)
class SimulatedRoute:
    """The segments of an epoch with their machines. `exposed`: a private block runs on a node without trust."""

    epoch: int
    placement: tuple[str, ...]
    segments: tuple[Segment, ...]
    machines: tuple[Machine, ...]
    payload_bytes: tuple[float, ...]  # of one token on its way to each segment, and back to the gateway
    exposed: bool

    @classmethod
    def of(
        cls,
        epoch: int,
        placement: Sequence[str],
        machines: Mapping[str, Machine],
        features: Sequence[BlockFeatures],
        trusted: Collection[str],
        token_bytes: float,
    ) -> SimulatedRoute:
        """The route of a placement."""
        segments = segments_of(tuple(placement))
        between = [features[segment.last].activation_bytes_per_token for segment in segments[:-1]]
        return cls(
            epoch,
            tuple(placement),
            segments,
            tuple(machines[segment.node] for segment in segments),
            (token_bytes, *between, token_bytes),
            bool(exposed_blocks(placement, features, trusted)),
        )

    @property
    def follows_up(self) -> bool:
        """Whether the node of the head can begin passes itself: it has the first block, too."""
        return self.machines[0] is self.machines[-1]


@dataclass(frozen=True, slots=True)
class SimulatedPreCopy:
    """The caches that are copied to `target` so far: the last round sent positions `first..last-1`, until `done_s`."""

    target: SimulatedRoute
    first: int
    last: int
    cache_bytes: float
    done_s: float


@dataclass(eq=False)
class SimulatedSession:
    """A request from its admission to its end. `attempt` grows with each loss: earlier messages are ignored."""

    name: str
    arrival: Arrival
    late_s: float = 0.0  # when it misses its objective
    place: Place | None = None
    route: SimulatedRoute | None = None
    ended: bool = False
    attempt: int = 0
    position: int = 0  # positions cached
    made: int = 0  # new tokens
    running: bool = False  # a pass is under way
    recalled: bool = False  # a node gave its pass back: no pass uses the old route any more
    asked_until: int = 0  # the node of the head may begin the passes before this position: what the gateway asked,
    follow_until: int = 0  # and what the node knows of it
    resume: Callable[[], None] | None = None  # what to do when passes may run again
    token_s: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    computed_s: float = 0.0
    hops_s: float = 0.0
    epochs: list[int] = field(default_factory=list)
    moves: list[SessionMove] = field(default_factory=list)
    private_ok: bool = True
    precopy: SimulatedPreCopy | None = None
    replica: int = 0  # positions of its caches that stand-by nodes hold
    stand_bys: dict[int, str] = field(default_factory=dict)  # the node of each block's replica
    copied_to: int = 0  # positions that the replicas hold once what is `copying` has arrived
    copying: list[tuple[tuple[str, str], BackgroundTransfer]] = field(default_factory=list)  # with its two nodes
    _decodes: list[SegmentPass] = field(default_factory=list)

    def stop_copying(self) -> None:
        """Send no more replicas."""
        for _, transfer in self.copying:
            transfer.cancel()
        self.copying = []

    def enter(self, route: SimulatedRoute) -> None:
        """Use `route` from the next pass on."""
        self.stop_copying()
        self.route, self.precopy, self.recalled, self._decodes = route, None, False, []
        if self.epochs[-1:] != [route.epoch]:
            self.epochs.append(route.epoch)
        self.private_ok = self.private_ok and not route.exposed

    def decode_pass(self, stage: int) -> SegmentPass:
        """Its decode step at a stage of its route: the same for every token."""
        if not self._decodes:
            assert self.route is not None
            stages = len(self.route.segments)
            self._decodes = [segment_pass(self.name, s.first, s.last, 1, 1, stages) for s in self.route.segments]
        return self._decodes[stage]

    @property
    def last_end(self) -> int:
        """The position at which the last pass ends, that of the last token but one."""
        return self.arrival.prompt_tokens + self.arrival.new_tokens - 1

    def record(self, status: int) -> SessionRecord:
        """The record of the request, which ends with an HTTP status."""
        return SessionRecord(
            request_class=self.arrival.request_class,
            arrival_s=self.arrival.at_s,
            first_token_s=self.token_s[0] if self.token_s else math.nan,
            end_s=self.token_s[-1] if status == 200 else math.nan,
            prompt_tokens=self.arrival.prompt_tokens,
            new_tokens=len(self.token_s),
            status=status,
            epochs=tuple(self.epochs),
            moves=tuple(self.moves),
            private_ok=self.private_ok,
            token_times_s=tuple(self.token_s),
            waited_s=self.waited_s,
            computed_s=self.computed_s,
            hops_s=self.hops_s,
        )


@dataclass(eq=False, slots=True)
class SimulatedPass:
    """A pass over `tokens` positions from `start` on, with the times of what was computed so far.

    It counts while the session is in the same `attempt`, unless it was `recalled`. If it followed another pass,
    `before`, the node of the head began it, and it began for the gateway when the token before it came. `is_followed`:
    the next one has begun in this way.
    """

    session: SimulatedSession
    route: SimulatedRoute
    start: int
    tokens: int
    begun_s: float
    attempt: int
    before: SimulatedPass | None = None
    is_followed: bool = False
    recalled: bool = False
    waited_s: float = 0.0
    computed_s: float = 0.0
    segments: list[SegmentTime] = field(default_factory=list)

    @property
    def counts(self) -> bool:
        """Whether anybody still waits for it."""
        return not self.session.ended and self.attempt == self.session.attempt and not self.recalled

    @property
    def followed(self) -> bool:
        """Whether the node of the head began it."""
        return self.before is not None

    @property
    def end(self) -> int:
        """The first position after it."""
        return self.start + self.tokens
