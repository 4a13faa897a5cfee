"""The gateway in simulated time: admits requests and runs their passes along the route, one after another.

`SimulatedGateway` follows the life of a session, as `gateway/sessions/session.py` does: admitted, decoding, moving,
recovering, ended. Tokens have no content here. Drafts and stop words are not simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from resplit.config import ClusterConfig
from resplit.gateway.sessions.follow_ups import most_follow_ups
from resplit.gateway.sessions.journal import Journal
from resplit.gateway.sessions.kv_transfer import another_round_pays
from resplit.gateway.sessions.speculation import RouteTimes
from resplit.session_records import RequestArrival, SessionMove, SessionRecord
from resplit.simulate.admission import Place, SimulatedAdmission
from resplit.simulate.agenda import Agenda
from resplit.simulate.kv_transfer import SimulatedKvTransfer
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.overheads import NO_OVERHEADS, Overheads
from resplit.simulate.passes import SimulatedPasses
from resplit.simulate.replication import Replication
from resplit.simulate.sessions import SimulatedPass, SimulatedRoute, SimulatedSession
from resplit.types import BlockFeatures
from resplit.workload import Arrival

__all__ = ["Caches", "SimulatedGateway"]

Caches = Literal["sent", "free", "recomputed"]

_OK, _TOO_LONG, _BUSY, _TIMEOUT = 200, 400, 429, 504


class SimulatedGateway:
    """All sessions of a cluster. `overhead_s` is what the gateway adds to each pass, `overheads` what the
    processes of a cluster add besides.

    Caches that follow a move are `sent`, are there at once (`free`), or are computed again from the tokens
    (`recomputed`).

    `passes` are those under way. `on_settled` is called as sessions leave epochs.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        features: Sequence[BlockFeatures],
        machines: Mapping[str, Machine],
        network: SimulatedNetwork,
        agenda: Agenda,
        overhead_s: float = 0.0,
        caches: Caches = "sent",
        overheads: Overheads = NO_OVERHEADS,
    ) -> None:
        self.on_settled: Callable[[], None] = lambda: None
        self.records: list[SessionRecord] = []
        self.journal = Journal(cluster, lambda: agenda.now_s)
        self.live: SimulatedRoute | None = None
        self._cluster = cluster
        self._features = features
        self._agenda = agenda
        self._overhead_s = overhead_s
        self._caches = caches
        self._overheads = overheads
        self.passes = SimulatedPasses(cluster.source, network, agenda)
        self.passes.on_answered = self._answered
        self.passes.on_recalled = self._recalled
        self._kv_transfer = SimulatedKvTransfer(cluster.source, features, network, agenda)
        self._replication = Replication(cluster, features, machines, network, agenda, overheads.background_traffic)
        self._admission = SimulatedAdmission(cluster.limits, cluster.kv_tokens, agenda)
        self._slo_s = {each.name: each.slo if each.shed_late else None for each in cluster.classes}
        self._sessions: dict[str, SimulatedSession] = {}
        self._times = RouteTimes()
        self._open = 0  # requests that wait or run
        self._paused = False
        self._when_quiet: Callable[[], None] | None = None
        self._broken = False  # the live route cannot serve, and no other is live yet

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return self._open > 0

    @property
    def broken(self) -> bool:
        """Whether the live route cannot serve, because a node of it is lost."""
        return self._broken

    def oldest_epoch(self) -> int:
        """The oldest epoch that a session uses."""
        live = self.live.epoch if self.live else 0
        return min([live, *(each.route.epoch for each in self._sessions.values() if each.route)])

    def cached_bytes(self, node: str) -> float:
        """What the caches of running sessions take on a node."""
        return sum(
            session.position * feature.kv_bytes_per_token
            for session in self._sessions.values()
            if session.route is not None
            for feature, host in zip(self._features, session.route.placement, strict=True)
            if host == node
        )

    # --- a request arrives and is admitted

    def arrive(self, arrival: Arrival, name: str) -> None:
        """A request arrives: it is admitted, waits, or is refused."""
        now_s = self._agenda.now_s
        self.journal.arrived(RequestArrival(arrival.request_class, now_s, arrival.prompt_tokens, arrival.new_tokens))
        session = SimulatedSession(name, arrival, now_s + self._cluster.objective_s(arrival.request_class))
        self._open += 1
        if arrival.prompt_tokens + arrival.new_tokens > min(
            self._cluster.limits.context_tokens, self._cluster.kv_tokens
        ):
            self._end(session, _TOO_LONG)
            return
        slo_s = self._slo_s[arrival.request_class]
        session.place = Place(
            arrival.prompt_tokens,
            arrival.new_tokens,
            None if slo_s is None else now_s + slo_s,
            start=lambda: self._admitted(session),
            refuse=lambda: self._end(session, _BUSY),
        )
        self._agenda.after(self._cluster.limits.deadline, self._deadline, session)
        self._later(self._overheads.request_s, self._admission.request, session.place)

    def _later(self, delay_s: float, act: Callable[..., None], *given: object) -> None:
        """Call `act(*given)` so many seconds from now; right now without a delay."""
        if delay_s:
            self._agenda.after(delay_s, act, *given)
        else:
            act(*given)

    def _admitted(self, session: SimulatedSession) -> None:
        self._sessions[session.name] = session
        if self.live is not None:
            session.enter(self.live)
        self._next(session)

    def _deadline(self, session: SimulatedSession) -> None:
        if not session.ended:
            self._end(session, _TIMEOUT)

    # --- decoding: one pass after another

    def _next(self, session: SimulatedSession) -> None:
        """At a token boundary: follow the live epoch, then begin the next pass. While passes are paused, wait."""
        if self._paused or self._broken or self.live is None:
            session.resume = lambda: self._next(session)
            self._quiet()
            return
        if session.route is None:
            session.enter(self.live)
        if self._follows(session):
            self._begin(session)

    def _begin(self, session: SimulatedSession) -> None:
        """Begin the pass of the last token; without any cache, that of the prompt and of the tokens made so far."""
        self._pass(session, session.position, 1 if session.position else session.arrival.prompt_tokens + session.made)

    def _pass(self, session: SimulatedSession, start: int, tokens: int) -> None:
        assert session.route is not None
        now_s, session.running = self._agenda.now_s, True
        begun = SimulatedPass(session, session.route, start, tokens, now_s, session.attempt)
        session.asked_until = session.follow_until = self._follow_until(session, begun.end) if session.made else 0
        self.passes.begin(begun, self._overhead_s)

    def _answered(self, done: SimulatedPass) -> None:
        """The token of a pass has arrived."""
        session, now_s = done.session, self._agenda.now_s
        assert session.place is not None
        followed, done.before = done.followed, None  # it need not be kept for those that follow
        took_s = now_s - (session.token_s[-1] if followed else done.begun_s)
        session.running = done.is_followed
        session.waited_s += done.waited_s
        session.computed_s += done.computed_s
        session.hops_s += max(0.0, took_s - done.waited_s - done.computed_s)
        session.position = done.end
        if session.made:
            self._times.of(done.route.epoch).decoded(0, took_s)
        session.made += 1
        session.token_s.append(now_s)
        self._admission.made_token(session.place, took_s)
        self.passes.report(done, took_s, followed)
        self._replication.advance(session)
        if session.made >= session.arrival.new_tokens:
            self._end(session, _OK)
        elif done.is_followed:
            self._ask_for_more(session)
        else:
            self._later(self._overheads.token_s, self._go_on, session, session.attempt)

    # --- follow-ups: how far the node of the head may go on by itself

    def _follow_until(self, session: SimulatedSession, end: int) -> int:
        """Before which position the node of the head may begin the passes after one that ends at `end`; 0: none."""
        route = session.route
        if route is None or route is not self.live or not route.follows_up:
            return 0
        if self._paused or self._broken or session.precopy is not None:
            return 0
        ahead = self._most_ahead(route)
        return min(end + ahead, session.last_end) if ahead else 0

    def _most_ahead(self, route: SimulatedRoute) -> int:
        return most_follow_ups(self._times.of(route.epoch).pass_s)

    def _ask_for_more(self, session: SimulatedSession) -> None:
        """A pass follows: let it be followed by more, once half of those in advance are done."""
        route, end = session.route, session.position + 1
        assert route is not None
        if session.asked_until - end > self._most_ahead(route) // 2:
            return
        until = self._follow_until(session, end)
        if until > session.asked_until:
            session.asked_until = until
            self.passes.ask_for_more(session, until)

    def _end(self, session: SimulatedSession, status: int) -> None:
        """A request ends: its nodes free its caches."""
        session.ended = True
        session.stop_copying()
        self._open -= 1
        if session.place is not None and status in (_OK, _TIMEOUT):
            self._admission.leave(session.place)
        if self._sessions.pop(session.name, None) is not None and session.route is not None:
            for machine in session.route.machines:
                machine.ended(session.name)
            if self.live is not None and session.route.epoch != self.live.epoch:
                self.on_settled()
        record = session.record(status)
        self.journal.ended(record)
        self.records.append(record)

    # --- moving: the caches follow the blocks, and the session switches at a token boundary

    def activate(self, route: SimulatedRoute) -> None:
        """Make an epoch the live one. Running sessions move to it at a token boundary."""
        self.live = self.passes.live = route
        self._broken = False
        self._resume()

    def _follows(self, session: SimulatedSession) -> bool:
        """Between passes: begin, continue or finish the move to the live epoch. False if the session waits for it."""
        live, now_s = self.live, self._agenda.now_s
        assert live is not None
        if session.precopy is None:
            if session.route is live:
                session.recalled = False
                return True
            if session.position == 0 or self._caches != "sent":  # nothing has to be sent
                session.enter(live)
                self._recompute(session)
                self.on_settled()
                return True
            session.precopy = self._kv_transfer.begin(session, live)
        copy = session.precopy
        if now_s < copy.done_s:
            if session.recalled:
                self._agenda.at(copy.done_s, self._go_on, session, session.attempt)
            return not session.recalled  # passes go on along the old route
        missing = session.position - copy.last
        if not session.recalled and another_round_pays(missing, copy.last - copy.first):
            session.precopy = self._kv_transfer.again(session, copy)
            return True
        patch_bytes, until_s = self._kv_transfer.send(session, copy.target, missing)
        session.moves.append(SessionMove(copy.target.epoch, until_s - now_s, int(copy.cache_bytes + patch_bytes)))
        session.enter(copy.target)
        self.on_settled()
        self._agenda.at(until_s, self._go_on, session, session.attempt)
        return False

    def _recompute(self, session: SimulatedSession) -> None:
        """Where caches do not follow a move, the next pass computes all positions again, on the new route."""
        if self._caches == "recomputed" and session.position and session.route is not None:
            session.moves.append(SessionMove(session.route.epoch, 0.0, 0, replayed=True))
            session.position = session.replica = 0

    def _go_on(self, session: SimulatedSession, attempt: int) -> None:
        if not session.ended and attempt == session.attempt:
            self._next(session)

    def pause(self, then: Callable[[], None]) -> None:
        """Let no pass begin from now on, and call `then` once none is under way. Those that wait are given back."""
        self._paused, self._when_quiet = True, then
        if self.live is not None:
            self.recall(self.live.placement, self.live.epoch + 1)
        self._quiet()

    def _quiet(self) -> None:
        then = self._when_quiet
        if then is not None and not any(session.running for session in self._sessions.values()):
            self._when_quiet = None
            then()

    def recall(self, nodes: Collection[str], epoch: int) -> None:
        """Have these nodes give back the passes of epochs before `epoch` that have not begun."""
        routes = {route for session in self._sessions.values() if (route := session.route) is not None}
        machines = {machine.name: machine for route in sorted(routes, key=_number) for machine in route.machines}
        for name, machine in machines.items():
            if name in nodes:
                machine.recall(epoch)

    def _recalled(self, session: SimulatedSession, attempt: int) -> None:
        session.running = session.running and attempt != session.attempt
        self._go_on(session, attempt)

    def move_all(self, target: SimulatedRoute) -> float:
        """While passes are paused: send the caches of all sessions to `target`. Returns when they have arrived."""
        begun_s = until_s = self._agenda.now_s
        for session in self._sessions.values():
            if session.route is None:
                continue
            if self._caches == "recomputed":
                session.enter(target)
                self._recompute(session)
                continue
            sent, done_s = self._kv_transfer.send(session, target, session.position)
            session.enter(target)
            session.moves.append(SessionMove(target.epoch, done_s - begun_s, int(sent)))
            until_s = max(until_s, done_s)
        return until_s

    def unpause(self) -> None:
        """Let passes begin again."""
        self._paused = False
        self._resume()

    def _resume(self) -> None:
        for session in list(self._sessions.values()):
            if (resume := session.resume) is not None and not session.ended:
                session.resume = None
                resume()

    # --- recovering: a node was lost

    def lose(self, node: str) -> None:
        """A node is lost: its sessions go on along a route without it. They keep what stand-by nodes hold."""
        if self.live is not None and node in self.live.placement:
            self._broken = True
        for session in self._sessions.values():
            if session.route is not None and node in session.route.placement:
                self._lose(session)
        self._resume()  # those that had not yet followed to a live route without the node
        self._quiet()

    def _lose(self, session: SimulatedSession) -> None:
        session.attempt += 1
        session.running, session.precopy = False, None
        begun_s = self._agenda.now_s
        session.resume = lambda: self._recover(session, begun_s)

    def _recover(self, session: SimulatedSession, begun_s: float) -> None:
        """Restore the caches that survive, and repeat the other passes: the prompt alone, or the steps since."""
        route = self.live
        if route is None or self._broken or self._paused:
            session.resume = lambda: self._recover(session, begun_s)
            return
        kept = min(session.replica, session.position)
        sent, done_s = 0.0, self._agenda.now_s
        if kept and session.route is not None:
            sent, done_s = self._kv_transfer.send(session, route, kept)
        missing = session.position - kept
        session.enter(route)
        session.moves.append(SessionMove(route.epoch, done_s - begun_s, int(sent), replayed=True))
        self.on_settled()
        if missing:
            # The replay is a pass without an answer of its own: its positions are computed with the next step.
            session.position = kept
            self._agenda.at(done_s, self._replay, session, session.attempt, kept, missing)
        else:
            self._agenda.at(done_s, self._go_on, session, session.attempt)

    def _replay(self, session: SimulatedSession, attempt: int, start: int, missing: int) -> None:
        if session.ended or attempt != session.attempt:
            return
        self._pass(session, start, missing + 1)


def _number(route: SimulatedRoute) -> int:
    return route.epoch
