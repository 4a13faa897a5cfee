"""One admitted request: its passes so far, its route, and where its caches may be.

A value that the sessions' loop changes; it does nothing by itself.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from resplit.gateway.admission import Place
from resplit.gateway.engine import GenerationRequest
from resplit.gateway.journal import Move
from resplit.wire.node_pb2 import Token
from resplit.wire.route import Route


@dataclass(frozen=True)
class Copied:
    """A copy of caches that was made: to the nodes of `target`, up to position `last`."""

    target: Route
    last: int
    cache_bytes: int


@dataclass
class Session:
    """One admitted request. `steps` are the passes done so far: the prompt, then one token each."""

    name: str
    request: GenerationRequest
    place: Place
    route: Route
    answers: asyncio.Queue[Token] = field(default_factory=asyncio.Queue)
    steps: list[tuple[int, ...]] = field(default_factory=list)
    copying: asyncio.Task[Copied] | None = None
    epochs: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    nodes: set[str] = field(default_factory=set)  # that may hold a cache of it
    private_ok: bool = True

    @property
    def position(self) -> int:
        """Positions cached: the length of all passes done."""
        return sum(len(step) for step in self.steps)

    def enter(self, route: Route, private_ok: bool) -> None:
        """Go on in another epoch; `private_ok` tells whether it keeps private blocks on trusted nodes."""
        self.route = route
        self.epochs.append(route.epoch)
        self.nodes |= set(route.placement)
        self.private_ok = self.private_ok and private_ok
