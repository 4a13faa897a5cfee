"""The gateway's connections to the nodes: the live route, whether it can serve, and the tokens that come back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from resplit.config import ClusterConfig, LinkShape
from resplit.errors import NodeLostError
from resplit.privacy import privacy_violation
from resplit.process.cancellation import VitalTasks, cancel_and_wait
from resplit.security.identity import Member
from resplit.status import wrong_clock
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import EmulatedLink, Shape
from resplit.wire.node_pb2 import Step, Token
from resplit.wire.patience import Patience
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
_RECONNECT_S = 0.25
# A node that was only busy, or whose link dropped, answers again within this time. Then it may still answer a command.
_RETURNS_WITHIN_S = 2.0
_REPLACED_WITHIN_S = 20.0  # how long a request waits for lost nodes to be replaced
# A faulty node is tried again after the first wait, and after twice the wait at each later fault.
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 300.0
# For each such time without a fault, a node is trusted to answer as after one fault less.
_FORGIVEN_AFTER_S = 600.0
# So many tokens of one node may be of no pass at once, and in each second. An honest node sends some when passes are
# lost, and news without tokens, at most some dozens a second. One of so many bytes more counts as one more.
_STRAYS_AT_ONCE, _STRAYS_PER_S, _STRAY_BYTES = 5000, 500, 256


@dataclass(frozen=True)
class Fault:
    """A fault of a node: what it did, and until when it is not tried again. `until_s` is on the monotonic clock."""

    reason: str
    wait_s: float
    until_s: float

    def remembered_s(self, now_s: float) -> float:
        """The wait without the faults that are forgiven by now; below `_FIRST_WAIT_S` if all are."""
        return float(self.wait_s * 0.5 ** max(0, (now_s - self.until_s) // _FORGIVEN_AFTER_S))


@dataclass
class Router:
    """Connections from the gateway, which runs on the cluster's `source` node."""

    cluster: ClusterConfig
    member: Member
    vocabulary: int = 2**31  # of the model: a token that a node sends is below it
    # `node` by its certificate. Returns whether the token belongs to a pass.
    on_token: Callable[[str, Token], bool] = lambda node, token: True
    on_lost: Callable[[str], None] = lambda node: None
    on_found: Callable[[str], None] = lambda node: None
    on_heard: Callable[[str], None] = lambda node: None
    on_news: Callable[[str], None] = lambda node: None
    live: Route | None = None  # of the live epoch; None only before the first placement
    peers: dict[str, Peer] = field(default_factory=dict)  # every node of the cluster
    listening: set[str] = field(default_factory=set)  # the nodes whose stream of tokens is open; a subset of `peers`
    faults: dict[str, Fault] = field(default_factory=dict)  # the last fault of each node that had one

    def __post_init__(self) -> None:
        self.tasks = VitalTasks()
        self._features: Sequence[BlockFeatures] = ()
        self._avoided: frozenset[str] = frozenset()
        self._violations: dict[int, str | None] = {}  # by epoch, since the rules changed
        self._unavailable_reason: str | None = None
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._giving_up: dict[str, asyncio.TimerHandle] = {}  # of nodes that were lost a moment ago
        self._changed = asyncio.Event()
        self._patience = defaultdict[str, Patience](lambda: Patience(_STRAYS_AT_ONCE, _STRAYS_PER_S))
        self._transfers: dict[asyncio.Timeout, frozenset[tuple[int, str]]] = {}  # under way: blocks and their targets

    def adopt(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Keep the privacy rule of a changed cluster file from now on, and send to nodes that are not drained again."""
        self.cluster, self._features = cluster, features
        self.avoid(self._avoided & drained)
        for transfer in [each for each, targets in self._transfers.items() if self._forbidden(targets)]:
            del self._transfers[transfer]  # a scope can be ended once only
            transfer.reschedule(asyncio.get_running_loop().time())

    def avoid(self, nodes: frozenset[str]) -> None:
        """Send nothing along a route with one of these nodes from now on."""
        self._avoided = nodes
        self._violations.clear()
        self._notify_change()

    def violation(self, route: Route) -> str | None:
        """The rule that a route breaks, in words; None if it breaks none."""
        if route.epoch not in self._violations:
            self._violations[route.epoch] = self._violation(route.placement)
        return self._violations[route.epoch]

    def connect(self, addresses: dict[str, Address]) -> None:
        """Connect to nodes and listen to their tokens; a changed address replaces the connection."""
        for name, address in addresses.items():
            known = self.peers.get(name)
            if known is None or known.address != address:
                if name in self._listeners:
                    self._listeners[name].cancel()
                link = EmulatedLink(_shape(self.cluster.link(self.cluster.source, name)))
                self.peers[name] = Peer(
                    name,
                    address,
                    self.member,
                    link,
                    on_lost=self._step_lost,
                    on_fault=self.fault,
                    vocabulary=self.vocabulary,
                )
                self._start_listening(name)

    def forget(self, names: set[str]) -> None:
        """Close the connections to nodes that have left the cluster."""
        for name in names & set(self.peers):
            self._listeners.pop(name).cancel()
            self.listening.discard(name)
            self.faults.pop(name, None)
            self.tasks.spawn(self.peers.pop(name).disconnect(), f"disconnect from {name}")
        self._violations.clear()

    async def wait_for(self, nodes: set[str], timeout_s: float) -> None:
        """Return once the token streams of all these nodes are open; NodeLostError names the nodes that are silent."""
        try:
            async with asyncio.timeout(timeout_s):
                while not nodes <= self.listening:
                    await self.changed()
        except TimeoutError:
            silent = ", ".join(sorted(nodes - self.listening))
            raise NodeLostError(f"no answer within {timeout_s:.0f} s from {silent}") from None

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one: new sessions take it, running ones follow at a token boundary."""
        self.live = route
        self._violations.clear()
        self._notify_change()

    @property
    def live_route(self) -> Route:
        """The live epoch's route; NodeLostError before the first placement."""
        if self.live is None:
            raise NodeLostError("no placement is deployed yet")
        return self.live

    def set_unavailable(self, reason: str) -> None:
        """Fail requests at once with `reason`: no placement is possible now."""
        self._unavailable_reason = reason
        self._notify_change()

    def set_available(self) -> None:
        """Let requests wait again while lost nodes are replaced."""
        self._unavailable_reason = None
        self._notify_change()

    def unready_reason(self) -> str | None:
        """Why the live route cannot serve now; None if it can."""
        if self._unavailable_reason is not None:
            return self._unavailable_reason
        if self.live is None:
            return "no placement is deployed yet"
        if reason := self.violation(self.live):
            return reason
        return self._silence(self.live)

    async def until_ready(self) -> None:
        """Wait while lost nodes are replaced; NodeLostError if that takes too long or cannot succeed."""
        until_s = time.monotonic() + _REPLACED_WITHIN_S
        while (reason := self.unready_reason()) is not None:
            left_s = until_s - time.monotonic()
            if self.live is None or self._unavailable_reason or left_s <= 0:
                raise NodeLostError(reason)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.changed()

    async def changed(self) -> None:
        """Wait until an epoch goes live, a node is lost or found, a rule changes, or the cluster is (un)available."""
        await self._changed.wait()

    def send(self, route: Route, step: Step) -> None:
        """Send a step to the first node of a route.

        NodeLostError if the route breaks a rule, or if a node could not answer: a session that comes to a route after
        one of its nodes was lost does not hear of that loss.
        """
        if reason := self.violation(route) or self._silence(route):
            raise NodeLostError(reason)
        self.peers[route.segments[0].node].send(step)

    @contextlib.asynccontextmanager
    async def transferring(self, targets: frozenset[tuple[int, str]]) -> AsyncIterator[None]:
        """Around transfers of caches, each a block and its target: cancels them once the privacy rule forbids one.

        NodeLostError then, and at once if it forbids one already.
        """
        if reason := self._forbidden(targets):
            raise NodeLostError(reason)
        try:
            async with asyncio.timeout(None) as transfer:
                self._transfers[transfer] = targets
                try:
                    yield
                finally:
                    self._transfers.pop(transfer, None)
        except TimeoutError:
            raise NodeLostError(self._forbidden(targets) or "a transfer of caches took too long") from None

    def close_session(self, session: str, nodes: set[str]) -> None:
        """Have nodes drop a session's caches, in the background."""
        for name in nodes & set(self.peers):
            self.tasks.spawn(self.peers[name].close_sessions([session]), f"close session {session} on {name}")

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source to another node."""
        if other in self.peers:
            self.peers[other].link.shape = shape

    def drop(self, name: str) -> None:
        """Treat a node that hangs as lost although its connection is open. It is found again when it resumes."""
        if name in self.listening:
            self._listeners[name].cancel()
            self._start_listening(name)
            self._lose(name)

    def fault(self, name: str, reason: str) -> None:
        """Treat a node as lost because of what it did. It is tried again after a wait that grows with each fault."""
        now_s, last = time.monotonic(), self.faults.get(name)
        if name not in self.peers or (last and now_s < last.until_s):  # it counts as lost for an earlier fault
            return
        wait_s = min(max(_FIRST_WAIT_S, 2 * last.remembered_s(now_s)), _LONGEST_WAIT_S) if last else _FIRST_WAIT_S
        self.faults[name] = Fault(reason, wait_s, now_s + wait_s)
        _log.warning("a node is faulty and counts as lost", node=name, reason=reason, wait_s=wait_s)
        self._listeners[name].cancel()
        self._start_listening(name)
        if name in self.listening:
            self._lose(name)

    def suspects(self) -> frozenset[str]:
        """The nodes that were faulty, also those that answer again, except where it is forgiven."""
        now_s = time.monotonic()
        return frozenset(name for name, last in self.faults.items() if last.remembered_s(now_s) >= _FIRST_WAIT_S)

    async def disconnect(self) -> None:
        """Close every connection."""
        await cancel_and_wait(self._listeners.values())
        await asyncio.gather(*(peer.disconnect() for peer in self.peers.values()))

    def _silence(self, route: Route) -> str | None:
        """Which nodes of a route cannot answer, in words; None if all can."""
        silent = sorted(set(route.placement) - self.listening)
        return f"no connection to {', '.join(silent)}" if silent else None

    def _violation(self, placement: Sequence[str]) -> str | None:
        if excluded := sorted(set(placement) & self._avoided | set(placement) - self.peers.keys()):
            return f"{', '.join(excluded)} is drained or has left the cluster"
        return privacy_violation(placement, self._features, self.cluster.trusted) if self._features else None

    def _forbidden(self, targets: Iterable[tuple[int, str]]) -> str | None:
        """Why one of these nodes may not hold its block, in words; None if all may."""
        for block, node in targets:
            if self._features and (reason := privacy_violation([node], [self._features[block]], self.cluster.trusted)):
                return reason
        return None

    def _start_listening(self, name: str) -> None:
        self._listeners[name] = self.tasks.spawn(self._listen(name), f"tokens of {name}")

    async def _listen(self, name: str) -> None:
        """Receive a node's tokens, and reconnect when the stream breaks; a node whose open stream breaks is lost."""
        while self._listeners.get(name) is asyncio.current_task():  # another listener may have replaced this one
            if fault := self.faults.get(name):
                await asyncio.sleep(max(0.0, fault.until_s - time.monotonic()))
            with contextlib.suppress(NodeLostError):
                await self.peers[name].listen(partial(self._heard, name), partial(self._opened, name))
            if name in self.listening:
                self._lose(name)
            await asyncio.sleep(_RECONNECT_S)

    def _heard(self, name: str, token: Token) -> None:
        self.on_heard(name)
        if token.news:
            self.on_news(name)
        if token.news or not self.on_token(name, token):
            self._bear(name, token)

    def _bear(self, name: str, token: Token) -> None:
        """Note a token of no pass, or news. PeerFaultError if they are so many that streams are late because of it."""
        if self._patience[name].note(time.monotonic(), 1 + token.ByteSize() // _STRAY_BYTES):
            del self._patience[name]
            raise self.peers[name].fault("it sends many tokens that belong to no pass")

    def _opened(self, name: str) -> None:
        if wrong := wrong_clock(self.peers[name].clock_ahead_s):
            _log.warning("a clock is wrong", node=name, clock=wrong)
        if giving_up := self._giving_up.pop(name, None):
            giving_up.cancel()
        self.listening.add(name)
        self.on_found(name)
        self._notify_change()

    def _lose(self, name: str) -> None:
        self.listening.discard(name)
        self._giving_up[name] = asyncio.get_running_loop().call_later(_RETURNS_WITHIN_S, self.peers[name].give_up)
        _log.warning("a node is lost", node=name)
        self.on_lost(name)
        self._notify_change()

    def _notify_change(self) -> None:
        """Wake all callers of `changed`."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _step_lost(self, name: str, steps: list[Step]) -> None:
        for step in steps:
            lost = Token(session=step.session, epoch=step.epoch, attempt=step.attempt, position=step.start)
            lost.error, lost.error_kind = f"the connection to {name} broke before it acknowledged a step", "lost"
            self.on_token(name, lost)


def _shape(shape: LinkShape | None) -> Shape | None:
    return Shape(shape.latency, shape.bandwidth) if shape else None
