"""The monitor keeps the reports of nodes, each row once. A faulty node does not stop the polling."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest

from resplit.control import monitor as monitor_module
from resplit.control.monitor import KEEP_S, PERIOD_S, Monitor
from resplit.errors import NodeLostError, PeerFaultError
from resplit.status import NodeReport, ReportedState, StandbyState
from resplit.telemetry.rows import BlockRow, LinkRow, NodeRow, TelemetryRows
from resplit.wire.peers import Echo
from tests.support.simulated_clock import SimulatedClock, run_simulated


def link_row(time_s: float) -> LinkRow:
    return LinkRow(time_s, "alpha", "beta", 64.0, 0.01, "active", False)


@dataclass
class ReportingPeer:
    """A node with numbered rows, as the monitor sees it. It answers once `answering` is set.

    If `error` is set, it is raised instead of a report.
    """

    pid: int = 1
    rows: list[LinkRow] = field(default_factory=list)
    error: Exception | None = None
    echo_error: Exception | None = None
    blocks: tuple[int, ...] = ()
    standby: tuple[int, ...] = ()
    faults: list[str] = field(default_factory=list)
    calls: list[tuple[int, float]] = field(default_factory=list)  # arguments of each report
    measured: list[Sequence[str]] = field(default_factory=list)  # the links of each measurement
    polled: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answering.set()

    async def measure(self, nodes: Sequence[str], timeout_s: float) -> None:
        self.measured.append(nodes)
        if self.error:
            raise self.error
        self.rows.append(link_row(9.0))

    async def report(self, after: int, timeout_s: float) -> tuple[NodeReport, int]:
        self.polled.set()
        self.calls.append((after, timeout_s))
        await self.answering.wait()
        if self.error:
            raise self.error
        standby = StandbyState(blocks=self.standby)
        state = ReportedState("alpha", self.pid, blocks=self.blocks, sessions=len(self.rows), standby=standby)
        return NodeReport(state, TelemetryRows(links=tuple(self.rows[after:])), 0.0), len(self.rows)

    def fault(self, reason: str) -> PeerFaultError:
        self.faults.append(reason)
        return PeerFaultError(reason)

    async def echo(self, payload_bytes: int, timeout_s: float) -> Echo:
        if self.echo_error:
            raise self.echo_error
        return Echo(0.001)


async def test_rows_are_kept_once_and_handed_out_by_age() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.rows.append(link_row(2.0))
    await monitor.poll("alpha")
    assert [row.time_s for row in monitor.rows(0.0).links] == [1.0, 2.0]
    assert [row.time_s for row in monitor.rows(1.5).links] == [2.0]


async def test_each_report_is_handed_on_with_its_new_rows_and_its_time() -> None:
    peer, reports = ReportingPeer(rows=[link_row(1.0)]), []
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    monitor.on_report = lambda rows, time_s: reports.append((rows.links, time_s))
    await monitor.poll("alpha")
    await monitor.poll("alpha")
    assert reports == [((link_row(1.0),), 0.0), ((), 0.0)]


async def test_the_blocks_that_stand_by_are_known_of_each_node() -> None:
    peers = {"alpha": ReportingPeer(blocks=(0,), standby=(2, 3)), "beta": ReportingPeer(standby=(1,))}
    monitor = Monitor(peers, 8)  # type: ignore[arg-type]
    for name in peers:
        await monitor.poll(name)
    assert monitor.standby() == {"alpha": (2, 3), "beta": (1,)}


async def test_nodes_measure_the_links_that_are_in_doubt_and_report_the_results() -> None:
    peer, silent = ReportingPeer(), ReportingPeer(error=NodeLostError("beta does not answer"))
    monitor = Monitor({"alpha": peer, "beta": silent}, 8)  # type: ignore[dict-item]
    await monitor.measure([("alpha", "beta"), ("alpha", "gamma"), ("beta", "alpha"), ("gone", "alpha")])
    assert (peer.measured, silent.measured) == ([["beta", "gamma"]], [["alpha"]])
    assert [row.time_s for row in monitor.rows(0.0).links] == [9.0]


async def test_links_in_doubt_are_measured_by_the_nodes_that_they_begin_at_all_at_once() -> None:
    peers = {name: ReportingPeer() for name in ("alpha", "beta", "gamma")}
    monitor = Monitor(peers, 8)  # type: ignore[arg-type]
    peers["alpha"].answering.clear()
    measuring = asyncio.create_task(monitor.measure([("alpha", "beta"), ("beta", "gamma"), ("alpha", "gamma")]))
    await asyncio.wait_for(peers["beta"].polled.wait(), 5.0)  # although alpha has not answered
    assert not measuring.done()
    peers["alpha"].answering.set()
    await measuring
    assert {name: peer.measured for name, peer in peers.items()} == {
        "alpha": [["beta", "gamma"]],
        "beta": [["gamma"]],
        "gamma": [],
    }


async def test_polls_of_one_node_that_overlap_keep_each_row_once() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    peer.answering.clear()
    polls = [asyncio.create_task(monitor.poll("alpha")) for _ in range(2)]
    await peer.polled.wait()
    await asyncio.sleep(0)
    peer.answering.set()
    await asyncio.gather(*polls)
    assert [row.time_s for row in monitor.rows(0.0).links] == [1.0]


async def test_a_node_that_leaves_while_a_poll_of_it_waits_is_not_polled_again() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    peers = {"alpha": peer}
    monitor = Monitor(peers, 8)  # type: ignore[arg-type]
    peer.answering.clear()
    polls = [asyncio.create_task(monitor.poll("alpha")) for _ in range(2)]
    await peer.polled.wait()
    del peers["alpha"]
    peer.polled.clear()
    peer.answering.set()
    await asyncio.gather(*polls)
    assert not peer.polled.is_set()


async def test_after_a_restart_of_a_node_all_its_rows_are_kept_although_it_counts_from_zero() -> None:
    peer = ReportingPeer(rows=[link_row(1.0), link_row(2.0)])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.pid, peer.rows = 2, [link_row(3.0)]
    await monitor.poll("alpha")
    assert [row.time_s for row in monitor.rows(0.0).links] == [1.0, 2.0, 3.0]


async def test_a_node_that_does_not_answer_keeps_its_last_state() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.error = NodeLostError("alpha does not answer")
    await monitor.poll("alpha")
    assert monitor.states["alpha"].sessions == 1


async def test_a_faulty_node_is_polled_on_like_the_others() -> None:
    bad = ReportingPeer(error=PeerFaultError("alpha: its report cannot be read: state.pid: Field required"))
    good = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": bad, "beta": good}, 8)  # type: ignore[dict-item]
    running = asyncio.create_task(monitor.run())
    await asyncio.gather(bad.polled.wait(), good.polled.wait())
    bad.polled.clear()
    good.polled.clear()
    async with asyncio.timeout(5.0):  # both are polled again, a period later
        await asyncio.gather(bad.polled.wait(), good.polled.wait())
    assert not running.done()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert set(monitor.states) == {"beta"}


async def test_a_node_that_holds_a_block_which_the_model_does_not_have_is_faulty() -> None:
    for block, faults in [(7, []), (8, ["it holds block 8, and the model has 8 blocks"])]:
        peer = ReportingPeer(blocks=(0, block))
        monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
        await monitor.poll("alpha")
        assert peer.faults == faults
        assert ("alpha" in monitor.states) == (not faults)


async def test_a_node_that_reports_without_end_takes_no_room_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_MAX_ROWS", 3)
    flood = ReportingPeer(rows=[link_row(1e12 + n) for n in range(10)])  # in the far future, so that none is forgotten
    other = ReportingPeer(rows=[link_row(5.0), link_row(6.0)])
    monitor = Monitor({"alpha": flood, "beta": other}, 8)  # type: ignore[dict-item]
    for name in ("alpha", "beta"):
        await monitor.poll(name)
    assert [row.time_s for row in monitor.rows(0.0).links] == [5.0, 6.0, 1e12 + 7, 1e12 + 8, 1e12 + 9]
    monitor._forget(5.5)
    assert [row.time_s for row in monitor.rows(0.0).links] == [6.0, 1e12 + 7, 1e12 + 8, 1e12 + 9]


def simulated(test: Callable[..., Awaitable[None]]) -> Callable[[], None]:
    """Run a test on a simulated clock."""

    async def run(clock: SimulatedClock) -> None:
        await test()

    return lambda: run_simulated(run)


async def test_only_new_rows_are_asked_for_and_an_answer_is_awaited_for_five_seconds() -> None:
    peer = ReportingPeer(rows=[link_row(1.0), link_row(2.0)])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await monitor.poll("alpha")
    await monitor.poll("alpha")
    assert peer.calls == [(0, 5.0), (2, 5.0)]
    peer.pid = 2
    await monitor.poll("alpha")
    assert peer.calls[2:] == [(2, 5.0), (0, 5.0)]  # it restarted: all rows


async def test_rows_of_every_table_are_kept_and_handed_out_from_a_time_on() -> None:
    def rows(time_s: float) -> TelemetryRows:
        return TelemetryRows(
            nodes=(NodeRow(time_s, "alpha", 0.5, 0.25, 1e6, 2e6, 0.0, 0.01, False),),
            links=(link_row(time_s),),
            blocks=(BlockRow(time_s, "alpha", "layer.0", "layer", "decode", 1, 8, 1, 0.01, False),),
        )

    class Peer(ReportingPeer):
        async def report(self, after: int, timeout_s: float) -> tuple[NodeReport, int]:
            return NodeReport(ReportedState("alpha", 1), rows(len(monitor.rows(0.0).links) + 1.0), 0.0), 1

    monitor = Monitor({"alpha": Peer()}, 8)  # type: ignore[dict-item]
    for _ in range(3):
        await monitor.poll("alpha")
    for table in ("nodes", "links", "blocks"):
        assert [row.time_s for row in getattr(monitor.rows(2.0), table)] == [2.0, 3.0]


def test_rows_older_than_the_time_to_keep_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module.time, "time", lambda: 1000.0)
    simulated(_old_rows_are_forgotten)()


async def _old_rows_are_forgotten() -> None:
    old, oldest_kept = link_row(1000.0 - KEEP_S - 0.5), link_row(1000.0 - KEEP_S)
    peer = ReportingPeer(rows=[old, oldest_kept])
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await run_for(monitor, 1.5 * PERIOD_S)
    assert list(monitor.rows(0.0).links) == [oldest_kept]


async def run_for(monitor: Monitor, seconds: float) -> None:
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(seconds)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@simulated
async def test_every_node_is_polled_once_a_period_and_not_after_the_end() -> None:
    peer = ReportingPeer()
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    await run_for(monitor, 3.5 * PERIOD_S)
    assert len(peer.calls) == 4
    await asyncio.sleep(2 * PERIOD_S)
    assert len(peer.calls) == 4


@simulated
async def test_a_node_that_has_news_is_polled_soon_but_not_without_pause() -> None:
    peer = ReportingPeer()
    monitor = Monitor({"alpha": peer}, 8)  # type: ignore[dict-item]
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(PERIOD_S / 2)
    monitor.hurry("alpha")
    await asyncio.sleep(0.001)
    assert len(peer.calls) == 2
    for _ in range(100):  # in 0.1 s
        monitor.hurry("alpha")
        await asyncio.sleep(0.001)
    assert 3 <= len(peer.calls) <= 5
    await asyncio.sleep(PERIOD_S / 2)  # the news that came meanwhile were fetched, and nothing more
    assert len(peer.calls) <= 5
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@simulated
async def test_a_node_that_joins_is_polled_too_and_one_that_is_removed_is_not() -> None:
    first, second = ReportingPeer(), ReportingPeer()
    peers = {"alpha": first}
    monitor = Monitor(peers, 8)  # type: ignore[arg-type]
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(PERIOD_S / 2)
    peers["beta"] = second
    await asyncio.sleep(2 * PERIOD_S)
    assert (len(first.calls), len(second.calls)) == (3, 2)
    del peers["alpha"]
    await asyncio.sleep(2 * PERIOD_S)
    assert (len(first.calls), len(second.calls)) == (3, 4)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@simulated
async def test_a_report_counts_as_a_sign_of_life_and_a_silent_node_is_passed_on() -> None:
    silent, reporting = (ReportingPeer(echo_error=NodeLostError("it hangs")) for _ in range(2))
    silent.error = NodeLostError("it hangs")
    hung: list[str] = []
    monitor = Monitor({"alpha": silent, "beta": reporting, "gamma": ReportingPeer()}, 8, hung.append)  # type: ignore[dict-item]
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(0.9)
    assert hung == ["alpha"]
    monitor.heard("alpha")
    await asyncio.sleep(0.3)
    assert hung == ["alpha"]
    await asyncio.sleep(1.5)
    assert hung == ["alpha", "alpha"]
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
