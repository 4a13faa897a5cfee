"""One admitted request: its passes so far, its route, and where its caches may be.

A value that the sessions' loop changes; it does nothing by itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from resplit.errors import error_from_wire
from resplit.gateway.engine import GenerationRequest
from resplit.gateway.sessions.admission import Reservation
from resplit.model.engine import token_ids
from resplit.session_records import SessionMove
from resplit.wire.node_pb2 import Sampling, Step, Token
from resplit.wire.peers import to_wire
from resplit.wire.routes import Route


@dataclass(frozen=True)
class PreCopy:
    """Caches that were carried ahead of a move: to the nodes of `target`, positions `first..last-1` in the last round;
    `cache_bytes` in all rounds."""

    target: Route
    first: int
    last: int
    cache_bytes: int


@dataclass(frozen=True)
class KvReplica:
    """A copy of the first `positions` positions of a block's cache on a node that does not host the block."""

    node: str
    positions: int


@dataclass
class Session:
    """One admitted request. `steps` are the passes done so far: the prompt, then one token each.

    Its `attempt` rises with each loss: what is still on its way from an older one is refused by nodes, and ignored.
    """

    name: str
    request: GenerationRequest
    reservation: Reservation
    route: Route
    answers: asyncio.Queue[Token] = field(default_factory=asyncio.Queue)
    steps: list[tuple[int, ...]] = field(default_factory=list)
    attempt: int = 0
    precopying: asyncio.Task[PreCopy] | None = None  # caches ahead of a move
    replicating: asyncio.Task[None] | None = None  # copies on stand-by nodes
    replicas: dict[int, KvReplica] = field(default_factory=dict)  # by block
    keeping_from: int = 0  # the position at which that began
    copied: int = 0  # the position that all copies have reached
    copied_bytes: int = 0
    copy_lag: int = 0  # the most positions that were added while copies were made
    refusing: set[str] = field(default_factory=set)  # nodes that did not take a copy
    epochs: list[int] = field(default_factory=list)
    moves: list[SessionMove] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)  # that may hold a cache of it
    private_ok: bool = True

    @property
    def position(self) -> int:
        """Positions cached: the length of all passes done."""
        return sum(len(step) for step in self.steps)

    def message(self, step: tuple[int, ...], gateway: str, budget_s: float) -> Step:
        """The step that begins a pass over these tokens, after all passes done; its token comes back to `gateway`."""
        sampling = self.request.sampling
        return Step(
            session=self.name,
            attempt=self.attempt,
            epoch=self.route.epoch,
            segment=0,
            start=self.position,
            capacity=self.reservation.tokens,
            values=to_wire(token_ids(step)),
            sampling=Sampling(temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed % 2**62),
            gateway=gateway,
            budget_s=budget_s,
        )

    def enter(self, route: Route, private_ok: bool) -> None:
        """Go on in another epoch; `private_ok` tells whether it keeps private blocks on trusted nodes."""
        self.route = route
        if self.epochs[-1:] != [route.epoch]:
            self.epochs.append(route.epoch)
        self.nodes |= set(route.placement)
        self.private_ok = self.private_ok and private_ok


def error_of(answer: Token) -> Exception:
    """The error with which a pass ended."""
    # A node that restarted has neither the epoch nor the caches: for the session it is lost.
    word = "lost" if answer.error_kind == "stale" else answer.error_kind
    return error_from_wire(word, answer.error)
