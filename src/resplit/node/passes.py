"""The passes that run through a node. Results of steps go to the next node, tokens and errors to the gateway.

The node of the head also begins the follow-ups that the gateway asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import structlog

from resplit.errors import CapacityError, CommandRefusedError, DataError, NodeLostError, ResplitError, wire_word
from resplit.model.activation import Activation
from resplit.model.sampling import Drawn
from resplit.node.batching import SegmentPass
from resplit.node.connections import Connections
from resplit.node.follow_ups import RequestedFollowUps
from resplit.node.hosting import Hosting
from resplit.node.pass_results import BatchTime, PassResult
from resplit.process.cancellation import cancel_and_wait
from resplit.security.identity import CONTROLLER
from resplit.wire.choices import changes_from_wire, logprobs_to_wire, sampling_from_wire
from resplit.wire.emulated_link import Sender
from resplit.wire.node_pb2 import SegmentTime, Step, Token
from resplit.wire.peers import Peer
from resplit.wire.permits import Permit
from resplit.wire.routes import Route
from resplit.wire.tensors import from_wire

_log = structlog.get_logger(__name__)
_TOKEN_BYTES = 4
_LONGEST_LEFT_S = 3600.0  # what a member says may be anything
_NOTHING = Drawn(())


@dataclass(eq=False)
class _RunningStep:
    """A step that runs here, and the follow-ups after it."""

    steps: deque[Step]  # that are not done; the executor's thread appends what follows
    route: Route | None = None
    leave: Callable[[], None] | None = None  # gives up what is left of them
    onward: Step | None = None  # of the next segment, for the event loop to send


class Passes:
    """Runs the steps that arrive; `gateways` are the open streams of tokens, by name.

    A step has no task, except while it waits for its session's permit.
    """

    def __init__(self, name: str, hosting: Hosting, connections: Connections) -> None:
        self.gateways: dict[str, Sender[Token]] = {}
        self._name = name
        self._hosting = hosting
        self._connections = connections
        self._tasks: set[asyncio.Task[None]] = set()
        self._arriving: Counter[str] = Counter()  # steps that wait for a permit, by session
        self._closed = False
        self._follow_ups = RequestedFollowUps()
        hosting.permits.on_end = self._follow_ups.forget

    def tell_news(self) -> None:
        """Let each gateway know that this node's telemetry has news."""
        for gateway in self.gateways.values():
            with contextlib.suppress(CapacityError):
                gateway.put(Token(news=True), 0)

    def accept(self, sender: str, step: Step) -> None:
        """Run a step's segment and send the result on, in the background.

        CommandRefusedError for an epoch that is not served here, which the gateway is told; or if the epoch's route
        does not lead from `sender` here. This has no answer: it would end the pass of the member that may send the
        step.
        """
        if step.HasField("permit"):
            self._take_permit(sender, step)
        if sender == CONTROLLER and not step.HasField("values"):
            self._follow_ups.extend(step)
            return
        try:
            route = self._route(step)
        except CommandRefusedError as error:
            self._answer(step, error=error)
            raise
        if route.sender_to(self._name, step.segment) != sender:
            reason = f"{sender} may not send steps of segment {step.segment} of epoch {step.epoch} to {self._name}"
            raise CommandRefusedError("unexpected", reason)
        if sender == CONTROLLER and not self._hosting.permits.has_ended(step.session):
            self._follow_ups.ask(step)
        if self._hosting.permits.known(step.session) and step.session not in self._arriving:
            self._begin(step)
            return
        self._arriving[step.session] += 1  # what comes after it must not overtake it
        task = asyncio.create_task(self._begin_permitted(sender, step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _take_permit(self, sender: str, step: Step) -> None:
        """Take the permit that a session's first step brings. What follows it here must not bring it again."""
        if sender != CONTROLLER:
            raise CommandRefusedError("unexpected", f"{sender} may not give permits; only {CONTROLLER} may")
        permit = Permit.from_wire(step.permit)
        step.ClearField("permit")
        try:
            self._hosting.permits.give(step.session, permit)
        except CommandRefusedError as error:
            self._answer(step, error=error)
            raise

    def lost(self, peer: str, steps: list[Step]) -> None:
        """Answer the steps that `peer` did not acknowledge with an error."""
        for step in steps:
            self._answer(step, error=NodeLostError(f"{self._name} lost its connection to {peer} during a step"))

    async def cancel(self) -> None:
        """Send no more results on."""
        self._closed = True
        await cancel_and_wait(self._tasks)

    async def _begin_permitted(self, sender: str, step: Step) -> None:
        """Begin a step whose session's permit may still be on its way."""
        try:
            await self._hosting.permits.arrival(step.session, sender, len(step.values.data))
        finally:
            self._arriving[step.session] -= 1
            self._arriving += Counter()  # without those at 0
        self._begin(step)

    def _begin(self, step: Step) -> None:
        """Have a step and the follow-ups after it run, if the session's permit allows it."""
        running = _RunningStep(deque([step]))
        try:
            running.route = route = self._route(step)
            permit = self._hosting.permits.of(step.session, step.attempt)
            if step.epoch not in permit.epochs:
                raise CommandRefusedError("stale", f"session {step.session} does not run in epoch {step.epoch}")
            work = _segment_pass(step, route, permit.capacity)
            left_s = step.left_s if 0 <= step.left_s <= _LONGEST_LEFT_S else _LONGEST_LEFT_S
            executor, follow = self._hosting.running(), partial(self._follow, running.steps)
            caller = executor.submit(
                work, partial(self._take, running), follow, left_s, partial(self._send_on, running)
            )
            running.leave = partial(executor.leave, caller)
            if not running.steps:  # it is already done
                running.leave = None
        except Exception as error:
            self._fail(running, error)

    def _take(self, running: _RunningStep, result: PassResult | Exception) -> None:
        """Send the result of a part of a pass on."""
        if self._closed:
            return
        try:
            if isinstance(result, Exception):
                raise result
            self._forward(running, result)
            if result.is_last:
                running.steps.popleft()
            if result.is_last and not result.followed:
                running.leave = None  # else they would keep each other alive
        except Exception as error:
            self._fail(running, error)

    def _send_on(self, running: _RunningStep, result: PassResult) -> bool:
        """Send hidden states to the next node in the executor's thread; False if that is for the event loop to do.

        To wake the event loop for that would take longer than to send them.
        """
        if self._closed or not isinstance(result.value, Activation):
            return False
        try:
            # The last step: the event loop may still have the tokens of those before it.
            running.onward = _onward(running.steps[-1], result, result.value)
            if not self._receiver(running.onward).send_at_once(running.onward):
                return False
        except ResplitError:  # the event loop meets it, too, and answers it
            return False
        running.onward = None
        if result.is_last:
            running.steps.pop()
            running.leave = None
        return True

    def _fail(self, running: _RunningStep, error: Exception) -> None:
        """Answer the first step that is not done with the error, and give up the others."""
        if running.leave:
            running.leave()
            running.leave = None
        step = running.steps[0]
        if not isinstance(error, ResplitError):
            # Even after a defect the gateway must get an answer, or its request waits until the deadline.
            _log.error("a pass failed because of a defect", node=self._name, session=step.session, exc_info=error)
        # The epoch may have ended and its blocks been dropped during the pass.
        ended = isinstance(error, DataError) and self._hosting.routes.get(step.epoch) is not running.route
        self._answer(step, error=self._stale(step) if ended else error)

    def _follow(self, steps: deque[Step], end: int, token_ids: tuple[int, ...]) -> SegmentPass | None:
        """The pass that follows the last of `steps`, which ended at position `end` with these tokens.

        The executor's thread calls this. None unless the gateway asked for it and it may run here: while this is
        decided, the event loop may learn that it may not. Then it is the pass under way, as if it had begun before.
        """
        done, route = steps[-1], self._hosting.routes.get(steps[-1].epoch)
        if route is None or route.segments[0].node != self._name or self._hosting.committed > done.epoch:
            return None
        permit = self._hosting.permits.covering(done.session, done.attempt, done.epoch, end + 1)
        following = self._follow_ups.after(done, end, token_ids) if permit else None
        if permit is None or following is None:
            return None
        steps.append(following)
        return _segment_pass(following, route, permit.capacity)

    def _forward(self, running: _RunningStep, result: PassResult) -> None:
        """Send hidden states to the next node as soon as a part of the pass is done, and tokens to the gateway."""
        step = running.steps[0]
        if isinstance(result.value, Drawn):
            # A part of a prompt that is not the last has log probabilities only, and no times.
            end, shown = result.start + result.tokens, _times(step, result) if result.value.token_ids else ()
            self._answer(step, end, result.value, times=shown, followed=result.followed)
        elif isinstance(result.value, Activation):
            onward, running.onward = running.onward or _onward(step, result, result.value), None
            self._receiver(onward).send(onward)

    def _receiver(self, step: Step) -> Peer:
        """The node of a step's segment."""
        return self._connections.peer(self._route(step).segments[step.segment].node)

    def _route(self, step: Step) -> Route:
        route = self._hosting.routes.get(step.epoch)
        if route is None:
            raise self._stale(step)
        return route

    def _stale(self, step: Step) -> CommandRefusedError:
        return CommandRefusedError("stale", f"{self._name} does not serve epoch {step.epoch}")

    def _answer(
        self,
        step: Step,
        position: int = 0,
        drawn: Drawn = _NOTHING,
        error: Exception | None = None,
        times: Sequence[SegmentTime] = (),
        followed: bool = False,
    ) -> None:
        """Send what was drawn up to `position`, or the error, to the gateway that sent the step."""
        # The shape of a failed step may be malformed; its start is always a position.
        position = step.start if error is not None else position
        token = Token(session=step.session, epoch=step.epoch, position=position, token_ids=drawn.token_ids)
        if drawn.logprobs:
            token.logprobs.extend(logprobs_to_wire(drawn.logprobs))
        token.attempt, token.followed = step.attempt, followed
        token.times.extend(times)
        if error is not None:
            token.error, token.error_kind = str(error), wire_word(error)
            _log.warning("a pass failed", node=self._name, session=step.session, epoch=step.epoch, error=str(error))
        gateway = self.gateways.get(step.gateway)
        if gateway is None:
            _log.warning(
                "answer dropped: gateway not connected", node=self._name, gateway=step.gateway, session=step.session
            )
            return
        with contextlib.suppress(CapacityError):
            gateway.put(token, _TOKEN_BYTES if not drawn.logprobs else token.ByteSize())


def _onward(step: Step, result: PassResult, values: Activation) -> Step:
    """The step of the next segment. The result of a whole pass turns `step` itself into it, which spares a copy."""
    if not result.is_last or result.start != step.start:
        step = _part_of(step, result)
    step.segment += 1
    step.values.dtype, step.values.data = values.dtype, values.data
    step.values.shape[:] = values.shape
    if result.time:
        step.times.append(_segment_time(result.time))
    return step


def _part_of(step: Step, result: PassResult) -> Step:
    """A copy of a step for the part of its pass that is done."""
    part = Step()
    part.CopyFrom(step)
    part.start = result.start
    part.more = step.more or not result.is_last
    part.scored[:] = step.scored[result.start - step.start : result.start - step.start + result.tokens]
    return part


def _times(step: Step, result: PassResult) -> list[SegmentTime]:
    return [*step.times, _segment_time(result.time)] if result.time else list(step.times)


def _segment_time(time: BatchTime) -> SegmentTime:
    return SegmentTime(
        waited_s=time.waited_s,
        computed_s=time.computed_s,
        background_utilization=time.background_utilization,
        decodes=time.load.decodes,
        prefill_tokens=time.load.prefill_tokens,
        first_half_s=time.first_half_s,
        prompt_half=time.prompt_half,
    )


def _segment_pass(step: Step, route: Route, capacity: int) -> SegmentPass:
    segment = route.segments[step.segment]
    is_last = step.segment == len(route.segments) - 1
    return SegmentPass(
        session=step.session,
        first=segment.first,
        last=segment.last,
        start=step.start,
        capacity=capacity,
        values=from_wire(step.values),
        sampling=sampling_from_wire(step.sampling) if is_last else None,
        attempt=step.attempt,
        more=step.more,
        stepwise=step.stepwise,
        drafts=step.drafts,
        stages=len(route.segments),
        changes=changes_from_wire(step.changes) if is_last else (),
        most_likely=step.logprobs - 1 if is_last and step.logprobs else None,
        scored=tuple(step.scored) if is_last else (),
        epoch=step.epoch,
    )
