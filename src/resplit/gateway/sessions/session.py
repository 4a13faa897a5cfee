"""One session: the life of an admitted request, from its reservation until its nodes close its caches.

The methods of `Session` follow that life from top to bottom:

- admitted (`admit`): its tokens are reserved, and it has a route.
- decoding (`tokens`): one pass after another along the route, the prompt first, then each new token, perhaps with
  drafts of the tokens after it (speculation). The node of the head may begin some of them itself (follow-ups).
- moving: a newer epoch is live. Before each pass the caches follow it (`session_caches.py`).
- recovering (`_recover`): a node of the route was lost, perhaps during a move. Surviving caches are restored on the
  live route, the other passes are replayed, and the session decodes on.
- ended (`end`): possible in every state, because a client may leave at any moment.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from typing import Literal

import structlog

from resplit.errors import RECALLED, CommandRefusedError, NodeLostError, RequestError
from resplit.gateway.engine import GeneratedToken, GenerationRequest
from resplit.gateway.sessions.admission import Deadline, Reservation
from resplit.gateway.sessions.answers import Awaited, New, PassAnswers
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.follow_ups import FollowUps, most_follow_ups
from resplit.gateway.sessions.pass_message import add_wishes, pass_message
from resplit.gateway.sessions.permits import SessionPermits
from resplit.gateway.sessions.session_caches import SessionCaches
from resplit.gateway.sessions.speculation import PassTimes, Speculation
from resplit.pass_times import PassTime, TimeSpent
from resplit.process.cancellation import cancel_and_wait
from resplit.session_records import SessionMove, SessionRecovery
from resplit.types import Logprobs
from resplit.wire.choices import logprobs_from_wire
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route
from resplit.wire.segment_times import segment_times

_log = structlog.get_logger(__name__)
# After this many attempts to restore caches, the session computes every pass again.
_RESTORE_TRIES = 3
# A replay repeats at most this many positions in a pass, so that a pause of all streams need not wait for all of it.
_REPLAY_POSITIONS = 256


class Session:
    """One admitted request. `due_s` is its deadline, `late_s` when it misses its objective (event loop's clock).

    `reservation` is held until `end`; no node caches more tokens of the session than it reserves.
    """

    def __init__(
        self,
        name: str,
        request: GenerationRequest,
        due_s: float,
        late_s: float,
        context: SessionContext,
        reservation: Reservation,
        route: Route,
    ) -> None:
        self.name = name
        self.request = request
        self.due_s = due_s
        self.late_s = late_s
        self.context = context
        self.reservation = reservation
        self.permits = SessionPermits(name, reservation.tokens, context.router.peers)
        self.caches = SessionCaches(self.permits, route, context, self.lose)
        self.spent = TimeSpent()
        self.answers = PassAnswers(len(request.prompt_ids))
        self.follow_ups = FollowUps(self.permits, self.answers, context.gate, self._take_follow_up)
        self.recalls = 0  # passes that were given back before they began
        self.speculation = Speculation(request.prompt_ids, context.cluster.limits.drafts)
        self._made: list[int] = []  # the new tokens that were given to the caller so far
        self._last = 0  # the newest token; a follow-up caches it, perhaps before the caller gets it

    @classmethod
    async def admit(
        cls, name: str, request: GenerationRequest, arrival_s: float, due_s: float, context: SessionContext
    ) -> Session:
        """Wait for a live route and for room in the caches, then begin; raises as `TokenEngine.generate` does.

        `arrival_s` and `due_s` are on the event loop's clock.
        """
        prompt_tokens, new_tokens = len(request.prompt_ids), request.max_new_tokens
        limit = min(context.cluster.limits.context_tokens, context.cluster.kv_tokens)
        if not prompt_tokens or prompt_tokens + new_tokens > limit:
            raise RequestError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit the context of {limit} tokens"
            )
        async with asyncio.timeout_at(due_s):
            await context.router.until_ready()
        objective = context.cluster.request_class(request.request_class)
        deadline = Deadline(arrival_s, objective.slo) if objective.shed_late and objective.slo else None
        reservation = await context.admission.reserve(prompt_tokens, new_tokens, due_s, deadline, request.client)
        late_s = arrival_s + context.cluster.objective_s(request.request_class)
        return cls(name, request, due_s, late_s, context, reservation, context.router.live_route)

    @property
    def route(self) -> Route:
        """The route of the next pass."""
        return self.caches.route

    @property
    def position(self) -> int:
        """The positions cached."""
        return self.caches.position

    async def tokens(self) -> AsyncIterator[GeneratedToken]:
        """Prefill the prompt, then decode until a stop id or `max_new_tokens`; raises as `generate` of the engine."""
        made = self._made
        while len(made) < self.request.max_new_tokens:
            begun_s = time.monotonic()
            new = await self._next_tokens()
            took_s = new.took_s or (time.monotonic() - begun_s) / len(new.token_ids)
            for token_id, logprobs in itertools.zip_longest(new.token_ids, new.logprobs):
                self.context.admission.made_token(self.reservation, took_s)
                made.append(token_id)
                yield self._token(token_id, logprobs)
                if token_id in self.request.stop_ids:
                    return

    def _token(self, token_id: int, logprobs: Logprobs | None) -> GeneratedToken:
        """The token that was made last, as the caller gets it."""
        made, limit = len(self._made), self.request.max_new_tokens
        finish: Literal["stop", "length"] | None = "length" if made == limit else None
        if token_id in self.request.stop_ids:
            finish = "stop"
        scores = sorted(self.answers.scores.items()) if made == 1 else ()
        return GeneratedToken(token_id, made - 1, finish, logprobs, tuple(found for _, found in scores))

    async def _next_tokens(self) -> New:
        """The tokens of the next pass. After a loss the session recovers and repeats the pass.

        TimeoutError at its deadline. Follow-ups have a timer for all of them, instead of one for each token.
        """
        recalled = False
        while True:
            if not self.follow_ups.are_under_way and self.context.router.violation(self.route):
                async with asyncio.timeout_at(self.due_s):
                    await self.context.router.until_ready()
            begun_s = time.monotonic()
            try:
                if not self.follow_ups.are_under_way:
                    async with asyncio.timeout_at(self.due_s):
                        return await self._begin_pass(at_once=recalled)
                if new := await self.follow_ups.next():
                    self._ask_for_more()
                    return new
            except CommandRefusedError as error:
                if error.reason != RECALLED:
                    raise
                recalled = True
                self.recalls += 1
            except NodeLostError as error:
                _log.warning("session recovers from a loss", session=self.name, done=self.position, error=str(error))
                async with asyncio.timeout_at(self.due_s):
                    await self._recover(time.monotonic() - begun_s)

    async def _begin_pass(self, at_once: bool) -> New:
        """The tokens of a pass that the gateway begins. With `at_once`, a move to a newer epoch ends before it."""
        step = (self._last,) if self.caches.steps else self.request.prompt_ids
        await self._until_room(self.position + len(step))
        async with self.context.gate.passing():
            await self.caches.follow_live_epoch(at_once)
            return await self._verify(step)

    async def _until_room(self, positions: int) -> None:
        """Wait until the caches may grow to so many positions. A session that waits moves on with the live epoch."""
        admission, most = self.context.admission, positions + max(self.context.cluster.limits.drafts, self._most_ahead)
        if most <= self.reservation.held or admission.grow(self.reservation, positions, most):
            return
        while positions > self.reservation.held:
            freed, changed = asyncio.create_task(admission.freed()), asyncio.create_task(self.context.router.changed())
            moved = {self.caches.precopying} if self.caches.precopying else set()
            try:
                await asyncio.wait({freed, changed, *moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel_and_wait([freed, changed])
            async with self.context.gate.passing():
                await self.caches.follow_live_epoch()

    async def _verify(self, step: tuple[int, ...]) -> New:
        """One pass of `step` and of drafts, if they pay; else passes may follow it. Returns its new tokens."""
        times, end = self._times, self.position + len(step)
        drafts = self._drafts(end) if self.caches.steps else ()
        follow_until = 0 if drafts or not self.caches.steps else self._follow_until(end)
        begun_s = time.monotonic()
        answer = await self._pass((*step, *drafts), drafts, follow_until=follow_until)
        took_s = time.monotonic() - begun_s
        if self.caches.steps:
            times.decoded(len(drafts), took_s)
        else:
            times.prompt(len(step), took_s)
        new = self.speculation.accept(drafts, tuple(answer.token_ids))
        self.caches.did([step, *((token_id,) for token_id in new[:-1])])
        self._last = new[-1]
        self.caches.replicate()
        if answer.followed:
            self.follow_ups.begin(self.due_s)
        return New(new, logprobs_from_wire(answer.logprobs[: len(new)]))

    def _drafts(self, end: int) -> tuple[int, ...]:
        """The drafts for a pass that ends at position `end` without them."""
        room = min(self._last_end, self.reservation.held) - end
        return self.speculation.drafts(self._times, self.context.admission.running, room)

    def _follow_until(self, end: int) -> int:
        """Before which position the node of the head may begin the passes after one that ends at `end`; 0: none.

        It needs the gateway between two tokens if they are steered, if the session moves or is to pause, or if drafts
        pay.
        """
        router, request = self.context.router, self.request
        moves = self.caches.precopying is not None or self.route.epoch != router.live_route.epoch
        if moves or request.steering or self.context.gate.is_paused or router.violation(self.route):
            return 0
        if self.route.placement[0] != self.route.placement[-1] or not self.speculation.resting:
            return 0
        return self.follow_ups.until(end, self._most_ahead, min(self._last_end, self.reservation.held))

    def _ask_for_more(self) -> None:
        """Let the passes under way be followed by more, once half of those in advance are done."""
        most = self._most_ahead
        end = self.follow_ups.end_if_half_done(most)
        if end is None or self._drafts(end):
            return
        if self.reservation.held < end + most:
            self.context.admission.grow(self.reservation, end, end + most)
        self.follow_ups.extend(self._follow_until(end))

    def _take_follow_up(self, answer: Token, took_s: float) -> New:
        """The answer to a pass that the node of the head began itself, so long after the token before."""
        self._note_time(answer, 1, took_s, followed=True)
        self._times.decoded(0, took_s)
        self.caches.did([(self._last,)])
        self.caches.replicate()
        (self._last,) = self.speculation.accept((), tuple(answer.token_ids))
        return New((self._last,), logprobs_from_wire(answer.logprobs), took_s)

    @property
    def _times(self) -> PassTimes:
        return self.context.times.of(self.route.epoch)

    @property
    def _most_ahead(self) -> int:
        return most_follow_ups(self._times.pass_s)

    @property
    def _last_end(self) -> int:
        """The position at which the last pass ends, that of the last token but one."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - 1

    async def _pass(
        self,
        step: tuple[int, ...],
        drafts: tuple[int, ...] = (),
        stepwise: bool = False,
        again: bool = False,
        follow_until: int = 0,
    ) -> Token:
        """One pass of these tokens along the route, after all passes done; returns the answer of the head.

        The last tokens are the guesses `drafts`; the head chooses one after each, and after the token before. With
        `stepwise`, every position gets the bits of a pass of its own. Of a pass that is done `again`, only the caches
        matter. The node of the head may begin the passes after this one that start before position `follow_until`.
        """
        message = pass_message(self.request, step, stepwise, len(drafts), follow_until)
        message.session, message.attempt = self.name, self.permits.attempt
        message.epoch, message.start = self.route.epoch, self.position
        message.gateway = self.context.router.member.name
        message.left_s = max(0.0, self.late_s - asyncio.get_running_loop().time())
        if not again:
            add_wishes(message, self.request, self._made, drafts, is_prompt=not self.caches.steps)
        begun_s, attempt, end = time.monotonic(), self.permits.attempt, self.position + len(step)
        wants = message.logprobs > 0, len(message.scored) > 0
        self.answers.expect(Awaited(self.route, attempt, self.position, end, 1 + len(drafts), *wants, follow_until))
        others = {} if self.permits.nodes else self.permits.start(self.route, message)
        self.context.router.send(self.route, message)
        for node, permit in others.items():
            self.permits.peer(node).send(permit)
        answer = await self.answers.last()
        if not stepwise:
            self._note_time(answer, len(step), time.monotonic() - begun_s)
        return answer

    def _note_time(self, answer: Token, tokens: int, took_s: float, followed: bool = False) -> None:
        segments = segment_times(answer, self.route)
        if segments:
            done = PassTime(self.route.epoch, self.position, tokens, time.monotonic(), took_s, segments, followed)
            self.spent.add(done)
            self.context.on_pass(done)

    def receive(self, node: str, answer: Token) -> bool:
        """Accept the answer of `node` if it belongs to the pass under way; returns whether it does."""
        fits = self.answers.accept(node, answer)
        if not fits:
            _log.info("answer ignored", session=self.name, node=node, epoch=answer.epoch, position=answer.position)
        return fits

    def lose(self, reason: str) -> None:
        """End the current pass, or the next one if none runs, with the loss of the session's caches."""
        lost = Token(session=self.name, attempt=self.permits.attempt, epoch=self.route.epoch)
        lost.error, lost.error_kind = reason, "lost"
        self.answers.lose(lost)

    async def _recover(self, noticed_s: float) -> None:
        """Continue after a loss: restore the caches that survive, and replay the other passes.

        `noticed_s` is the time from the start of the failed pass until its failure was known.
        """
        begun_s, done = time.monotonic(), self.caches.steps
        for tries in itertools.count(1):
            await self.caches.begin_attempt()
            self.answers.forget()
            ready_s = time.monotonic()
            try:
                async with self.context.gate.passing():
                    sent_bytes = await self.caches.restore(done if tries <= _RESTORE_TRIES else [])
                restored_s, restored = time.monotonic(), self.position
                await self._replay(done)
            except NodeLostError as error:
                _log.warning("session lost a node again while recovering", session=self.name, error=str(error))
                continue
            end_s = time.monotonic()
            recovery = SessionRecovery(
                noticed_s=noticed_s,
                waited_s=ready_s - begun_s,
                restore_s=restored_s - ready_s,
                replay_s=end_s - restored_s,
                restored_positions=restored,
                replayed_positions=self.position - restored,
            )
            self.caches.moves.append(SessionMove(self.route.epoch, end_s - begun_s, sent_bytes, True, recovery))
            self.context.journal.recovered(self.caches.moves[-1])
            return

    async def _replay(self, done: list[tuple[int, ...]]) -> None:
        """Repeat the passes `done` that were not restored. Their tokens are known.

        The decode steps run together, stepwise. One prefill for all would give other bits, and at a near tie another
        token.
        """
        while missing := done[len(self.caches.steps) :]:
            is_prompt = not self.caches.steps
            steps = missing[:1] if is_prompt else missing[:_REPLAY_POSITIONS]
            async with self.context.gate.passing():
                await self._pass(tuple(itertools.chain.from_iterable(steps)), stepwise=not is_prompt, again=True)
                self.caches.did(steps)

    def end(self) -> None:
        """Free what the session holds at the gateway, and have every node close its caches."""
        self.caches.stop_transfers()
        self.follow_ups.stop()
        self.context.router.close_session(self.name, self.permits.nodes)
        self.context.admission.release(self.reservation)
