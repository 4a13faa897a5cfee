"""Passes under way in simulated time: from the gateway along the route to the head, and its token back.

What the gateway does with a token, and when it begins a pass, is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from resplit.pass_times import PassTime, SegmentTime
from resplit.simulate.agenda import Agenda
from resplit.simulate.machines import Ran, Visit, segment_pass
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.sessions import SimulatedPass, SimulatedRoute, SimulatedSession

__all__ = ["SimulatedPasses"]


class SimulatedPasses:
    """The passes of all sessions of one cluster, whose gateway is on the node `source`.

    `on_answered` is called with a pass whose token has come, `on_recalled` with the session and the attempt of one that
    a node gave back. `on_pass` gets the times of each pass.
    """

    def __init__(self, source: str, network: SimulatedNetwork, agenda: Agenda) -> None:
        self.on_answered: Callable[[SimulatedPass], None] = lambda done: None
        self.on_recalled: Callable[[SimulatedSession, int], None] = lambda session, attempt: None
        self.on_pass: Callable[[PassTime], None] | None = None
        self.live: SimulatedRoute | None = None  # no pass follows another on any other route
        self._source = source
        self._network = network
        self._agenda = agenda

    def begin(self, begun: SimulatedPass, overhead_s: float) -> None:
        """Send a pass along its route; the gateway adds `overhead_s`."""
        self._send(begun, 0, begun.start, begun.tokens, more=False, begun_s=begun.begun_s + overhead_s)

    def report(self, done: SimulatedPass, took_s: float, followed: bool) -> None:
        """Tell `on_pass` the times of a pass whose token came `took_s` after it began, or after the token before."""
        if self.on_pass is not None:
            segments, now_s = tuple(done.segments), self._agenda.now_s
            self.on_pass(PassTime(done.route.epoch, done.start, done.tokens, now_s, took_s, segments, followed))

    def ask_for_more(self, session: SimulatedSession, until: int) -> None:
        """Tell the node of the head that it may begin the passes of a session before this position."""
        route = session.route
        assert route is not None
        head = route.machines[-1].name
        due_s = self._network.due_s(self._source, head, route.payload_bytes[0], self._agenda.now_s)
        if due_s < math.inf:
            self._agenda.at(due_s, self._asked, session, session.attempt, until)

    def _asked(self, session: SimulatedSession, attempt: int, until: int) -> None:
        if attempt == session.attempt:
            session.follow_until = max(session.follow_until, until)

    def _send(self, under_way: SimulatedPass, stage: int, start: int, tokens: int, more: bool, begun_s: float) -> None:
        """Send `tokens` positions from `start` on to a stage of the route; after the last stage, to the gateway."""
        route = under_way.route
        here = route.machines[stage - 1].name if stage else self._source
        there = route.machines[stage].name if stage < len(route.machines) else self._source
        # The head sends one token, whatever the length of the pass.
        payload = route.payload_bytes[stage] * (tokens if stage < len(route.machines) else 1)
        due_s = self._network.due_s(here, there, payload, begun_s)
        if due_s == math.inf:  # until the deadline, or a loss is noticed
            return
        if stage < len(route.machines):
            self._agenda.at(due_s, self._arrive, under_way, stage, start, tokens, more)
        else:
            self._agenda.at(due_s, self._answered, under_way)

    def _arrive(self, under_way: SimulatedPass, stage: int, start: int, tokens: int, more: bool) -> None:
        if not under_way.counts:
            return
        session, route = under_way.session, under_way.route
        segment = route.segments[stage]
        if tokens == 1 and start > 0:
            work = session.decode_pass(stage)
        else:
            work = segment_pass(session.name, segment.first, segment.last, start, tokens, len(route.segments), more)

        def ran(visit: Visit, batch: Ran) -> None:
            self._ran(under_way, stage, start, visit, batch, more)

        whole = not more and (start, tokens) == (under_way.start, under_way.tokens)
        give_back = (lambda: self._given_back(under_way, stage)) if whole else None
        route.machines[stage].arrive(Visit(work, done_by=ran, epoch=route.epoch, give_back=give_back), session.late_s)

    def _ran(self, under_way: SimulatedPass, stage: int, start: int, visit: Visit, batch: Ran, more: bool) -> None:
        """A part of a pass was computed: send it on. Parts of a prompt follow one another along the route."""
        if not under_way.counts:
            return
        route = under_way.route
        first = start + visit.done - batch.tokens
        last_part = batch.is_last and not more
        if last_part:
            self._note_time(under_way, stage, batch)
        if stage + 1 < len(route.machines):
            self._send(under_way, stage + 1, first, batch.tokens, not last_part, self._agenda.now_s)
        elif last_part:
            self._follow_up(under_way)
            self._send(under_way, stage + 1, first, batch.tokens, more=False, begun_s=self._agenda.now_s)

    def _note_time(self, under_way: SimulatedPass, stage: int, batch: Ran) -> None:
        under_way.waited_s += batch.waited_s
        under_way.computed_s += batch.computed_s
        if self.on_pass is None:
            return
        segment = under_way.route.segments[stage]
        under_way.segments.append(
            SegmentTime(
                segment.node,
                segment.first,
                segment.last,
                batch.waited_s,
                batch.computed_s,
                batch.background_utilization,
                batch.decodes,
                batch.prefill_tokens,
            )
        )

    def _follow_up(self, done: SimulatedPass) -> None:
        """At the node of the head, which has drawn a token: begin the next pass, if the gateway asked for it."""
        session, route = done.session, done.route
        if done.end < session.follow_until and route is self.live:
            done.is_followed = True
            following = SimulatedPass(session, route, done.end, 1, self._agenda.now_s, done.attempt, before=done)
            self._arrive(following, 0, done.end, 1, more=False)

    def _answered(self, done: SimulatedPass) -> None:
        if done.counts:
            self.on_answered(done)

    def _given_back(self, waiting: SimulatedPass, stage: int) -> None:
        """A pass does not begin. The gateway is told, unless it still waits for the token before it."""
        if not waiting.counts:
            return
        session, before = waiting.session, waiting.before
        waiting.recalled = session.recalled = True
        if before is not None and session.position < before.end:
            before.is_followed = False
            return
        here, now_s = waiting.route.machines[stage].name, self._agenda.now_s
        due_s = self._network.due_s(here, self._source, 0.0, now_s)
        if due_s < math.inf:
            self._agenda.at(due_s, self.on_recalled, session, session.attempt)
