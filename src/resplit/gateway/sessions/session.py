"""One session: the life of an admitted request, from its reservation until its nodes close its caches.

The methods of `Session` follow that life from top to bottom:

- admitted (`admit`): its tokens are reserved, and it has a route.
- decoding (`tokens`): one pass after another along the route, the prompt first, then each new token, perhaps with
  drafts of the tokens after it (speculation). The node of the head may begin some of them itself (follow-ups).
- moving (`_follow_live_epoch`): a newer epoch is live. Caches are pre-copied to its nodes while passes continue on
  the old route. At a token boundary the session switches and decodes on.
- recovering (`_recover`): a node of the route was lost, perhaps during a move. Surviving caches are restored on the
  live route, the other passes are replayed, and the session decodes on.
- ended (`end`): possible in every state, because a client may leave at any moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import structlog

from resplit.errors import RECALLED, CommandRefusedError, NodeLostError, RequestError, ResplitError
from resplit.gateway.engine import GeneratedToken, GenerationRequest
from resplit.gateway.sessions.admission import Deadline, Reservation
from resplit.gateway.sessions.answers import Awaited, New, PassAnswers
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.follow_ups import FollowUps, most_follow_ups
from resplit.gateway.sessions.kv_replication import KvReplication
from resplit.gateway.sessions.kv_transfer import PreCopy, another_round_pays, plan_move, plan_restore
from resplit.gateway.sessions.pass_message import add_wishes, pass_message
from resplit.gateway.sessions.permits import SessionPermits
from resplit.gateway.sessions.speculation import PassTimes, Speculation
from resplit.pass_times import PassTime, TimeSpent
from resplit.privacy import exposed_blocks
from resplit.process.cancellation import cancel_and_wait, retrieve_error
from resplit.session_records import SessionMove, SessionRecovery
from resplit.types import Logprobs
from resplit.wire.choices import logprobs_from_wire
from resplit.wire.node_pb2 import Token
from resplit.wire.routes import Route
from resplit.wire.segment_times import segment_times

_log = structlog.get_logger(__name__)
# Another node may report a loss this much earlier than the gateway's own connection breaks.
_CONFIRM_LOSS_WITHIN_S = 0.2
# After this many attempts to restore caches, the session computes every pass again.
_RESTORE_TRIES = 3
# A replay repeats at most this many positions in a pass, so that a pause of all streams need not wait for all of it.
_REPLAY_POSITIONS = 256
# A move at once takes no longer; without its caches the session is replayed. A node that leaves might never send them.
_MOVE_WITHIN_S = 10.0


@dataclass(eq=False)
class Session:
    """One admitted request. `due_s` is its deadline, `late_s` when it misses its objective (event loop's clock)."""

    name: str
    request: GenerationRequest
    due_s: float
    late_s: float
    context: SessionContext
    reservation: Reservation  # held until `end`; no node caches more tokens of the session than it reserves
    route: Route  # of the next pass; it changes only between passes

    # The passes done in this attempt, in order: the prompt, then one token each. The nodes of `route` have the caches
    # of exactly these passes, unless a loss is not noticed yet.
    steps: list[tuple[int, ...]] = field(default_factory=list)
    position: int = 0  # the length of all `steps`: the positions cached; both grow in `_did` only
    # While moving: the transfer to a newer epoch. `route` is still the old one, and its nodes still have every cache.
    precopying: asyncio.Task[PreCopy] | None = None

    # The epochs that it used, oldest first; `route.epoch` is the last.
    epochs: list[int] = field(default_factory=list)
    moves: list[SessionMove] = field(default_factory=list)  # completed moves and recoveries
    private_ok: bool = True  # False for good once a private block was routed to a node that is not trusted

    def __post_init__(self) -> None:
        self.permits = SessionPermits(self.name, self.reservation.tokens, self.context.router.peers)
        self.replication = KvReplication(self.permits, self.context)
        self.spent = TimeSpent()
        self.answers = PassAnswers(len(self.request.prompt_ids))
        self.follow_ups = FollowUps(self.permits, self.answers, self.context.gate, self._take_follow_up)
        self.recalls = 0  # passes that were given back before they began
        self.speculation = Speculation(self.request.prompt_ids, self.context.cluster.limits.drafts)
        self._made: list[int] = []  # the new tokens that were given to the caller so far
        self._last = 0  # the newest token; a follow-up caches it, perhaps before the caller gets it
        self._enter(self.route)

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

    def _did(self, steps: Sequence[tuple[int, ...]]) -> None:
        """These passes are done and cached."""
        self.steps += steps
        self.position += sum(map(len, steps))

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
        step = (self._last,) if self.steps else self.request.prompt_ids
        await self._until_room(self.position + len(step))
        async with self.context.gate.passing():
            await self._follow_live_epoch(at_once)
            return await self._verify(step)

    async def _until_room(self, positions: int) -> None:
        """Wait until the caches may grow to so many positions. A session that waits moves on with the live epoch."""
        admission, most = self.context.admission, positions + max(self.context.cluster.limits.drafts, self._most_ahead)
        if most <= self.reservation.held or admission.grow(self.reservation, positions, most):
            return
        while positions > self.reservation.held:
            freed, changed = asyncio.create_task(admission.freed()), asyncio.create_task(self.context.router.changed())
            moved = {self.precopying} if self.precopying else set()
            try:
                await asyncio.wait({freed, changed, *moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await cancel_and_wait([freed, changed])
            async with self.context.gate.passing():
                await self._follow_live_epoch()

    async def _verify(self, step: tuple[int, ...]) -> New:
        """One pass of `step` and of drafts, if they pay; else passes may follow it. Returns its new tokens."""
        times, end = self._times, self.position + len(step)
        drafts = self._drafts(end) if self.steps else ()
        follow_until = 0 if drafts or not self.steps else self._follow_until(end)
        begun_s = time.monotonic()
        answer = await self._pass((*step, *drafts), drafts, follow_until=follow_until)
        took_s = time.monotonic() - begun_s
        if self.steps:
            times.decoded(len(drafts), took_s)
        else:
            times.prompt(len(step), took_s)
        new = self.speculation.accept(drafts, tuple(answer.token_ids))
        self._did([step, *((token_id,) for token_id in new[:-1])])
        self._last = new[-1]
        self._replicate()
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
        moves = self.precopying is not None or self.route.epoch != router.live_route.epoch
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
        self._did([(self._last,)])
        self._replicate()
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

    def _replicate(self) -> None:
        self.replication.advance(self.route, self.position, may_begin=self.precopying is None)

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
            add_wishes(message, self.request, self._made, drafts, is_prompt=not self.steps)
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

    async def _follow_live_epoch(self, at_once: bool = False) -> None:
        """Between passes: begin, continue or finish the move to the live epoch.

        Each round of pre-copying sends the positions that passes added during the round before, while rounds become
        shorter. The switch sends the rest while the stream pauses. With `at_once`, no pass uses the old route any more.
        A route that breaks a rule is left at once, and never entered.
        """
        live = self.context.router.live_route
        if self.context.router.violation(live):  # one that violates none will follow
            return
        if self.route.epoch != live.epoch and self.context.router.violation(self.route):
            await self.move(live, _MOVE_WITHIN_S)
            self.context.on_moved()
            return
        if self.precopying is None:
            if self.route.epoch == live.epoch:
                return
            self.precopying = self._precopy(PreCopy(live))
        if self.steps and not self.precopying.done() and not at_once:
            return
        precopy = await self.precopying
        self.precopying = None
        if not at_once and another_round_pays(self.position - precopy.last, precopy.last - precopy.first):
            self.precopying = self._precopy(precopy)
        else:
            await self._switch(precopy)

    def _precopy(self, before: PreCopy) -> asyncio.Task[PreCopy]:
        """Begin to transfer the cached positions in the background: passes take precedence on the links."""
        task = asyncio.create_task(self._transfer(before, self.position, background=True))
        task.add_done_callback(retrieve_error)  # the session may end before it awaits the task
        return task

    async def _switch(self, precopy: PreCopy) -> None:
        """Transfer the positions that are missing on the new route, then use it."""
        begun_s = time.monotonic()
        patched = await self._transfer(precopy, self.position)
        pause_s = time.monotonic() - begun_s
        self.replication.stop()
        self._enter(precopy.target)
        self.permits.keep_only_soon(self.route, self.lose)
        self.moves.append(SessionMove(self.route.epoch, pause_s, patched.cache_bytes))
        self.context.on_moved()

    async def move(self, route: Route, within_s: float | None = None) -> None:
        """Move to a route at once, caches included. No pass of this session runs meanwhile.

        If the caches cannot be transferred within `within_s`, the session is lost on its new route and recovers there.
        """
        begun_s = time.monotonic()
        self.replication.stop()
        try:
            async with asyncio.timeout(within_s):
                if self.precopying:  # let it finish: parts that arrive later would corrupt what is transferred now
                    await asyncio.gather(self.precopying, return_exceptions=True)
                transferred = await self._transfer(PreCopy(route), self.position)
        except (ResplitError, TimeoutError) as error:
            self._stop_transfers()
            self._enter(route)
            self.lose(str(error) or f"its caches could not be moved within {within_s} s")
            return
        self.precopying = None
        self._enter(route)
        self.permits.keep_only_soon(self.route, self.lose)
        self.moves.append(SessionMove(route.epoch, time.monotonic() - begun_s, transferred.cache_bytes))

    async def _transfer(self, before: PreCopy, last: int, background: bool = False) -> PreCopy:
        """Transfer the positions from `before.last` to `last - 1` of every block that moves to another node."""
        await self.permits.enter(before.target)
        if last == before.last:
            return before
        transfers = plan_move(self.route, before.target, self.context.features, before.last, last)
        sent_bytes = await self.context.transfer(self.permits, transfers, background)
        return PreCopy(before.target, before.last, last, before.cache_bytes + sent_bytes)

    def _enter(self, route: Route) -> None:
        """Use `route` from the next pass on."""
        self.route = route
        if self.epochs[-1:] != [route.epoch]:
            self.epochs.append(route.epoch)
        exposed = exposed_blocks(route.placement, self.context.features, self.context.cluster.trusted)
        self.private_ok = self.private_ok and not exposed

    async def _recover(self, noticed_s: float) -> None:
        """Continue after a loss: restore the caches that survive, and replay the other passes.

        `noticed_s` is the time from the start of the failed pass until its failure was known.
        """
        begun_s, done = time.monotonic(), self.steps
        for tries in itertools.count(1):
            await self._begin_attempt()
            ready_s = time.monotonic()
            try:
                async with self.context.gate.passing():
                    sent_bytes = await self._restore(done if tries <= _RESTORE_TRIES else [])
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
            self.moves.append(SessionMove(self.route.epoch, end_s - begun_s, sent_bytes, True, recovery))
            self.context.journal.recovered(self.moves[-1])
            return

    async def _begin_attempt(self) -> None:
        """Begin a new attempt without any pass done, on the live route once all its nodes answer."""
        router = self.context.router
        self._stop_transfers()
        if router.unready_reason() is None and router.live_route.epoch == self.route.epoch:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONFIRM_LOSS_WITHIN_S):
                    await router.changed()
        await router.until_ready()
        self.permits.new_attempt()
        self.answers.forget()
        self.steps, self.position = [], 0
        self._enter(router.live_route)

    async def _restore(self, done: list[tuple[int, ...]]) -> int:
        """Restore the caches of as many of the passes `done` as survive everywhere; returns the bytes transferred."""
        router = self.context.router
        held = await self.permits.begin(self.route, router.listening)
        if silent := sorted(set(self.route.placement) - held.keys()):
            raise NodeLostError(f"no answer from {', '.join(silent)}")
        cached = [index for index, block in enumerate(self.context.features) if block.kv_bytes_per_token > 0]
        plan = plan_restore(held, self.route.placement, cached, [len(step) for step in done])
        sent_bytes = await self.context.transfer(self.permits, plan.transfers)
        self._did(done[: plan.steps])
        self.replication.adopt(held, self.route, self.position)
        return sent_bytes

    async def _replay(self, done: list[tuple[int, ...]]) -> None:
        """Repeat the passes `done` that were not restored. Their tokens are known.

        The decode steps run together, stepwise. One prefill for all would give other bits, and at a near tie another
        token.
        """
        while missing := done[len(self.steps) :]:
            is_prompt = not self.steps
            steps = missing[:1] if is_prompt else missing[:_REPLAY_POSITIONS]
            async with self.context.gate.passing():
                await self._pass(tuple(itertools.chain.from_iterable(steps)), stepwise=not is_prompt, again=True)
                self._did(steps)

    def end(self) -> None:
        """Free what the session holds at the gateway, and have every node close its caches."""
        self._stop_transfers()
        self.follow_ups.stop()
        self.context.router.close_session(self.name, self.permits.nodes)
        self.context.admission.release(self.reservation)

    def _stop_transfers(self) -> None:
        if self.precopying:
            self.precopying.cancel()
            self.precopying = None
        self.permits.stop()
        self.replication.stop()
