"""All sessions of one gateway: `gateway.engine.TokenEngine` over the nodes, and `control.gateway.Gateway`."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager

from resplit.config import ClusterConfig
from resplit.errors import CLIENT_GONE_STATUS, ResplitError, http_status
from resplit.estimate import Forecast
from resplit.gateway.engine import GeneratedToken, GenerationRequest
from resplit.gateway.sessions.admission import Admission
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.journal import Journal
from resplit.gateway.sessions.router import Router
from resplit.gateway.sessions.session import Session
from resplit.pass_times import PassTime
from resplit.session_records import RecoveredSessions, RequestArrival, SessionRecord
from resplit.status import GatewayStatus
from resplit.types import BlockFeatures, RequestClass
from resplit.wire.emulated_link import Shape
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route

# A pause does not wait longer for running passes: such a pass waits for a node that hangs.
_PASSES_END_WITHIN_S = 20.0
# Lengths of answers scatter like an exponential distribution: 98 % are shorter than this many times their mean.
_USUAL_FACTOR = 4


class Sessions:
    """The running sessions. `on_settled` is called with the oldest epoch in use whenever a session leaves an epoch.

    `on_pass` is called with the times of each pass.
    """

    def __init__(self, cluster: ClusterConfig, router: Router, features: Sequence[BlockFeatures]) -> None:
        admission = Admission(cluster.limits.sessions, cluster.kv_tokens, cluster.limits.queue)
        self._context = SessionContext(cluster, features, router, admission, Journal(cluster))
        self._context.on_moved = self._settled
        self._context.on_pass = lambda done: self.on_pass(done)
        self._live: dict[str, Session] = {}  # by name, from admission to end
        self._numbers = itertools.count(1)
        self.on_settled: Callable[[int], None] = lambda oldest: None
        self.on_pass: Callable[[PassTime], None] = lambda done: None
        self.on_lost: Callable[[str], None] = lambda node: None
        self.on_ended: Callable[[SessionRecord], None] = lambda record: None  # with the record of each request
        router.on_token = self._answered
        router.on_lost = self._node_lost
        router.adopt(cluster, features, frozenset())

    @property
    def context_tokens(self) -> int:
        """Limit of prompt and new tokens of one request."""
        return self._context.cluster.limits.context_tokens

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the request classes."""
        return tuple(c.name for c in self._context.cluster.classes)

    @property
    def default_class(self) -> str:
        """The class of a request that names none."""
        return self.classes[0]

    def ready(self) -> str | None:
        """None if requests can be served, else the reason."""
        return self._context.router.unready_reason()

    def usual_tokens(self, request_class: str, prompt_tokens: int, deadline_s: float) -> int:
        """A few times the tokens that the class expects on average, and no more than come before the deadline."""
        expected = _USUAL_FACTOR * self._context.cluster.request_class(request_class).new_tokens
        return max(1, int(min(expected, self._context.admission.tokens_within(prompt_tokens, deadline_s))))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """The tokens of `request`; raises as `TokenEngine.generate` says."""
        arrival_s = time.time()
        arrival = RequestArrival(request.request_class, arrival_s, len(request.prompt_ids), request.max_new_tokens)
        self._context.journal.arrived(arrival)
        now_s = asyncio.get_running_loop().time()
        limit_s = self._context.cluster.limits.deadline
        due_s = now_s + (limit_s if request.deadline_s is None else min(limit_s, request.deadline_s))
        times: list[float] = []
        status, session = CLIENT_GONE_STATUS, None
        try:
            session = await Session.admit(self._new_name(), request, now_s, due_s, self._context)
            self._live[session.name] = session
            async for token in session.tokens():
                times.append(time.time())
                status = 200 if token.finish else CLIENT_GONE_STATUS
                yield token
        except (ResplitError, TimeoutError) as error:
            if isinstance(error, TimeoutError) and request.until_deadline and times:
                status = 200
                return
            status = http_status(error)
            raise
        except GeneratorExit:  # closed on purpose, as after a stop string; a client that leaves causes a cancellation
            status = 200
            raise
        finally:
            if session:
                self._end(session)
            record = _record(arrival, session, times, status)
            self._context.journal.ended(record)
            self.on_ended(record)

    def status(self) -> GatewayStatus:
        """Sessions that run, requests that wait, and whether requests can be served."""
        admission = self._context.admission
        return GatewayStatus(len(self._live), admission.waiting, self.ready() or "yes", admission.reserved_tokens)

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one; running sessions follow at a token boundary."""
        self._context.router.activate(route)

    def paused(self) -> AbstractAsyncContextManager[None]:
        """A context in which no pass runs; sessions wait at a token boundary. CapacityError if a pass does not end."""
        return self._context.gate.paused(_PASSES_END_WITHIN_S)

    async def move_all(self, route: Route) -> None:
        """While passes are paused: move every session to `route` with its caches. If they are lost, it is replayed."""
        await asyncio.gather(*(session.caches.move(route) for session in list(self._live.values())))

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Serve under a changed cluster file, which may make other blocks private; `drained` nodes get no replicas.

        From now on nothing is sent along a route that breaks its privacy rule. Sessions wait for a route that does not.
        """
        context = self._context
        context.cluster, context.features, context.drained = cluster, features, drained
        context.journal.reconfigure(cluster)
        context.router.adopt(cluster, features, drained)
        for session in self._live.values():
            if context.router.violation(session.route):
                session.follow_ups.withdraw()

    def leave(self, nodes: frozenset[str]) -> None:
        """From now on send nothing along a route with one of these nodes. Sessions there continue on the live route."""
        router = self._context.router
        router.avoid(nodes)
        for session in self._live.values():
            if reason := router.violation(session.route):
                session.follow_ups.withdraw()
                session.lose(reason)

    def oldest_epoch(self) -> int:
        """The oldest epoch that a session uses or moves to."""
        live = self._context.router.live
        used = [session.route.epoch for session in self._live.values()]
        return min([*used, live.epoch if live else 0])

    def welcome(self, node: str) -> None:
        """A node answers again and knows the others: running sessions may keep replicas on it from now on."""
        for session in self._live.values():
            session.caches.replication.forget(node)

    def session_names(self) -> list[str]:
        """Names of the sessions that run."""
        return list(self._live)

    def connected_nodes(self) -> set[str]:
        """The nodes whose token streams are open."""
        return set(self._context.router.listening)

    def clocks_ahead_s(self) -> dict[str, float]:
        """The clock of each node less this one, when it connected last."""
        return {name: peer.clock_ahead_s for name, peer in self._context.router.peers.items()}

    def faults(self) -> dict[str, str]:
        """What each node did that counts as lost for it."""
        router = self._context.router
        return {name: fault.reason for name, fault in router.faults.items() if name not in router.listening}

    def suspects(self) -> frozenset[str]:
        """The nodes that were faulty, also those that answer again, except where it is forgiven."""
        return self._context.router.suspects()

    def set_unavailable(self, reason: str) -> None:
        """Fail requests with `reason`: no placement is possible now."""
        self._context.router.set_unavailable(reason)

    def set_available(self) -> None:
        """Let requests wait for a placement again."""
        self._context.router.set_available()

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source node to another."""
        self._context.router.set_link(other, shape)

    def records(self, skip: int) -> list[SessionRecord]:
        """The records of all requests that ended, without the first `skip`."""
        return self._context.journal.records(skip)

    def recoveries(self, epoch: int | None) -> RecoveredSessions | None:
        """How sessions recovered into `epoch` after a loss; None if none did."""
        return self._context.journal.recoveries(epoch)

    def demand(self, window_s: float) -> list[RequestClass]:
        """The demand of each class: arrivals of the last `window_s` seconds, blended with the declared demand."""
        return self._context.journal.demand(window_s)

    def rates(self) -> dict[str, Forecast]:
        """The requests per second that are expected of each class."""
        return self._context.journal.rates()

    def _new_name(self) -> str:
        """A name that is unique, also among the sessions of earlier processes."""
        return f"{next(self._numbers)}-{time.time_ns():x}"

    def _answered(self, node: str, token: Token) -> bool:
        session = self._live.get(token.session)
        return session is not None and session.receive(node, token)

    def _node_lost(self, node: str) -> None:
        for session in self._live.values():
            session.permits.forget(node)
            session.caches.replication.forget(node)
            if node in session.route.placement:
                session.lose(f"{node} is lost")
        self.on_lost(node)

    def _end(self, session: Session) -> None:
        del self._live[session.name]
        session.end()
        self._settled()

    def _settled(self) -> None:
        self.on_settled(self.oldest_epoch())


def _record(arrival: RequestArrival, session: Session | None, times: list[float], status: int) -> SessionRecord:
    """The outcome of a request whose tokens came at `times`; `session` is None if it was not admitted."""
    return SessionRecord(
        request_class=arrival.request_class,
        arrival_s=arrival.time_s,
        first_token_s=times[0] if times else math.nan,
        end_s=times[-1] if times and status == 200 else math.nan,
        prompt_tokens=arrival.prompt_tokens,
        new_tokens=len(times),
        status=status,
        epochs=tuple(session.caches.epochs) if session else (),
        moves=tuple(session.caches.moves) if session else (),
        private_ok=session.caches.private_ok if session else True,
        token_times_s=tuple(times),
        copied_bytes=session.caches.replication.sent_bytes if session else 0,
        copy_lag=session.caches.replication.max_lag if session else 0,
        waited_s=session.spent.waited_s if session else 0.0,
        computed_s=session.spent.computed_s if session else 0.0,
        hops_s=session.spent.hops_s if session else 0.0,
        recalls=session.recalls if session else 0,
        drafted=session.speculation.drafted if session else 0,
        accepted=session.speculation.accepted if session else 0,
    )
