"""The gateway's side of the cluster: the live route, a connection to every node, and the tokens that come back.

Knows which epoch is live and which nodes answer; knows nothing of requests and their limits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from resplit.cancellation import cancel_and_wait
from resplit.config import ClusterConfig, LinkShape
from resplit.errors import NodeLostError
from resplit.security.identity import Member
from resplit.wire.links import Link, Shape
from resplit.wire.node_pb2 import Step, Token
from resplit.wire.peers import Address, Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
_RECONNECT_S = 0.25


@dataclass
class Router:
    """Connections from the gateway, which stands on the cluster's `source` node."""

    cluster: ClusterConfig
    member: Member
    on_token: Callable[[Token], None] = lambda token: None
    on_lost: Callable[[str], None] = lambda node: None
    on_found: Callable[[str], None] = lambda node: None
    on_heard: Callable[[str], None] = lambda node: None
    live: Route | None = None
    peers: dict[str, Peer] = field(default_factory=dict)
    listening: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._ending: list[asyncio.Task[None]] = []

    def connect(self, addresses: dict[str, Address]) -> None:
        """Connect to nodes and listen to their tokens from now on; a changed address replaces the connection."""
        for name, address in addresses.items():
            known = self.peers.get(name)
            if known is None or known.address != address:
                if name in self._tasks:
                    self._tasks[name].cancel()
                link = Link(_shape(self.cluster.link(self.cluster.source, name)))
                self.peers[name] = Peer(name, address, self.member.client_context(), link, on_lost=self._step_lost)
                self._tasks[name] = asyncio.create_task(self._listen(name), name=f"tokens of {name}")

    def forget(self, names: set[str]) -> None:
        """End the connections to nodes that belong to the cluster no more."""
        for name in names & set(self.peers):
            self._tasks.pop(name).cancel()
            self.listening.discard(name)
            self._ending.append(asyncio.create_task(self.peers.pop(name).disconnect(), name=f"goodbye to {name}"))

    async def wait_for(self, nodes: set[str], timeout_s: float) -> None:
        """Return once tokens of all these nodes are listened to; NodeLostError names those that stay silent."""
        try:
            async with asyncio.timeout(timeout_s):
                while not nodes <= self.listening:
                    await self.changed()
        except TimeoutError:
            silent = ", ".join(sorted(nodes - self.listening))
            raise NodeLostError(f"no answer within {timeout_s:.0f} s from {silent}") from None

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one: new passes take it, running sessions follow at a token boundary."""
        self.live = route
        self.tell()

    async def changed(self) -> None:
        """Wait until an epoch goes live, a node is lost or found, or somebody tells."""
        await self._changed.wait()

    def send(self, route: Route, step: Step) -> None:
        """Send a step to the first node of a route."""
        self.peers[route.segments[0].node].send(step)

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source to another node."""
        if other in self.peers:
            self.peers[other].link.shape = shape

    def drop(self, name: str) -> None:
        """Take a node that hangs for lost, though its connection stands; it is found again when it wakes."""
        if name in self.listening:
            self._tasks[name].cancel()
            self._tasks[name] = asyncio.create_task(self._listen(name), name=f"tokens of {name}")
            self._lose(name)

    async def disconnect(self) -> None:
        """Close every connection."""
        await cancel_and_wait(self._tasks.values())
        await asyncio.gather(*(peer.disconnect() for peer in self.peers.values()))

    async def _listen(self, name: str) -> None:
        """Hear a node's tokens, again whenever its stream breaks; a node that was heard and breaks is lost."""
        while self._tasks.get(name) is asyncio.current_task():  # else another one listens now, or nobody
            with contextlib.suppress(NodeLostError):
                async for token in self.peers[name].tokens(on_open=lambda: self._opened(name)):
                    self.on_heard(name)
                    self.on_token(token)
            if name in self.listening:
                self._lose(name)
            await asyncio.sleep(_RECONNECT_S)

    def _lose(self, name: str) -> None:
        self.listening.discard(name)
        _log.warning("a node is lost", node=name)
        self.on_lost(name)
        self.tell()

    def _opened(self, name: str) -> None:
        self.listening.add(name)
        self.on_found(name)
        self.tell()

    def tell(self) -> None:
        """Wake whoever waits for a change, to look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _step_lost(self, name: str, steps: list[Step]) -> None:
        for step in steps:
            lost = Token(session=step.session, epoch=step.epoch, attempt=step.attempt, node=name)
            lost.error, lost.error_kind = f"the gateway lost {name} with a step on its way", "lost"
            self.on_token(lost)


def _shape(shape: LinkShape | None) -> Shape | None:
    return Shape(shape.latency, shape.bandwidth) if shape else None
