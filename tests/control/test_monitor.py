"""The monitor keeps the reports of nodes, each row once. A report that cannot be read does not stop the polling."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

from structlog.testing import capture_logs

from resplit.control.monitor import Monitor
from resplit.errors import DataError, NodeLostError
from resplit.status import NodeReport, ReportedState
from resplit.telemetry_rows import LinkRow, TelemetryRows


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
    polled: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.answering.set()

    async def report(self, after: int, timeout_s: float) -> tuple[NodeReport, int]:
        self.polled.set()
        await self.answering.wait()
        if self.error:
            raise self.error
        state = ReportedState("alpha", self.pid, sessions=len(self.rows))
        return NodeReport(state, TelemetryRows(links=tuple(self.rows[after:]))), len(self.rows)

    async def echo_s(self, payload_bytes: int, timeout_s: float) -> float:
        return 0.001


async def test_rows_are_kept_once_and_handed_out_by_age() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer})  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.rows.append(link_row(2.0))
    await monitor.poll("alpha")
    assert [row.time_s for row in monitor.rows(0.0).links] == [1.0, 2.0]
    assert [row.time_s for row in monitor.rows(1.5).links] == [2.0]


async def test_polls_of_one_node_that_overlap_keep_each_row_once() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer})  # type: ignore[dict-item]
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
    monitor = Monitor(peers)  # type: ignore[arg-type]
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
    monitor = Monitor({"alpha": peer})  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.pid, peer.rows = 2, [link_row(3.0)]
    await monitor.poll("alpha")
    assert [row.time_s for row in monitor.rows(0.0).links] == [1.0, 2.0, 3.0]


async def test_a_node_that_does_not_answer_keeps_its_last_state() -> None:
    peer = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": peer})  # type: ignore[dict-item]
    await monitor.poll("alpha")
    peer.error = NodeLostError("alpha does not answer")
    await monitor.poll("alpha")
    assert monitor.states["alpha"].sessions == 1


async def test_a_report_that_cannot_be_read_is_logged_and_other_nodes_are_polled_on() -> None:
    bad = ReportingPeer(error=DataError("alpha: the report cannot be read: state.pid: Field required"))
    good = ReportingPeer(rows=[link_row(1.0)])
    monitor = Monitor({"alpha": bad, "beta": good})  # type: ignore[dict-item]
    with capture_logs() as logs:
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
    assert "state.pid" in next(log["error"] for log in logs if log["event"] == "a node's report is ignored")
    assert set(monitor.states) == {"beta"}
