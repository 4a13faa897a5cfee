"""A machine serves batches of passes. Sessions that wait for the same segment share a pass, as on a node of a cluster.

A pass of n sessions takes F + m n seconds, which are sums over the blocks of its segment; background load stretches it.
Which passes run together is decided by the code of the node (`node/batching.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from resplit.model.activation import Activation
from resplit.node.batching import Batch, ChunkPace, Part, SegmentPass, Waiting, in_order, next_batch, still_waiting
from resplit.node.emulation import ONE_STEP, Hardware, Load
from resplit.simulate.agenda import Agenda

__all__ = ["Machine", "Ran", "Visit", "segment_pass"]


@dataclass(eq=False)
class Visit(Waiting):
    """A pass of a session at one segment of its route, of an epoch.

    `done_by` is called with each part of it that was computed. `give_back` is called if it is recalled; None if it is
    not whole: a part of the pass came before it, or follows.
    """

    done_by: Callable[[Visit, Ran], None] = field(kw_only=True)
    epoch: int = field(default=0, kw_only=True)
    give_back: Callable[[], None] | None = field(default=None, kw_only=True)


@dataclass(slots=True)  # not frozen: there is one for each pass at each segment, and that would take longer
class Ran:
    """What a visit is told about a batch: how many of its own `tokens` it had, and its times and load as a whole."""

    tokens: int
    is_last: bool
    waited_s: float
    computed_s: float
    background_utilization: float
    decodes: int
    prefill_tokens: int


@lru_cache(maxsize=4096)
def _values(tokens: int) -> Activation:
    """A tensor for this many tokens, without content: only its shape matters here."""
    return Activation("int64", (1, tokens), b"")


def segment_pass(
    session: str, first: int, last: int, start: int, tokens: int, stages: int, more: bool = False
) -> SegmentPass:
    """A pass of `tokens` positions from `start` on through blocks `first..last`, one of `stages` segments."""
    return SegmentPass(session, first, last, start, 0, _values(tokens), None, more=more, stages=stages)


class Machine:
    """One node. `service` may change the node time of a batch: noise, or a random service time. `batch_s` is what the
    software adds to each batch.

    `busy_s` is the node time computed so far, without what background load added. `on_batch` gets each batch, its
    load, and by which factor it took longer than declared.
    """

    def __init__(
        self,
        name: str,
        hardware: Hardware,
        kinds: Sequence[str],
        agenda: Agenda,
        service: Callable[[float], float] | None = None,
        batch_s: float = 0.0,
    ) -> None:
        self.name = name
        self.hardware = hardware
        self.alive = True
        self.busy_s = 0.0
        self.on_batch: Callable[[Machine, Batch, Load, float], None] | None = None
        self._kinds = kinds
        self._agenda = agenda
        self._service = service
        self._batch_s = batch_s
        self._waiting: list[Visit] = []
        self._running: Batch | None = None
        self._pace = ChunkPace()
        self._times: dict[tuple[int, int], tuple[float, float, float]] = {}
        # Sessions that share no part of a pass gain nothing together, and would wait for one another.
        self._shares = any(hardware.fixed_s.values())

    def arrive(self, visit: Visit, late_s: float = 0.0) -> None:
        """A pass arrives. It begins at once if the machine is idle. A machine that is down loses it.

        At `late_s` its request misses its objective.
        """
        if not self.alive:
            return
        visit.arrives(self._agenda.now_s, late_s)
        self._waiting.append(visit)
        if self._running is None:
            self._begin()

    def change(self, slowdown: float | None = None, background_utilization: float | None = None) -> None:
        """Change the speed or the background load of the passes that begin from now on."""
        self.hardware = self.hardware.changed(slowdown, background_utilization)

    def fail(self) -> None:
        """Go down: the passes that wait or run are lost."""
        self.alive, self._waiting, self._running = False, [], None

    def recall(self, epoch: int) -> None:
        """Give back the whole passes of earlier epochs that wait and have not begun."""
        kept: list[Visit] = []
        recalled: list[Callable[[], None]] = []
        for visit in self._waiting:
            if visit.give_back and not visit.has_begun and visit.epoch < epoch:
                recalled.append(visit.give_back)
            else:
                kept.append(visit)
        self._waiting = kept
        for give_back in recalled:
            give_back()

    def ended(self, session: str) -> None:
        """Forget the pace of a session."""
        self._pace.ended(session)

    def _begin(self) -> None:
        """Compute the next batch of the waiting passes."""
        batch = self._next_batch()
        load = Load(batch.decodes, batch.prefill_tokens)
        declared_s = self._node_s(batch.first, batch.last, load)
        node_s = declared_s if self._service is None else self._service(declared_s)
        background = self.hardware.background_utilization
        self._running = batch
        self._agenda.after(
            self._batch_s + node_s / (1 - background), self._end, batch, load, declared_s, node_s, background
        )

    def _next_batch(self) -> Batch:
        """Take the next batch of the waiting passes."""
        now_s, first = self._agenda.now_s, self._waiting[0]
        if len(self._waiting) == 1 and first.work.decoding:  # very often: there is nothing to choose
            self._waiting = []
            return Batch(first.work.first, first.work.last, [Part(first, first.left)])
        waiting = in_order(self._waiting)
        most_decodes = self._pace.fair_share(waiting[0].work.stages, now_s) if self._shares else 1
        batch = next_batch(waiting, self._pace.chunk_tokens(now_s, waiting), most_decodes)
        self._waiting = still_waiting(waiting, batch, now_s)
        return batch

    def _end(self, batch: Batch, load: Load, declared_s: float, node_s: float, background: float) -> None:
        if self._running is not batch:  # the machine went down meanwhile
            return
        now_s = self._agenda.now_s
        computed_s = node_s / (1 - background)
        self.busy_s += node_s
        self._pace.ran(batch, node_s, now_s)
        if self.on_batch is not None:
            self.on_batch(self, batch, load, node_s / declared_s if declared_s else 1.0)
        ends = [(part, part.is_last) for part in batch.parts]
        for part, is_last in ends:
            visit = part.waiting
            assert isinstance(visit, Visit)
            waited_s = now_s - computed_s - visit.since_s
            visit.done += part.tokens
            visit.since_s = now_s
            visit.done_by(
                visit,
                Ran(part.tokens, is_last, waited_s, computed_s, background, load.decodes, load.prefill_tokens),
            )
        self._running = None
        if self._waiting:
            self._begin()

    def _node_s(self, first: int, last: int, load: Load) -> float:
        """F + m n for a segment: the declared times of its blocks, added up once."""
        times = self._times.get((first, last))
        if times is None:
            times = self._times[first, last] = self._segment_times(first, last)
        fixed_s, session_s, token_s = times
        sessions = load.decodes + (1 if load.prefill_tokens else 0)
        return self.hardware.slowdown * (fixed_s + sessions * session_s + load.prefill_tokens * token_s)

    def _segment_times(self, first: int, last: int) -> tuple[float, float, float]:
        plain, kinds = self.hardware.changed(1.0, None), self._kinds[first : last + 1]
        fixed_s = sum(plain.node_s(kind, Load(0, 0)) for kind in kinds)
        session_s = sum(plain.node_s(kind, ONE_STEP) for kind in kinds) - fixed_s
        token_s = sum(plain.node_s(kind, Load(0, 1)) for kind in kinds) - fixed_s - session_s
        return fixed_s, session_s, token_s
