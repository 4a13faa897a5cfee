"""Measurements of a node and its links, as numbered telemetry rows.

A node that emulates hardware reports the emulated hardware.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import statistics
import sys
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, Sequence

import psutil

from resplit.errors import NodeLostError
from resplit.node.connections import Connections
from resplit.node.emulation import median_error
from resplit.node.hosting import Hosting
from resplit.node.processor import ProcessorUse
from resplit.node.timings import Timing
from resplit.process.processor_wait import processor_wait_s
from resplit.status import ReportedState
from resplit.telemetry.rows import MAX_REPORTED_ROWS, BlockRow, LinkRow, NodeRow, TelemetryRows
from resplit.types import BlockFeatures
from resplit.wire.peers import Peer
from resplit.wire.step_stream import Crossing

PERIOD_S = 0.5
_MAX_GROUP_ROWS = 8  # timings reported in one period for one kind of block and of pass
# The sizes differ enough to separate latency from bandwidth; the larger one does not fill an edge link.
ECHO_BYTES = (64, 32 * 1024)
# Messages to a link that is measured now begin so long after one another: what delays one has then passed for others.
SMALL_AT_S, LARGE_AT_S = (0.0, 0.1, 0.2), (0.05, 0.15, 0.25)
_ECHO_WITHIN_S = 5.0  # a neighbour that hangs must not hold up a command
# A small message goes to so many peers in each period, and a large one to one peer.
MOST_ECHOES = 4
# The time of a message is news if it differs from the last ones by this factor and by so many seconds. A node is news
# if its speed differs from the last one by this factor, or the share that others use of it by so much.
_NEWS_FACTOR, _NEWS_S, _NEWS_SHARE = 1.5, 0.01, 0.1


class Probe:
    """Collects rows for the controller to fetch (`rows_after`); `run` samples and measures periodically.

    `on_news` is called when there are rows that it should fetch at once.
    """

    def __init__(self, name: str, hosting: Hosting, connections: Connections) -> None:
        self.on_news: Callable[[], None] = lambda: None
        self._name = name
        self._hosting = hosting
        self._connections = connections
        self._rows: deque[tuple[int, NodeRow | LinkRow | BlockRow]] = deque(maxlen=20_000)
        self._number = 0
        self._half_trips_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=3))  # by peer
        self._transfers_s: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=3))  # of large messages
        self._echoing: set[str] = set()  # peers whose regular messages are under way
        self._sampled: tuple[float, float] | None = None  # the last reference time and background
        self._reference_s = math.nan
        self._processor = ProcessorUse()
        self._use_seen = self._processor.since_last()
        self._busy_s, self._sampled_s = 0.0, time.monotonic()

    def rows_after(self, number: int) -> tuple[TelemetryRows, int]:
        """The first rows numbered above `number`, by table, and the number of the last of them.

        They are at most as many as one report may have. The next report continues with the rows after them.
        """
        first = max(0, len(self._rows) - max(0, self._number - number))  # the numbers have no gaps
        numbered = [self._rows[index] for index in range(first, min(len(self._rows), first + MAX_REPORTED_ROWS))]
        new = [row for _, row in numbered]
        rows = TelemetryRows(
            nodes=tuple(row for row in new if isinstance(row, NodeRow)),
            links=tuple(row for row in new if isinstance(row, LinkRow)),
            blocks=tuple(row for row in new if isinstance(row, BlockRow)),
        )
        return rows, numbered[-1][0] if numbered else self._number

    def crossed(self, crossing: Crossing) -> None:
        """Add a row for a step sent to a peer: its round trip less half the round trip of a small message."""
        # The shortest of the last ones: an echo may have waited behind a larger message.
        back_s = min(self._half_trips_s[crossing.peer], default=math.inf)
        if crossing.round_trip_s > back_s:
            self._link_row(crossing.peer, crossing.payload_bytes, crossing.round_trip_s - back_s, "passive")

    async def run(self) -> None:
        """Sample the node and measure some links in every period, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for turn in itertools.count():
                await asyncio.sleep(PERIOD_S)
                self.sample()
                peers = self._connections.peers
                small, large = probed(list(peers), turn)
                for name in {*small, *large} - self._echoing:
                    tasks.create_task(self._probe_link(peers[name], name in large), name=f"probe {name}")

    async def _probe_link(self, peer: Peer, also_large: bool) -> None:
        self._echoing.add(peer.name)
        try:
            with contextlib.suppress(NodeLostError):
                await self._echo_small(peer)
                if also_large:
                    await self._echo_large(peer)
        finally:
            self._echoing.discard(peer.name)

    async def echo_all(self, repeats: int = 3) -> None:
        """Measure every link now, `repeats` times; a peer that does not answer adds no rows."""
        for peer in list(self._connections.peers.values()):
            await self._echo_repeatedly(peer, repeats)

    async def measure(self, names: Collection[str]) -> None:
        """Measure the links to these nodes now, all at the same time, and this node if it is among them.

        Each link is measured by small messages and large ones in turn, and each result is news. Unknown nodes are
        passed over.
        """
        peers = [peer for name, peer in self._connections.peers.items() if name in names]
        await asyncio.gather(*(self._echo_now(peer) for peer in peers))
        if self._name in names:
            self.sample()

    async def _echo_now(self, peer: Peer) -> None:
        async def begin(echo: Callable[[Peer], Awaitable[None]], at_s: float) -> None:
            await asyncio.sleep(at_s)
            await echo(peer)
            self.on_news()

        small = [begin(self._echo_small, at_s) for at_s in SMALL_AT_S]
        large = [begin(self._echo_large, at_s) for at_s in LARGE_AT_S]
        with contextlib.suppress(NodeLostError):
            await asyncio.gather(*small, *large)

    async def _echo_repeatedly(self, peer: Peer, times: int) -> None:
        with contextlib.suppress(NodeLostError):
            for _ in range(times):
                await self._echo(peer)

    def note_reference(self, seconds: float) -> None:
        """Set the seconds that this node needs for a decode step of the reference layer."""
        self._reference_s = seconds

    def sample(self) -> None:
        """Add a row for the node and rows for timed blocks, over the period since the last sample."""
        executor = self._hosting.executor
        background, own = self._use()
        held = executor.engine.held_bytes if executor else 0.0
        free = self._hosting.memory_bytes - held
        if not self._hosting.hardware:
            free = min(free, float(psutil.virtual_memory().available))
        row = NodeRow(
            time_s=time.time(),
            node=self._name,
            cpu_utilization=background + own,
            own_utilization=own,
            memory_free_bytes=max(0.0, free),
            memory_held_bytes=held,
            gpu_utilization=_gpu_utilization(),
            reference_s=self._current_reference_s(),
            emulated=self._emulated,
        )
        self._add(row)
        if self._sampled and differs(self._sampled, (row.reference_s, background)):
            self.on_news()
        self._sampled = row.reference_s, background
        if executor:
            timings = [executor.timings.popleft() for _ in range(len(executor.timings))]
            for timed in some_of_each([self._block_row(executor.engine.features, timing) for timing in timings]):
                self._add(timed)

    def _use(self) -> tuple[float, float]:
        """Utilization by background load and by resplit itself since the last sample."""
        executor, hardware = self._hosting.executor, self._hosting.hardware
        now_s, busy_s = time.monotonic(), executor.busy_s if executor else 0.0
        own = (busy_s - self._busy_s) / max(now_s - self._sampled_s, 1e-3)
        self._busy_s, self._sampled_s = busy_s, now_s
        if hardware:
            # A pass that ends in this period may have begun before it, so that the busy time can exceed the period.
            return hardware.background_utilization, min(own, 1 - hardware.background_utilization)
        self._use_seen = use = self._processor.since_last()
        if executor:
            executor.background_utilization = use.background
        return use.background, use.own

    def refresh(self) -> None:
        """Sample now, unless the last sample is new."""
        if time.monotonic() - self._sampled_s > PERIOD_S / 2:
            self.sample()

    def state(self) -> ReportedState:
        """The state that the node reports to the controller. The service adds the refused commands."""
        hosting, executor = self._hosting, self._hosting.executor
        engine = executor.engine if executor else None
        replicas = executor.memory.replicas() if executor else []
        return ReportedState(
            node=self._name,
            pid=os.getpid(),
            trusted=hosting.trusted,
            emulated=hosting.hardware is not None,
            emulation_error=median_error(executor.errors) if executor and hosting.hardware else None,
            memory_bytes=hosting.memory_bytes,
            held_bytes=engine.held_bytes if engine else 0.0,
            blocks=executor.memory.hosted if executor else (),
            sessions=len(engine.sessions()) if engine else 0,
            copies=tuple(sorted({block for _, block, _ in replicas})),
            copy_bytes=sum(size for _, _, size in replicas),
            epochs=tuple(sorted(hosting.routes)),
            prepared=tuple(sorted(hosting.prepared)),
            standby=hosting.standby.state(executor),
            cores=None if hosting.hardware else self._use_seen.cores,
            throttled=0.0 if hosting.hardware else self._use_seen.throttled,
        )

    async def _echo(self, peer: Peer) -> None:
        await self._echo_small(peer)
        await self._echo_large(peer)

    async def _echo_small(self, peer: Peer) -> None:
        before_s = self._half_trips_s[peer.name]
        trip_s = await self._trip_s(peer, ECHO_BYTES[0], 2 * min(before_s, default=math.inf))
        self._note_echo(peer.name, ECHO_BYTES[0], trip_s / 2, before_s)

    async def _echo_large(self, peer: Peer) -> None:
        before_s, half_s = self._transfers_s[peer.name], min(self._half_trips_s[peer.name], default=0.0)
        trip_s = await self._trip_s(peer, ECHO_BYTES[1], half_s + min(before_s, default=math.inf))
        self._note_echo(peer.name, ECHO_BYTES[1], max(half_s, trip_s - half_s), before_s)

    async def _trip_s(self, peer: Peer, payload_bytes: int, usual_s: float) -> float:
        """The round trip of a message, without the time for which either end may have kept it waiting.

        That is the time in which this process waited for a processor, and the absence that the peer tells. The round
        trip is not taken to be less than usual: meanwhile, the message may have been under way. Of a first message
        nothing is left out.
        """
        waited_s = processor_wait_s()
        echo = await peer.echo(payload_bytes, _ECHO_WITHIN_S)
        kept_s = processor_wait_s() - waited_s + echo.absent_s
        return max(echo.round_trip_s - kept_s, min(echo.round_trip_s, usual_s))

    def _note_echo(self, peer: str, payload_bytes: int, seconds: float, before_s: deque[float]) -> None:
        self._link_row(peer, payload_bytes, seconds, "active")
        if is_news(seconds, before_s):
            self.on_news()
        before_s.append(seconds)

    def _link_row(self, peer: str, payload_bytes: int, seconds: float, source: str) -> None:
        self._add(LinkRow(time.time(), self._name, peer, payload_bytes, seconds, source, self._emulated))

    def _block_row(self, features: Sequence[BlockFeatures], timing: Timing) -> BlockRow:
        feature = features[timing.block]
        return BlockRow(
            time_s=timing.time_s,
            node=self._name,
            block=feature.name,
            kind=feature.kind,
            phase=timing.phase,
            tokens=timing.tokens,
            context_tokens=timing.context_tokens,
            sessions=timing.sessions,
            seconds=timing.seconds,
            emulated=self._emulated,
        )

    @property
    def _emulated(self) -> bool:
        return self._hosting.hardware is not None

    def _current_reference_s(self) -> float:
        hardware = self._hosting.hardware
        return hardware.node_s("layer") if hardware else self._reference_s

    def _add(self, row: NodeRow | LinkRow | BlockRow) -> None:
        self._number += 1
        self._rows.append((self._number, row))


