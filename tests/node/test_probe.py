"""Telemetry: some block timings of every kind, but not too many; every link in turn; what is news."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from resplit.model.source import StoredModel
from resplit.node.probe import MOST_ECHOES, PERIOD_S, Probe, differs, is_news, probed, some_of_each
from resplit.telemetry.rows import BlockRow
from resplit.wire.emulated_link import Shape
from resplit.wire.peers import Echo
from tests.support.in_process import in_process, until
from tests.support.properties import examples
from tests.support.simulated_clock import SimulatedClock, run_simulated
from tests.support.two_nodes import two_node_config

PASSES = st.lists(
    st.tuples(st.sampled_from(["embed", "layer", "head"]), st.sampled_from(["prefill", "decode"]), st.integers(1, 3)),
    max_size=200,
)


@examples(100, suppress_health_check=[HealthCheck.too_slow])
@given(passes=PASSES)
def test_between_four_and_eight_timings_of_each_kind_of_pass_are_reported(passes: list[tuple[str, str, int]]) -> None:
    rows = [
        BlockRow(float(number), "a", kind, kind, phase, 1, 0, sessions, 0.1, emulated=True)
        for number, (kind, phase, sessions) in enumerate(passes)
    ]
    reported = some_of_each(rows)
    before, after = (Counter((row.kind, row.phase, row.sessions > 1) for row in each) for each in (rows, reported))
    assert set(after) == set(before)
    assert all(min(4, before[key]) <= number <= 8 for key, number in after.items())
    assert [row for row in rows if row in reported] == sorted(reported, key=lambda row: row.time_s)


@given(count=st.integers(0, 30), first=st.integers(0, 100))
def test_every_link_is_probed_by_small_and_by_large_messages_in_turn(count: int, first: int) -> None:
    peers = [f"node-{number}" for number in range(count)]
    rounds = [probed(peers, turn) for turn in range(first, first + max(1, count))]
    assert {peer for small, _ in rounds for peer in small} == set(peers)
    assert {peer for _, large in rounds for peer in large} == set(peers)
    for small, large in rounds:
        assert len(small) == len(set(small)) == min(MOST_ECHOES, count)
        assert len(large) == min(1, count)


@pytest.mark.parametrize(
    ("seconds", "before_s", "news"),
    [
        (0.064, [0.0033, 0.0034, 0.0033], True),
        (0.0033, [0.064, 0.064, 0.0033], True),
        (0.064, [0.064, 0.0033, 0.064], False),
        (0.009, [0.001, 0.001, 0.001], False),  # nine times as long, but no plan would heed it
        (0.13, [0.1], False),
        (0.5, [], False),
    ],
)
def test_a_time_is_news_if_it_is_far_from_the_last_ones(seconds: float, before_s: list[float], news: bool) -> None:
    assert is_news(seconds, before_s) is news


@pytest.mark.parametrize(
    ("before", "now", "news"),
    [
        ((0.01, 0.0), (0.016, 0.0), True),
        ((0.016, 0.0), (0.01, 0.0), True),
        ((0.01, 0.0), (0.014, 0.09), False),
        ((0.01, 0.8), (0.01, 0.1), True),
        ((0.0, 0.0), (0.0, 0.0), False),
        ((math.nan, 0.0), (math.nan, 0.05), False),
    ],
)
def test_a_node_is_news_if_it_became_slower_or_faster_or_is_used_by_others(
    before: tuple[float, float], now: tuple[float, float], news: bool
) -> None:
    assert differs(before, now) is news


TIMES = {"embed": "1 ms", "layer": "2 ms", "head": "3 ms"}
EMULATE = {"decode_per_token": TIMES, "prefill_per_token": dict.fromkeys(TIMES, "0 ms")}
SLOW_LINK = {"links": {"trusted": vars(Shape(0.2, 1e9))}}


@pytest.mark.parametrize(
    ("change", "table", "seen"),
    [
        (SLOW_LINK, "links", lambda row: row["seconds"] > 0.1),
        ({"slowdown": 5.0}, "nodes", lambda row: row["reference_s"] == pytest.approx(0.01)),
    ],
    ids=["link", "node"],
)
async def test_a_node_tells_the_gateway_when_its_link_or_itself_has_changed(
    stored_model: StoredModel,
    tmp_path: Path,
    change: dict[str, Any],
    table: str,
    seen: Callable[[dict[str, Any]], bool],
) -> None:
    async with in_process(two_node_config(emulate=EMULATE), stored_model, tmp_path) as nodes:
        told: list[str] = []
        nodes.router.on_news = told.append
        addresses = {name: str(address) for name, address in nodes.addresses.items()}
        await nodes.command("plain", "connect", nodes.connect_body(addresses))
        await asyncio.sleep(2 * PERIOD_S)
        told.clear()  # a busy machine may have delayed a message
        await nodes.command("plain", "emulate", change)

        async def told_and_seen() -> bool:
            return "plain" in told and any(map(seen, await nodes.rows("plain", table)))

        await until(told_and_seen)


@dataclass
class Neighbour:
    """A peer as the probe sees it: its answers take `trip_s` on the simulated clock, and it was absent for so long."""

    name: str
    trip_s: float
    absent_s: float = 0.0
    asked: list[tuple[float, int]] = field(default_factory=list)  # when, and for how many bytes

    async def echo(self, payload_bytes: int, timeout_s: float) -> Echo:
        self.asked.append((asyncio.get_running_loop().time(), payload_bytes))
        await asyncio.sleep(self.trip_s)
        return Echo(self.trip_s, self.absent_s)


def test_every_link_is_measured_in_every_period_and_a_change_is_news_once() -> None:
    run_simulated(_news_once)


async def _news_once(clock: SimulatedClock) -> None:
    near, far = Neighbour("near", 0.002), Neighbour("far", 0.002)
    connections, news = SimpleNamespace(peers={"near": near, "far": far}), []
    probe = Probe("here", SimpleNamespace(hardware=None), connections)  # type: ignore[arg-type]
    probe.sample = lambda: None  # type: ignore[method-assign]
    probe.on_news = lambda: news.append(clock.now_s)
    running = asyncio.create_task(probe.run())
    await asyncio.sleep(3.5 * PERIOD_S)
    assert not news
    assert (len(near.asked), len(far.asked)) == (5, 4)  # a small one in each period, and a large one in turn
    near.trip_s = 0.1
    await asyncio.sleep(8 * PERIOD_S)
    assert (len(near.asked), len(far.asked)) == (5 + 12, 4 + 12)
    # Until most of the last messages took so long: two small ones, and two large ones in their turns.
    assert news == pytest.approx([2.1, 2.6, 2.7, 3.7])
    news.clear()
    await probe.measure({"near"})  # all that the controller asks for is news: it waits for the results
    assert len(news) == 6
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_the_time_for_which_a_busy_peer_keeps_messages_is_not_that_of_the_link() -> None:
    run_simulated(_busy_peer)


async def _busy_peer(clock: SimulatedClock) -> None:
    busy = Neighbour("busy", 0.002, absent_s=0.002)  # nothing is known yet: it is not left out
    probe = Probe("here", SimpleNamespace(hardware=None), SimpleNamespace(peers={"busy": busy}))  # type: ignore[arg-type]
    await probe.echo_all(1)
    busy.trip_s, busy.absent_s = 0.052, 0.08  # as usual, and 50 ms of its absence
    await probe.echo_all(1)
    busy.trip_s, busy.absent_s = 0.2, 0.05  # much longer than that explains
    await probe.echo_all(1)
    small = [row.seconds for row in probe.rows_after(0)[0].links if row.payload_bytes < 1024]
    assert small == pytest.approx([0.001, 0.001, 0.075], abs=5e-4)
