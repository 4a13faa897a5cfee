"""Sessions: the decode loop, the move to a new epoch at a token boundary, and replay where a node was lost.

Implements `gateway.engine.Engine` over the nodes. Knows nothing of HTTP and text, and decides no placements.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import structlog

from resplit.config import ClusterConfig
from resplit.errors import NodeLostError, RequestError, ResplitError, http_status
from resplit.gateway.engine import GeneratedToken, GenerationRequest
from resplit.gateway.sessions.admission import Admission, Deadline
from resplit.gateway.sessions.journal import Journal
from resplit.gateway.sessions.kv_replication import KvReplication
from resplit.gateway.sessions.kv_transfer import CacheTransfer, plan_restore, transfer_caches
from resplit.gateway.sessions.pause_gate import PauseGate
from resplit.gateway.sessions.router import Router
from resplit.gateway.sessions.session import PreCopy, Session, error_of
from resplit.privacy import exposed_blocks
from resplit.session_records import RequestArrival, SessionMove, SessionRecord, SessionRecovery
from resplit.types import BlockFeatures
from resplit.wire.links import Shape
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)
# How long a request waits for lost nodes to be replaced before it is told that there is no service.
_PATIENCE_S = 20.0
# A node that others call lost, and the gateway does not yet: its own connection will tell soon.
_SECOND_OPINION_S = 0.2
# A pass that takes longer is not waited for where all are to be held: a node hangs.
_PASSES_END_WITHIN_S = 20.0
# So often caches are looked for after a loss; then everything is computed again.
_RESTORE_TRIES = 3
# So much may be left to carry at a switch, while the stream stands still.
_PATCH_POSITIONS = 2


class Sessions:
    """All sessions of one gateway."""

    def __init__(self, cluster: ClusterConfig, router: Router, features: Sequence[BlockFeatures]) -> None:
        self._cluster = cluster
        self._router = router
        self._features = features
        self._replication = KvReplication(cluster, features, router)
        self._live: dict[str, Session] = {}
        self._admission = Admission(cluster.limits.sessions, cluster.kv_tokens, cluster.limits.queue)
        self._numbers = itertools.count(1)
        self._journal = Journal(cluster)
        self._closing: set[asyncio.Task[None]] = set()
        self._unavailable_reason: str | None = None
        self._gate = PauseGate()
        self.on_settled: Callable[[int], None] = lambda oldest: None
        self.on_lost: Callable[[str], None] = lambda node: None
        router.on_token = self._answered
        router.on_lost = self._node_lost

    @property
    def context_tokens(self) -> int:
        """Limit of prompt and new tokens of one request."""
        return self._cluster.limits.context_tokens

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the request classes."""
        return tuple(c.name for c in self._cluster.classes)

    @property
    def default_class(self) -> str:
        """The class of a request that names none."""
        return self.classes[0]

    def state(self) -> dict[str, Any]:
        """Sessions that run, requests that wait, and whether requests can be served."""
        return {"sessions": len(self._live), "waiting": self._admission.waiting, "ready": self.ready() or "yes"}

    def activate(self, route: Route) -> None:
        """Make a committed epoch the live one; running sessions follow at a token boundary."""
        self._router.activate(route)

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Within it no pass runs: sessions wait at a token boundary. CapacityError where passes do not end in time."""
        return self._gate.paused(_PASSES_END_WITHIN_S)

    async def move_all(self, route: Route) -> None:
        """While held: move every session to `route`, its caches too; where they cannot be had, it is replayed there."""
        await asyncio.gather(*(self._move(session, route) for session in list(self._live.values())))

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        """Serve under a changed cluster file, which may make other blocks private; `drained` nodes keep no copies."""
        self._cluster, self._features = cluster, features
        self._replication.reconfigure(cluster, features, drained)
        self._journal.reconfigure(cluster)
        self._router.cluster = cluster

    def session_names(self) -> list[str]:
        """Names of the sessions that run."""
        return list(self._live)

    def connected_nodes(self) -> set[str]:
        """The nodes whose connections stand."""
        return set(self._router.listening)

    def set_unavailable(self, reason: str) -> None:
        """Fail requests with `reason`: no placement is possible now."""
        self._unavailable_reason = reason
        self._router.tell()

    def set_available(self) -> None:
        """Let requests wait for a placement again."""
        self._unavailable_reason = None
        self._router.tell()

    def set_link(self, other: str, shape: Shape) -> None:
        """Change the emulated link from the source node to another."""
        self._router.set_link(other, shape)

    def records(self, skip: int) -> list[dict[str, Any]]:
        """What became of every request that ended, without the first `skip`."""
        return self._journal.records(skip)

    def recoveries(self, epoch: int | None) -> dict[str, float]:
        """How sessions went on in `epoch` after a loss."""
        return self._journal.recoveries(epoch)

    def demand(self, window_s: float) -> list[dict[str, Any]]:
        """The fields of `RequestClass` for each class, as seen over the last `window_s` seconds."""
        return self._journal.demand(window_s)

    def ready(self) -> str | None:
        """None when it can serve, else the reason."""
        if self._unavailable_reason is not None:
            return self._unavailable_reason
        if self._router.live is None:
            return "no placement is deployed yet"
        silent = sorted(set(self._router.live.placement) - self._router.listening)
        return f"no connection to {', '.join(silent)}" if silent else None

    def oldest_epoch(self) -> int:
        """The oldest epoch that a session uses or moves to."""
        live = self._router.live
        used = [session.route.epoch for session in self._live.values()]
        return min([*used, live.epoch if live else 0])

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GeneratedToken]:
        """The tokens of `request`; raises as `Engine.generate` says."""
        arrival_s = time.time()
        arrival = RequestArrival(request.request_class, arrival_s, len(request.prompt_ids), request.max_new_tokens)
        self._journal.arrived(arrival)
        deadline_s = self._cluster.limits.deadline
        if request.deadline_s is not None:
            deadline_s = min(deadline_s, request.deadline_s)
        since_s = asyncio.get_running_loop().time()
        due_s = since_s + deadline_s
        times: list[float] = []
        status, session = 499, None
        try:
            session = await self._admit(request, since_s, due_s)
            async for token in self._decode(session, due_s):
                times.append(time.time())
                status = 200 if token.finish else 499
                yield token
        except (ResplitError, TimeoutError) as error:
            status = http_status(error)
            raise
        except GeneratorExit:  # closed in good order, as after a stop string; who hangs up cancels instead
            status = 200
            raise
        finally:
            self._end(session)
            self._record(request, session, arrival_s, times, status)

    async def _admit(self, request: GenerationRequest, since_s: float, due_s: float) -> Session:
        """A session with its caches reserved; waits in line while others hold the room."""
        prompt_tokens, new_tokens = len(request.prompt_ids), request.max_new_tokens
        if not prompt_tokens or prompt_tokens + new_tokens > min(self.context_tokens, self._cluster.kv_tokens):
            raise RequestError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the context "
                f"of {self.context_tokens} tokens"
            )
        async with asyncio.timeout_at(due_s):
            await self._until_ready()
        objective = self._cluster.request_class(request.request_class)
        deadline = Deadline(since_s, objective.slo) if objective.shed_late and objective.slo else None
        reservation = await self._admission.reserve(prompt_tokens, new_tokens, due_s, deadline)
        route = self._router.live
        assert route is not None
        session = Session(self._new_name(), request, reservation, route)
        session.enter(route, self._private_ok(route))
        self._live[session.name] = session
        return session

    async def _decode(self, session: Session, due_s: float) -> AsyncIterator[GeneratedToken]:
        request = session.request
        step = request.prompt_ids
        for index in range(request.max_new_tokens):
            begun_s = time.monotonic()
            async with asyncio.timeout_at(due_s):
                token_id = await self._next(session, step, due_s)
            self._admission.made_token(session.reservation, time.monotonic() - begun_s)
            session.steps.append(step)
            self._replication.go_on(session)
            step = (token_id,)
            stopped = token_id in request.stop_ids
            last = index == request.max_new_tokens - 1
            yield GeneratedToken(token_id, index, "stop" if stopped else "length" if last else None)
            if stopped:
                return

    async def _next(self, session: Session, step: tuple[int, ...], due_s: float) -> int:
        """The token after `step`; where a node is lost on the way, the session recovers on a new route first."""
        while True:
            begun_s = time.monotonic()
            try:
                async with self._gate.passing():
                    await self._follow(session)
                    return await self._pass(session, step, due_s)
            except NodeLostError as error:
                _log.warning("session recovers", session=session.name, done=session.position, error=str(error))
                await self._recover(session, due_s, time.monotonic() - begun_s)

    async def _recover(self, session: Session, due_s: float, noticed_s: float) -> None:
        """Go on after a loss, on a route whose nodes all answer: caches that are left somewhere are brought where they
        are needed, what is missing is computed again in the very passes of the first time.

        Other shapes of passes (one prefill for all) would give other bits, and at a near tie another token.
        """
        begun_s, done, tries = time.monotonic(), session.steps, 0
        while True:
            await self._begin_again(session)
            ready_s, tries = time.monotonic(), tries + 1
            try:
                async with self._gate.passing():
                    sent = await self._restore(session, done) if tries <= _RESTORE_TRIES else 0
                restored_s, restored = time.monotonic(), session.position
                for step in done[len(session.steps) :]:
                    async with self._gate.passing():
                        await self._pass(session, step, due_s)
                        session.steps.append(step)
            except NodeLostError as error:
                _log.warning("lost again while recovering", session=session.name, error=str(error))
                continue
            end_s = time.monotonic()
            how = SessionRecovery(
                noticed_s,
                ready_s - begun_s,
                restored_s - ready_s,
                end_s - restored_s,
                restored,
                session.position - restored,
            )
            session.moves.append(SessionMove(session.route.epoch, end_s - begun_s, sent, True, how))
            self._journal.recovered(session.moves[-1])
            return

    async def _begin_again(self, session: Session) -> None:
        """A new attempt, with no passes done, on a route whose nodes all answer."""
        if session.precopying:
            session.precopying.cancel()
            session.precopying = None
        self._replication.stop(session)
        live = self._router.live
        if self.ready() is None and live and live.epoch == session.route.epoch:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_SECOND_OPINION_S):
                    await self._router.changed()
        await self._until_ready()
        session.attempt += 1
        session.steps, session.answers = [], asyncio.Queue()
        assert self._router.live is not None
        session.enter(self._router.live, self._private_ok(self._router.live))

    async def _restore(self, session: Session, done: list[tuple[int, ...]]) -> int:
        """Bring what is left of a session's caches to where its route needs them, and count those passes as done; the
        bytes that were carried."""
        nodes = sorted(self.connected_nodes())
        session.nodes |= set(nodes)
        calls = [self._router.peers[name].begin_attempt(session.name, session.attempt) for name in nodes]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        if defects := [a for a in answers if isinstance(a, BaseException) and not isinstance(a, NodeLostError)]:
            raise defects[0]
        held = {name: answer for name, answer in zip(nodes, answers, strict=True) if isinstance(answer, dict)}
        if silent := sorted(set(session.route.placement) - held.keys()):
            raise NodeLostError(f"no answer from {', '.join(silent)}")
        cached = [index for index, block in enumerate(self._features) if block.kv_bytes_per_token > 0]
        plan = plan_restore(held, session.route.placement, cached, [len(step) for step in done])
        sent = await transfer_caches(
            self._router.peers, session.name, session.attempt, plan.transfers, len(self._features)
        )
        session.steps = done[: plan.steps]
        self._replication.found(session, held)
        return sent

    async def _until_ready(self) -> None:
        """Wait while lost nodes are being replaced; NodeLostError where that is hopeless or takes too long."""
        until_s = time.monotonic() + _PATIENCE_S
        while (reason := self.ready()) is not None:
            left_s = until_s - time.monotonic()
            if self._router.live is None or self._unavailable_reason or left_s <= 0:
                raise NodeLostError(reason)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._router.changed()

    async def _pass(self, session: Session, step: tuple[int, ...], due_s: float) -> int:
        """One pass through the session's route; the token that comes back."""
        left_s = max(0.0, due_s - asyncio.get_running_loop().time())
        self._router.send(session.route, session.message(step, self._router.member.name, left_s))
        answer = await session.answers.get()
        if answer.error_kind:
            raise error_of(answer)
        return answer.token_id

    async def _follow(self, session: Session) -> None:
        """At a token boundary: begin, go on with or finish the session's move to the live epoch."""
        live = self._router.live
        assert live is not None
        if session.precopying is None:
            if session.route.epoch == live.epoch:
                return
            session.nodes |= set(live.placement)
            session.precopying = self._copy_ahead(session, PreCopy(live, 0, 0, 0))
        if session.steps and not session.precopying.done():
            return
        precopy = await session.precopying
        session.precopying = None
        if _PATCH_POSITIONS < session.position - precopy.last < precopy.last - precopy.first:
            session.precopying = self._copy_ahead(session, precopy)
            return
        begun_s = time.monotonic()
        patched = await self._transfer_to_target(session, precopy, session.position)
        pause_s = time.monotonic() - begun_s
        self._replication.stop(session)
        session.enter(precopy.target, self._private_ok(precopy.target))
        session.moves.append(SessionMove(precopy.target.epoch, pause_s, patched.cache_bytes))
        self.on_settled(self.oldest_epoch())

    async def _move(self, session: Session, route: Route) -> None:
        """SessionMove a session to a route at once."""
        begun_s = time.monotonic()
        session.nodes |= set(route.placement)
        self._replication.stop(session)
        if session.precopying:  # to its end: parts that arrive later would spoil what is carried now
            await asyncio.gather(session.precopying, return_exceptions=True)
            session.precopying = None
        try:
            precopy = await self._transfer_to_target(session, PreCopy(route, 0, 0, 0), session.position)
        except ResplitError as error:
            session.enter(route, self._private_ok(route))
            self._lose(session, str(error))
            return
        session.enter(route, self._private_ok(route))
        session.moves.append(SessionMove(route.epoch, time.monotonic() - begun_s, precopy.cache_bytes))

    def _copy_ahead(self, session: Session, before: PreCopy) -> asyncio.Task[PreCopy]:
        """Carry what is cached now while the session goes on: passes, and what others wait for, go first."""
        return asyncio.create_task(self._transfer_to_target(session, before, session.position, background=True))

    async def _transfer_to_target(
        self, session: Session, before: PreCopy, last: int, background: bool = False
    ) -> PreCopy:
        """Have positions up to `last` of every block that moves carried to its new node, after what went `before`."""
        first, target = before.last, before.target
        if last == first:
            return before
        transfers = [
            CacheTransfer(block, old, new, first, last)
            for block, (old, new) in enumerate(zip(session.route.placement, target.placement, strict=True))
            if old != new and self._features[block].kv_bytes_per_token > 0
        ]
        sent = await transfer_caches(
            self._router.peers, session.name, session.attempt, transfers, len(self._features), background
        )
        return PreCopy(target, first, last, before.cache_bytes + sent)

    def _new_name(self) -> str:
        return f"{next(self._numbers)}-{time.time_ns():x}"

    def _answered(self, token: Token) -> None:
        session = self._live.get(token.session)
        # A late answer of a pass that was given up must not be taken for that of the next one.
        if session and token.attempt == session.attempt:
            session.answers.put_nowait(token)

    def _node_lost(self, node: str) -> None:
        for session in self._live.values():
            if node in session.route.placement:
                self._lose(session, f"{node} is lost")
        self.on_lost(node)

    def _lose(self, session: Session, why: str) -> None:
        """Let the pass of a session that runs, or else the next one, end with the loss of its caches."""
        lost = Token(session=session.name, attempt=session.attempt, epoch=session.route.epoch)
        lost.error, lost.error_kind = why, "lost"
        session.answers.put_nowait(lost)

    def _end(self, session: Session | None) -> None:
        if session is None:
            return
        del self._live[session.name]
        if session.precopying:
            session.precopying.cancel()
        self._replication.stop(session)
        for node in session.nodes & set(self._router.peers):  # one that was removed has none
            self._spawn(self._router.peers[node].close_sessions([session.name]))
        self._admission.leave(session.reservation)
        self.on_settled(self.oldest_epoch())

    def _spawn(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _record(
        self,
        request: GenerationRequest,
        session: Session | None,
        arrival_s: float,
        times: list[float],
        status: int,
    ) -> None:
        routes = session.epochs if session else []
        self._journal.ended(
            SessionRecord(
                request_class=request.request_class,
                arrival_s=arrival_s,
                first_token_s=times[0] if times else float("nan"),
                end_s=times[-1] if times and status == 200 else float("nan"),
                prompt_tokens=len(request.prompt_ids),
                new_tokens=len(times),
                status=status,
                epochs=tuple(routes),
                moves=tuple(session.moves) if session else (),
                private_ok=session.private_ok if session else True,
                token_times_s=tuple(times),
                copied_bytes=session.copied_bytes if session else 0,
                copy_lag=session.copy_lag if session else 0,
            )
        )

    def _private_ok(self, route: Route) -> bool:
        return not exposed_blocks(route.placement, self._features, self._cluster.trusted)