def probed(peers: Sequence[str], turn: int) -> tuple[list[str], list[str]]:
    """The peers that get a small message in this turn, and those that get a large one: in time, all of them."""
    count = len(peers)
    small = [peers[(turn * MOST_ECHOES + i) % count] for i in range(min(MOST_ECHOES, count))]
    return small, [peers[turn % count]] if count else []


def is_news(seconds: float, before_s: Collection[float]) -> bool:
    """Whether a message took so much more or less time than usual, by the times of the last ones, that it is news."""
    if not before_s:
        return False
    usual_s = statistics.median(before_s)
    return max(seconds, usual_s) > _NEWS_FACTOR * min(seconds, usual_s) and abs(seconds - usual_s) > _NEWS_S


def differs(before: tuple[float, float], now: tuple[float, float]) -> bool:
    """Whether the reference time of a node, or the share that others use of it, is news."""
    (old_s, old_share), (new_s, new_share) = before, now
    slower, faster = new_s > _NEWS_FACTOR * old_s, old_s > _NEWS_FACTOR * new_s
    return slower or faster or abs(new_share - old_share) > _NEWS_SHARE


def some_of_each(rows: Sequence[BlockRow]) -> list[BlockRow]:
    """At most `_MAX_GROUP_ROWS` rows for each kind of block, phase, and of one session or several, in order of time.

    A busy node times hundreds of blocks a second, but telemetry must cover minutes. Passes of several sessions are kept
    apart, because they tell the part of a pass that sessions share.
    """
    groups: dict[tuple[str, str, bool], list[BlockRow]] = {}
    for row in rows:
        groups.setdefault((row.kind, row.phase, row.sessions > 1), []).append(row)
    kept = (row for group in groups.values() for row in group[:: math.ceil(len(group) / _MAX_GROUP_ROWS)])
    return sorted(kept, key=lambda row: row.time_s)


def _gpu_utilization() -> float:
    """NaN without a GPU, or where no engine has loaded torch: nothing of resplit uses a GPU then."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return math.nan
    try:
        return float(torch.cuda.utilization()) / 100
    except (ImportError, RuntimeError):  # utilization needs NVML
        return math.nan
