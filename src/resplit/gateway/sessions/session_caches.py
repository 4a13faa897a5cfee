"""The caches of one session on the nodes: which passes they hold, and how they get from route to route.

- While a newer epoch is live (`follow_live_epoch`): the caches are pre-copied to its nodes while passes continue on the
  old route. At a token boundary the session switches.
- After a loss (`begin_attempt`, `restore`): what other nodes still hold is sent to the nodes of the live route.

What the passes are for is not known here.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

from resplit.errors import NodeLostError, ResplitError
from resplit.gateway.sessions.context import SessionContext
from resplit.gateway.sessions.kv_replication import KvReplication
from resplit.gateway.sessions.kv_transfer import PreCopy, another_round_pays, plan_move, plan_restore
from resplit.gateway.sessions.permits import SessionPermits
from resplit.privacy import exposed_blocks
from resplit.process.cancellation import retrieve_error
from resplit.session_records import SessionMove
from resplit.wire.routes import Route

# Another node may report a loss this much earlier than the gateway's own connection breaks.
_CONFIRM_LOSS_WITHIN_S = 0.2
# A move at once takes no longer; without its caches the session is replayed. A node that leaves might never send them.
_MOVE_WITHIN_S = 10.0


class SessionCaches:
    """The caches of one session. `lose` ends its current pass with their loss, for the reason that it is given.

    `route` is that of the next pass; it changes only between passes. `epochs` are those that the session used, oldest
    first; `moves` are its completed moves. `private_ok` is false for good once a private block was routed to a node
    that is not trusted.
    """

    def __init__(
        self, permits: SessionPermits, route: Route, context: SessionContext, lose: Callable[[str], None]
    ) -> None:
        self.permits = permits
        self.replication = KvReplication(permits, context)
        # The passes done in this attempt, in order: the prompt, then one token each. The nodes of `route` have the
        # caches of exactly these passes, unless a loss is not noticed yet.
        self.steps: list[tuple[int, ...]] = []
        self.position = 0  # the length of all `steps`: the positions cached; both grow in `did` only
        self.epochs: list[int] = []
        self.moves: list[SessionMove] = []
        self.private_ok = True
        # While moving: the transfer to a newer epoch. `route` is still the old one; its nodes still have every cache.
        self.precopying: asyncio.Task[PreCopy] | None = None
        self._context = context
        self._lose = lose
        self._enter(route)

    def did(self, steps: Sequence[tuple[int, ...]]) -> None:
        """These passes are done and cached."""
        self.steps += steps
        self.position += sum(map(len, steps))

    def replicate(self) -> None:
        """After a pass: extend the replicas, if it is time."""
        self.replication.advance(self.route, self.position, may_begin=self.precopying is None)

    async def follow_live_epoch(self, at_once: bool = False) -> None:
        """Between passes: begin, continue or finish the move to the live epoch.

        Each round of pre-copying sends the positions that passes added during the round before, while rounds become
        shorter. The switch sends the rest while the stream pauses. With `at_once`, no pass uses the old route any more.
        A route that breaks a rule is left at once, and never entered.
        """
        live = self._context.router.live_route
        if self._context.router.violation(live):  # one that violates none will follow
            return
        if self.route.epoch != live.epoch and self._context.router.violation(self.route):
            await self.move(live, _MOVE_WITHIN_S)
            self._context.on_moved()
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
        self.permits.keep_only_soon(self.route, self._lose)
        self.moves.append(SessionMove(self.route.epoch, pause_s, patched.cache_bytes))
        self._context.on_moved()

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
            self.stop_transfers()
            self._enter(route)
            self._lose(str(error) or f"its caches could not be moved within {within_s} s")
            return
        self.precopying = None
        self._enter(route)
        self.permits.keep_only_soon(self.route, self._lose)
        self.moves.append(SessionMove(route.epoch, time.monotonic() - begun_s, transferred.cache_bytes))

    async def _transfer(self, before: PreCopy, last: int, background: bool = False) -> PreCopy:
        """Transfer the positions from `before.last` to `last - 1` of every block that moves to another node."""
        await self.permits.enter(before.target)
        if last == before.last:
            return before
        transfers = plan_move(self.route, before.target, self._context.features, before.last, last)
        sent_bytes = await self._context.transfer(self.permits, transfers, background)
        return PreCopy(before.target, before.last, last, before.cache_bytes + sent_bytes)

    def _enter(self, route: Route) -> None:
        """Use `route` from the next pass on."""
        self.route = route
        if self.epochs[-1:] != [route.epoch]:
            self.epochs.append(route.epoch)
        exposed = exposed_blocks(route.placement, self._context.features, self._context.cluster.trusted)
        self.private_ok = self.private_ok and not exposed

    async def begin_attempt(self) -> None:
        """Begin a new attempt without any pass done, on the live route once all its nodes answer."""
        router = self._context.router
        self.stop_transfers()
        if router.unready_reason() is None and router.live_route.epoch == self.route.epoch:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_CONFIRM_LOSS_WITHIN_S):
                    await router.changed()
        await router.until_ready()
        self.permits.new_attempt()
        self.steps, self.position = [], 0
        self._enter(router.live_route)

    async def restore(self, done: list[tuple[int, ...]]) -> int:
        """Restore the caches of as many of the passes `done` as survive everywhere; returns the bytes transferred."""
        router = self._context.router
        held = await self.permits.begin(self.route, router.listening)
        if silent := sorted(set(self.route.placement) - held.keys()):
            raise NodeLostError(f"no answer from {', '.join(silent)}")
        cached = [index for index, block in enumerate(self._context.features) if block.kv_bytes_per_token > 0]
        plan = plan_restore(held, self.route.placement, cached, [len(step) for step in done])
        sent_bytes = await self._context.transfer(self.permits, plan.transfers)
        self.did(done[: plan.steps])
        self.replication.adopt(held, self.route, self.position)
        return sent_bytes

    def stop_transfers(self) -> None:
        """Transfer nothing any more: the session has ended, or its attempt."""
        if self.precopying:
            self.precopying.cancel()
            self.precopying = None
        self.permits.stop()
        self.replication.stop()
