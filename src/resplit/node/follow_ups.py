"""Follow-up passes: decode passes that the head's node begins itself, each with the token of the pass before.

The gateway asks for them in advance, up to a position, where the route's first segment is on the head's node too. What
it asked is kept here and does not travel along the route, so that no other node can ask for more.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from resplit.model.activation import token_ids as as_values
from resplit.wire.node_pb2 import Step
from resplit.wire.tensors import to_wire


@dataclass
class _Asked:
    """The next follow-up of a session, without its token; it is begun if it starts before position `until`."""

    step: Step
    until: int
    stop_ids: frozenset[int]


class RequestedFollowUps:
    """What the gateway asked for, by session.

    The event loop's thread notes it. `after` is for the executor's thread, and takes a follow-up from it.
    """

    def __init__(self) -> None:
        self._asked: dict[str, _Asked] = {}
        self._changing = threading.Lock()  # held for a moment only

    def ask(self, step: Step) -> None:
        """Note what a step of the gateway asks for; it replaces what was asked before. The step itself forgets it."""
        until, stop_ids = step.follow_until, frozenset(step.stop_ids)
        step.ClearField("follow_until")
        step.ClearField("stop_ids")
        self.forget(step.session)
        end = step.start + (step.values.shape[1] if len(step.values.shape) > 1 else 0)
        # What counts for the tokens of one pass only cannot be repeated.
        if end < until and not (step.drafts or step.stepwise or step.more or step.changes or step.scored):
            following = Step()
            following.CopyFrom(step)
            following.ClearField("values")
            following.start = end
            with self._changing:
                self._asked[step.session] = _Asked(following, until, stop_ids)

    def extend(self, step: Step) -> None:
        """Replace the position up to which the session of `step` is followed, if it still is."""
        with self._changing:
            asked = self._asked.get(step.session)
            if asked and (asked.step.attempt, asked.step.epoch) == (step.attempt, step.epoch):
                asked.until = step.follow_until

    def after(self, done: Step, end: int, token_ids: Sequence[int]) -> Step | None:
        """The follow-up of a pass that ended at position `end` with these tokens; None if there is none."""
        with self._changing:
            asked = self._asked.get(done.session)
            if not asked or (asked.step.attempt, asked.step.epoch, asked.step.start) != (done.attempt, done.epoch, end):
                return None
            if end >= asked.until or len(token_ids) != 1 or token_ids[0] in asked.stop_ids:
                del self._asked[done.session]
                return None
            following = Step()
            following.CopyFrom(asked.step)
            asked.step.start += 1
        following.values.CopyFrom(to_wire(as_values(list(token_ids))))
        return following

    def forget(self, session: str) -> None:
        """Begin no more passes of this session."""
        with self._changing:
            self._asked.pop(session, None)
