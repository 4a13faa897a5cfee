"""What a node gives for a pass, who waits for it, and how it reaches them from the executor's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resplit.model.activation import Activation
from resplit.model.sampling import Drawn
from resplit.node.batching import Half, SegmentPass, Waiting
from resplit.node.emulation import Load

# The pass that follows one that ended at a position with these tokens, if there is one.
Follow = Callable[[int, tuple[int, ...]], SegmentPass | None]
# Sends a result on in the executor's thread; False if the event loop has to do it.
SendOn = Callable[["PassResult"], bool]


@dataclass(frozen=True)
class BatchTime:
    """How long a part of a pass waited for its batch, and how long the batch ran, both on the clock.

    Where the node is emulated, what its host adds to the time of the batch counts as waiting. `load` is what the batch
    computed, `background_utilization` the share of the node that others used meanwhile.
    """

    waited_s: float
    computed_s: float
    load: Load
    background_utilization: float
    first_half_s: float = 0.0  # of `computed_s`, for the first half of the blocks; 0 if there is only one
    prompt_half: Half = Half.BOTH  # of the blocks, through which the tokens of a prompt ran

    @property
    def node_s(self) -> float:
        """The time of the batch without what background load added."""
        return self.computed_s * (1 - self.background_utilization)


@dataclass(frozen=True)
class PassResult:
    """The result of one part of a pass, `tokens` positions from `start` on.

    `value` is hidden states, or the sampled tokens; None after the head of a part that is not the last. A part of a
    prompt that is scored has log probabilities and no tokens. `followed`: the next pass of the session waits already.
    """

    start: int
    tokens: int
    value: Activation | Drawn | None
    is_last: bool
    time: BatchTime | None = None  # set by the executor
    followed: bool = False


def nothing_follows(end: int, token_ids: tuple[int, ...]) -> None:
    """The caller begins its next pass itself."""


def by_event_loop(result: PassResult) -> bool:
    """The caller gets all results."""
    return False


@dataclass(eq=False)
class PassWaiter:
    """Who waits for a pass, and for those that follow it. Made in the event loop in which `take` is called.

    `take` gets the result of each part, and raises nothing. An error is the last that it gets. It does not get what
    `send_on` has sent.
    """

    take: Callable[[PassResult | Exception], None]
    follow: Follow = nothing_follows
    late_s: float = 0.0  # when its request misses its objective
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    has_left: bool = False  # guarded by the executor's lock
    send_on: SendOn = by_event_loop
    has_results: bool = False  # `take` gets one of this pass, and so all others: they must not overtake it

    def is_sent(self, outcome: PassResult | Exception) -> bool:
        """Whether `send_on` sends this outcome. The executor's thread calls this."""
        sent = isinstance(outcome, PassResult) and not (self.has_results or self.has_left) and self.send_on(outcome)
        self.has_results = self.has_results or not sent
        return sent


@dataclass(eq=False)
class Queued(Waiting):
    """A waiting pass, and who waits for it. `whole`: no part of the pass came before it, and none follows."""

    caller: PassWaiter = field(kw_only=True)
    whole: bool = True


Outcome = tuple[Queued, PassResult | Exception]


def give(outcomes: Sequence[Outcome]) -> None:
    """Give outcomes to those who wait for them: all at once, because each call wakes an event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Outcome]] = {}
    for queued, outcome in outcomes:
        by_loop.setdefault(queued.caller.loop, []).append((queued, outcome))
    for loop, results in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the event loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_put, results)


def _put(results: Sequence[Outcome]) -> None:
    for queued, result in results:
        if not queued.caller.has_left:
            queued.caller.take(result)
