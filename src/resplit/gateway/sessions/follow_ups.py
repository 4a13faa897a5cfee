"""Follow-up passes: the head's node begins them itself, so that a token does not wait for the gateway's turn.

The gateway asks for them some passes in advance, as long as nothing needs it between two tokens, and takes the answers
as they come, whether or not the client reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable

from resplit.errors import CapacityError, NodeLostError
from resplit.gateway.sessions.answers import Awaited, New, PassAnswers, error_of
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
        self._leave: Callable[[object], None] | None = None  # the gate; set while answers are awaited
        self._before_s = 0.0  # when the last answer came
        self._unread = False  # whether `next` has more to say
        self._deadline: asyncio.TimerHandle | None = None
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
        return self._unread

    def begin(self, due_s: float = math.inf) -> None:
        """After a pass that is followed, within the gate: take the answers of all that come after it.

        They end with TimeoutError at `due_s` (event loop's clock).
        """
        self._unread, self._leave, self._before_s = True, self._gate.stay(), time.monotonic()
        if due_s < math.inf:
            self._deadline = asyncio.get_running_loop().call_at(due_s, self._end, TimeoutError())
        self._answers.redirect(self._accept)

    async def next(self) -> New | None:
        """The new tokens of the next one; None if there are no more. Raises the error with which they ended."""
        taken = await self._taken.get()
        if isinstance(taken, New):
            return taken
        self._unread = False
        if taken is not None:
            raise taken
        return None

    def stop(self) -> None:
        """Take no more answers."""
        if self._leave is not None:
            self._end(None)

    def _accept(self, answer: Token) -> None:
        """Take an answer in the turn in which it came: a task for it would cost more than what is done here."""
        try:
            if answer.error_kind:
                raise error_of(answer)
            now_s = time.monotonic()
            new = self._take(answer, now_s - self._before_s)
        except Exception as error:  # a defect, too, must reach the request
            self._end(error)
            return
        self._before_s = now_s
        self._taken.put_nowait(new)
        if not answer.followed:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._answers.queue_again()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave(None)
            self._taken.put_nowait(error)

    def _ask(self, awaited: Awaited, until: int) -> None:
        """Replace the position up to which the node of the head may begin the passes after the one under way."""
        route, session = awaited.route, self._permits.session
        change = Step(session=session, attempt=awaited.attempt, epoch=route.epoch, follow_until=until)
        with contextlib.suppress(CapacityError, NodeLostError):  # the node does what it was asked before, or is lost
            self._permits.peer(route.placement[-1]).send(change)
