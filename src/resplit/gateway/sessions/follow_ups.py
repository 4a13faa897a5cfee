"""Follow-up passes: the head's node begins them itself, so that a token does not wait for the gateway's turn.

The gateway asks for them some passes in advance, as long as nothing needs it between two tokens, and takes the answers
as they come, whether or not the client reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

from resplit.errors import CapacityError, NodeLostError
from resplit.gateway.sessions.answers import Awaited, New, PassAnswers
from resplit.gateway.sessions.pause_gate import PauseGate
from resplit.gateway.sessions.permits import SessionPermits
from resplit.wire.node_pb2 import Step, Token

# What must happen between two passes (a move, a pause, the end of a request) waits for follow-ups at most this long.
_LONGEST_S = 0.1
_MOST = 32  # a session gets room in the caches for those in advance


def most_follow_ups(pass_s: float) -> int:
    """How many follow-ups may be asked for in advance where a pass takes so long; none while that is not known."""
    return min(_MOST, int(_LONGEST_S / pass_s)) if pass_s else 0


class FollowUps:
    """The follow-ups of one session. `take` makes new tokens of an answer and the seconds since the one before."""

    def __init__(
        self,
        permits: SessionPermits,
        answers: PassAnswers,
        gate: PauseGate,
        take: Callable[[Token, float], New],
    ) -> None:
        self._permits = permits
        self._answers = answers
        self._gate = gate
        self._take = take
        self._task: asyncio.Task[None] | None = None
        self._taken: asyncio.Queue[New | Exception | None] = asyncio.Queue()  # None: there are no more

    def until(self, end: int, most: int, limit: int) -> int:
        """Before which position passes may begin that follow one that ends at position `end`; 0: none may.

        At most `most` are in advance, and none begins at `limit` or later. Those whose tokens the caller has not read
        yet count, so that a slow caller slows the session down.
        """
        ahead = most - self._taken.qsize()
        return min(end + ahead, limit) if ahead > 0 else 0

    def end_if_half_done(self, most: int) -> int | None:
        """Where the pass under way ends, if at most half of `most` passes may still follow it; else None."""
        awaited = self._answers.awaited
        return awaited.end if awaited and awaited.until - awaited.end <= most // 2 else None

    def extend(self, until: int) -> None:
        """Let the passes under way be followed by those that begin before position `until` too."""
        awaited = self._answers.awaited
        if awaited and until > awaited.until:
            self._ask(awaited, until)
            self._answers.extend(until)

    def withdraw(self) -> None:
        """Have the node of the head begin no more passes itself. Those that it has begun are answered."""
        awaited = self._answers.awaited
        if awaited and awaited.until:
            self._ask(awaited, 0)

    @property
    def are_under_way(self) -> bool:
        """Whether `next` has more to say."""
        return self._task is not None

    def begin(self) -> None:
        """After a pass that is followed, within the gate: take the answers of all that come after it."""
        self._task = asyncio.create_task(self._run(), name="follow-ups")
        self._task.add_done_callback(self._gate.stay())

    async def next(self) -> New | None:
        """The new tokens of the next one; None if there are no more. Raises the error with which they ended."""
        taken = await self._taken.get()
        if isinstance(taken, New):
            return taken
        self._task = None
        if taken is not None:
            raise taken
        return None

    def stop(self) -> None:
        """Take no more answers."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        before_s, followed = time.monotonic(), True
        try:
            while followed:
                answer = await self._answers.last()
                now_s = time.monotonic()
                self._taken.put_nowait(self._take(answer, now_s - before_s))
                before_s, followed = now_s, answer.followed
        except Exception as error:  # a defect, too, must reach the request
            self._taken.put_nowait(error)
        else:
            self._taken.put_nowait(None)

    def _ask(self, awaited: Awaited, until: int) -> None:
        """Replace the position up to which the node of the head may begin the passes after the one under way."""
        route, session = awaited.route, self._permits.session
        change = Step(session=session, attempt=awaited.attempt, epoch=route.epoch, follow_until=until)
        with contextlib.suppress(CapacityError, NodeLostError):  # the node does what it was asked before, or is lost
            self._permits.peer(route.placement[-1]).send(change)
