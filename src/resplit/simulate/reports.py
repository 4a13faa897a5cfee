"""What the machines report about themselves: telemetry, noisy and late, like that of a node's probe."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
import pandas as pd

from resplit.node.batching import Batch
from resplit.node.emulation import Load
from resplit.node.probe import (
    ECHO_BYTES,
    LARGE_AT_S,
    PERIOD_S,
    SMALL_AT_S,
    differs,
    is_news,
    probed,
    some_of_each,
)
from resplit.simulate.agenda import Agenda
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.noise import normals
from resplit.telemetry.rows import BlockRow, NodeRow
from resplit.telemetry.tables import BLOCK_COLUMNS, LINK_COLUMNS, NODE_COLUMNS, Telemetry
from resplit.types import BlockFeatures

__all__ = ["Noise", "Report", "Reports"]

_Row = NodeRow | BlockRow
_ASKED_S = 0.05  # until a node that is asked has answered, or one with news was asked and has


@dataclass(frozen=True)
class Noise:
    """How noisy and late telemetry is: deviations of times (relative) and of shares, and seconds until it is known."""

    pass_s: float = 0.02
    link_s: float = 0.05
    share: float = 0.01
    late_s: float = 0.25


@dataclass(frozen=True)
class Report:
    """The newest report of one node, as far as an estimate uses it. NaN: it says nothing about the node itself."""

    node: str
    reference_s: float
    background_utilization: float
    links: tuple[LinkProbe, ...]


@dataclass(slots=True)  # not frozen: many nodes make hundreds of them a second, and that would take longer
class LinkProbe:
    """A probe of the link to a peer."""

    peer: str
    size_bytes: float
    seconds: float
    at_s: float


class Reports:
    """The telemetry of the last `keep_s` seconds. `on_report` gets each report when it is known."""

    def __init__(
        self,
        machines: Mapping[str, Machine],
        features: Sequence[BlockFeatures],
        memory_bytes: Mapping[str, float],
        network: SimulatedNetwork,
        agenda: Agenda,
        rng: np.random.Generator,
        noise: Noise,
        keep_s: float,
    ) -> None:
        self.on_report: Callable[[Report], None] | None = None
        self.held_bytes: Callable[[str], float] = lambda node: 0.0
        self._machines = machines
        self._features = features
        self._memory_bytes = memory_bytes
        self._network = network
        self._agenda = agenda
        self._normals = normals(rng)
        self._noise = noise
        self._keep_s = keep_s
        self._turn = 0
        self._usual_s: defaultdict[tuple[str, str, float], deque[float]] = defaultdict(lambda: deque(maxlen=3))
        self._sampled: dict[str, tuple[float, float]] = {}  # the last reference time and background, by node
        self._busy_s = dict.fromkeys(machines, 0.0)
        self._timings: dict[str, list[BlockRow]] = {name: [] for name in machines}
        self._nodes, self._blocks = deque[NodeRow](), deque[BlockRow]()
        self._probes = deque[tuple[str, LinkProbe]]()  # with the node that sent them
        self._peers = {name: [other for other in machines if other != name] for name in machines}
        self._firsts: dict[tuple[int, int], dict[str, int]] = {}  # of each segment: the first block of each kind
        for machine in machines.values():
            machine.on_batch = self._batch
        agenda.after(PERIOD_S, self._sample)

    def window(self, since_s: float) -> Telemetry:
        """All rows from `since_s` on that are known now."""
        blocks = self._table(self._blocks, BLOCK_COLUMNS, since_s)
        return Telemetry(self.node_table(since_s), self._link_table(since_s), blocks)

    def node_table(self, since_s: float) -> pd.DataFrame:
        """The reports of nodes in that window: without the other tables, which are many times longer."""
        return self._table(self._nodes, NODE_COLUMNS, since_s)

    def _table(self, rows: Iterable[_Row], columns: Mapping[str, str], since_s: float) -> pd.DataFrame:
        known_s = self._agenda.now_s - self._noise.late_s
        known = [row for row in rows if since_s <= row.time_s <= known_s]
        return pd.DataFrame({name: list(map(attrgetter(name), known)) for name in columns}).astype(columns)

    def _link_table(self, since_s: float) -> pd.DataFrame:
        known_s = self._agenda.now_s - self._noise.late_s
        known = [(node, probe) for node, probe in self._probes if since_s <= probe.at_s <= known_s]
        columns = {
            "time_s": [probe.at_s for _, probe in known],
            "node": [node for node, _ in known],
            "peer": [probe.peer for _, probe in known],
            "payload_bytes": [probe.size_bytes for _, probe in known],
            "seconds": [probe.seconds for _, probe in known],
            "source": ["active"] * len(known),
            "emulated": [True] * len(known),
        }
        return pd.DataFrame(columns).astype(LINK_COLUMNS)

    def measure(self, pairs: Sequence[tuple[str, str]], then: Callable[[], None]) -> None:
        """Probe links now, by small and large messages in turn. `then` is called once all results are known."""
        left = len(pairs)

        def measured() -> None:
            nonlocal left
            left -= 1
            if not left:
                then()

        for one, other in pairs:
            self._measure(one, other, measured)

    def _measure(self, one: str, other: str, then: Callable[[], None]) -> None:
        """Probe a link now. Each result is known at once; `then` is called after the last one."""
        moments = sorted([*((at_s, 0) for at_s in SMALL_AT_S), *((at_s, 1) for at_s in LARGE_AT_S)])

        def send(size: float, is_last: bool) -> None:
            back_s = 0.0
            if self._machines[one].alive and self._machines[other].alive:
                probe = self._probe_link(one, other, size)
                back_s = 2 * probe.seconds
                self._agenda.after(back_s, self._deliver, Report(one, math.nan, math.nan, (probe,)))
            if is_last:
                self._agenda.after(back_s, then)

        for number, (at_s, size) in enumerate(moments, 1):
            self._agenda.after(at_s, send, ECHO_BYTES[size], number == len(moments))

    def _deliver(self, report: Report) -> None:
        if self.on_report is not None:
            self.on_report(report)

    def ask(self, name: str) -> None:
        """Have a node report about itself now, besides its regular reports."""
        machine = self._machines[name]
        if machine.alive:
            report = Report(name, machine.hardware.node_s("layer"), self._background(machine), ())
            self._agenda.after(_ASKED_S, self._deliver, report)

    def _sample(self) -> None:
        """Each machine that is up reports on itself and probes some links, each time others."""
        self._turn += 1
        for name, machine in self._machines.items():
            if machine.alive:
                self._report(name, machine)
        self._forget()
        self._agenda.after(PERIOD_S, self._sample)

    def _report(self, name: str, machine: Machine) -> None:
        now_s, hardware = self._agenda.now_s, machine.hardware
        own = (machine.busy_s - self._busy_s[name]) / PERIOD_S
        self._busy_s[name] = machine.busy_s
        background = self._background(machine)
        own = min(own, 1 - background)
        reference_s = hardware.node_s("layer")
        held = self.held_bytes(name)
        self._nodes.append(
            NodeRow(
                time_s=now_s,
                node=name,
                cpu_utilization=background + own,
                own_utilization=own,
                memory_free_bytes=max(0.0, self._memory_bytes[name] - held),
                memory_held_bytes=held,
                gpu_utilization=math.nan,
                reference_s=reference_s,
                emulated=True,
            )
        )
        timings, self._timings[name] = self._timings[name], []
        self._blocks.extend(some_of_each(timings))
        sampled, before = (reference_s, background), self._sampled.get(name)
        self._sampled[name] = sampled
        probes, urgent = self._probe_links(name)
        urgent = urgent or (before is not None and differs(before, sampled))
        report = Report(name, reference_s, background, probes)
        answered_s = max((2 * probe.seconds for probe in probes), default=0.0)
        self._agenda.after(answered_s + _ASKED_S if urgent else self._noise.late_s, self._deliver, report)

    def _probe_links(self, name: str) -> tuple[tuple[LinkProbe, ...], bool]:
        """The probes of one machine in this turn, and whether one of them is news."""
        small, large = probed(self._peers[name], self._turn)
        probes, news = list[LinkProbe](), False
        for size, peers in zip(ECHO_BYTES, (small, large), strict=True):
            for peer in peers:
                if self._machines[peer].alive:
                    probe = self._probe_link(name, peer, size)
                    probes.append(probe)
                    before_s = self._usual_s[name, peer, size]
                    news = news or is_news(probe.seconds, before_s)
                    before_s.append(probe.seconds)
        return tuple(probes), news

    def _background(self, machine: Machine) -> float:
        """What the machine sees that others use of it."""
        truth = machine.hardware.background_utilization
        return min(1.0, max(0.0, truth + self._noise.share * next(self._normals))) if truth else 0.0

    def _probe_link(self, name: str, peer: str, size_bytes: float) -> LinkProbe:
        """A probe of one link, now."""
        now_s = self._agenda.now_s
        seconds = self._network.seconds(name, peer, size_bytes, now_s) * self._factor(self._noise.link_s)
        probe = LinkProbe(peer, float(size_bytes), seconds, now_s)
        self._probes.append((name, probe))
        return probe

    def _batch(self, machine: Machine, batch: Batch, load: Load, factor: float) -> None:
        """Keep the timing of one block of each kind. A batch of decode steps and a prompt is of neither phase."""
        sessions = len(batch.parts)
        if 0 < load.decodes < sessions:
            return
        phase = "decode" if load.decodes else "prefill"
        context = sum(part.waiting.work.start for part in batch.parts) // sessions
        for kind, block in self._first_of_each_kind(batch.first, batch.last).items():
            feature = self._features[block]
            seconds = machine.hardware.node_s(kind, load) * factor
            self._timings[machine.name].append(
                BlockRow(
                    time_s=self._agenda.now_s,
                    node=machine.name,
                    block=feature.name,
                    kind=kind,
                    phase=phase,
                    tokens=load.decodes or load.prefill_tokens,
                    context_tokens=context,
                    sessions=sessions,
                    seconds=seconds * self._factor(self._noise.pass_s),
                    emulated=True,
                )
            )

    def _first_of_each_kind(self, first: int, last: int) -> dict[str, int]:
        kinds = self._firsts.get((first, last))
        if kinds is None:
            kinds = {self._features[block].kind: block for block in range(last, first - 1, -1)}
            kinds = self._firsts[first, last] = dict(sorted(kinds.items(), key=lambda item: item[1]))
        return kinds

    def _forget(self) -> None:
        since_s = self._agenda.now_s - self._keep_s
        tables: tuple[deque[NodeRow] | deque[BlockRow], ...] = self._nodes, self._blocks
        for rows in tables:
            while rows and rows[0].time_s < since_s:
                rows.popleft()
        while self._probes and self._probes[0][1].at_s < since_s:
            self._probes.popleft()

    def _factor(self, deviation: float) -> float:
        return math.exp(deviation * next(self._normals)) if deviation else 1.0
