"""A node that hangs is reported in under a second. A node that is busy, or that sends other messages, is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from resplit.control.heartbeat import BEAT_S, HANGS_AFTER_S, AnswerTime, Heartbeats
from resplit.errors import NodeLostError
from resplit.wire.peers import Echo
from tests.support.simulated_clock import SimulatedClock, run_simulated


class FakeNode:
    """Answers an echo after `delay_s`. Unless `awake` is set it does not answer; while `down`, calls fail at once."""

    def __init__(self) -> None:
        self.delay_s = 0.001
        self.awake = asyncio.Event()
        self.awake.set()
        self.down = False
        self.calls: list[tuple[int, float]] = []  # payload and timeout of each echo

    async def echo(self, payload_bytes: int, timeout_s: float) -> Echo:
        self.calls.append((payload_bytes, timeout_s))
        if self.down:
            raise NodeLostError("down")
        await asyncio.sleep(self.delay_s)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self.awake.wait()
                return Echo(self.delay_s)
        raise NodeLostError("hangs")


class Watch:
    """Heartbeats of two nodes; `hung` has the name of a node for each time that it was reported."""

    def __init__(self, clock: SimulatedClock) -> None:
        self.clock = clock
        self.nodes = {"one": FakeNode(), "other": FakeNode()}
        self.hung: list[str] = []
        self.beats = Heartbeats(cast("Any", self.nodes), self.hung.append)

    async def until(self, condition: Callable[[], bool]) -> float:
        """Wait until a condition holds; returns the seconds that it took."""
        begun_s = self.clock.now_s
        async with asyncio.timeout(5):
            while not condition():  # noqa: ASYNC110 - the simulated clock jumps from one look to the next
                await asyncio.sleep(0.005)
        return self.clock.now_s - begun_s


def watched(scenario: Callable[[Watch], Awaitable[None]]) -> Callable[[], None]:
    """Make a test of a scenario, which runs on a simulated clock beside heartbeats that run for 0.3 s already."""

    async def run(clock: SimulatedClock) -> None:
        watch = Watch(clock)
        task = asyncio.create_task(watch.beats.run())
        await asyncio.sleep(0.3)
        await scenario(watch)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    return lambda: run_simulated(run)


@watched
async def test_a_hanging_node_is_noticed_once_within_a_second(watch: Watch) -> None:
    watch.nodes["one"].awake.clear()
    assert await watch.until(lambda: watch.hung == ["one"]) < 1.0
    await asyncio.sleep(0.3)
    assert (watch.hung, watch.beats.silent) == (["one"], {"one"})
    watch.nodes["one"].awake.set()
    await watch.until(lambda: not watch.beats.silent)
    watch.nodes["one"].awake.clear()
    await watch.until(lambda: watch.hung == ["one", "one"])


@watched
async def test_a_gateway_with_slightly_late_timers_notices_as_soon(watch: Watch) -> None:
    async def keep_busy() -> None:
        while True:
            watch.clock.now_s += 0.04  # other work in the event loop
            await asyncio.sleep(0)

    busy = asyncio.create_task(keep_busy())
    await asyncio.sleep(0.5)
    watch.nodes["one"].awake.clear()
    assert await watch.until(lambda: watch.hung == ["one"]) < 1.5
    busy.cancel()


@watched
async def test_a_hang_does_not_lengthen_the_wait_for_the_next_one(watch: Watch) -> None:
    watch.nodes["one"].awake.clear()
    await watch.until(lambda: watch.hung == ["one"])
    watch.nodes["one"].awake.set()
    await watch.until(lambda: not watch.beats.silent)
    await asyncio.sleep(0.3)
    watch.nodes["one"].awake.clear()
    assert await watch.until(lambda: watch.hung == ["one", "one"]) < 1.0


@watched
async def test_a_node_that_became_slow_is_reported_twice_at_most(watch: Watch) -> None:
    watch.nodes["one"].delay_s = 0.7
    await asyncio.sleep(6)
    assert len(watch.hung) <= 2


@watched
async def test_an_unreachable_node_counts_as_silent(watch: Watch) -> None:
    watch.nodes["other"].down = True
    assert await watch.until(lambda: watch.beats.silent == {"other"}) < 1.0


@watched
async def test_a_token_counts_as_a_sign_of_life(watch: Watch) -> None:
    watch.nodes["one"].awake.clear()
    for _ in range(12):
        await asyncio.sleep(0.1)
        watch.beats.heard("one")
    assert watch.hung == []


@watched
async def test_a_slow_but_steady_node_is_not_reported(watch: Watch) -> None:
    watch.nodes["one"].delay_s = 0.3
    await asyncio.sleep(2.5)
    assert watch.hung == []


@watched
async def test_a_node_with_irregular_answers_gets_a_longer_limit(watch: Watch) -> None:
    for delay_s in (0.3, 0.01, 0.4, 0.01, 0.6, 0.7):
        watch.nodes["one"].delay_s = delay_s
        await asyncio.sleep(delay_s + 0.25)
    assert watch.hung == []


@watched
async def test_the_limit_is_longer_when_no_node_answers_at_all(watch: Watch) -> None:
    for node in watch.nodes.values():
        node.awake.clear()
    await asyncio.sleep(1.5)
    assert watch.hung == []
    await watch.until(lambda: set(watch.hung) == {"one", "other"})


@watched
async def test_no_node_is_reported_after_the_gateway_itself_stalled(watch: Watch) -> None:
    watch.clock.now_s += 2.0
    await asyncio.sleep(0.5)
    assert watch.hung == []


@watched
async def test_a_node_that_joins_later_is_watched_too(watch: Watch) -> None:
    late = FakeNode()
    late.awake.clear()
    watch.nodes["late"] = late
    await watch.until(lambda: watch.hung == ["late"])


@watched
async def test_a_node_gets_an_empty_heartbeat_every_beat_and_has_five_seconds_to_answer(watch: Watch) -> None:
    calls = watch.nodes["one"].calls
    calls.clear()
    await asyncio.sleep(2.0)
    assert 9 <= len(calls) <= 10  # a beat takes 0.2 s, and an answer 0.001 s
    assert set(calls) == {(0, 5.0)}


@watched
async def test_a_node_that_was_removed_is_not_reported(watch: Watch) -> None:
    watch.nodes.pop("one").awake.clear()
    await asyncio.sleep(3.0)
    assert watch.hung == []


@watched
async def test_a_node_that_joins_again_or_moves_is_watched_anew(watch: Watch) -> None:
    watch.nodes["one"].awake.clear()
    await watch.until(lambda: watch.hung == ["one"])
    watch.nodes["one"] = moved = FakeNode()
    moved.delay_s = 0.3
    await asyncio.sleep(1.0)
    assert (watch.hung, watch.beats.silent) == (["one"], set())
    watch.nodes["one"] = again = FakeNode()
    again.awake.clear()
    assert await watch.until(lambda: watch.hung == ["one", "one"]) > HANGS_AFTER_S


@watched
async def test_a_node_that_joins_again_is_not_judged_by_how_slow_its_predecessor_was(watch: Watch) -> None:
    watch.nodes["one"].delay_s = 0.5
    await asyncio.sleep(5)
    watch.hung.clear()
    watch.nodes["one"] = FakeNode()
    await asyncio.sleep(0.3)
    watch.nodes["one"].awake.clear()
    assert await watch.until(lambda: watch.hung == ["one"]) < 1.0


@watched
async def test_a_node_that_was_removed_gets_no_more_heartbeats(watch: Watch) -> None:
    removed = watch.nodes.pop("one")
    await asyncio.sleep(0.3)
    removed.calls.clear()
    await asyncio.sleep(2.0)
    assert removed.calls == []


class LosesCancellation(FakeNode):
    """Its first call that is cancelled ends like one that failed."""

    lost = False

    async def echo(self, payload_bytes: int, timeout_s: float) -> Echo:
        try:
            return await super().echo(payload_bytes, timeout_s)
        except asyncio.CancelledError:
            if self.lost:
                raise
            self.lost = True
            raise NodeLostError("cancelled") from None


@watched
async def test_a_heartbeat_whose_cancellation_was_lost_ends_too(watch: Watch) -> None:
    node = LosesCancellation()
    node.awake.clear()
    beating = asyncio.create_task(Heartbeats(cast("Any", {"one": node}), watch.hung.append).run())
    await asyncio.sleep(0.3)
    beating.cancel()
    ended, _ = await asyncio.wait({beating}, timeout=20)
    assert node.lost
    assert ended


@watched
async def test_a_silent_node_that_is_removed_no_longer_counts_as_silent(watch: Watch) -> None:
    watch.nodes["one"].awake.clear()
    await watch.until(lambda: watch.hung == ["one"])
    watch.nodes.pop("one")
    assert await watch.until(lambda: watch.beats.silent == set()) < 1.0


def unwatched() -> Watch:
    """Heartbeats that do not run, so that the test decides which time passes."""
    return Watch(cast("Any", None))


def silent_for(watch: Watch, *seconds: float) -> list[str]:
    """Let time pass for node "one", while "other" is heard. Returns the nodes that were reported."""
    for each in seconds:
        watch.beats.heard("other")
        watch.beats._pass_time(each)
    return watch.hung


def test_a_node_is_reported_once_and_only_above_the_limit() -> None:
    watch = unwatched()
    assert silent_for(watch, 0.3, 0.25) == []  # HANGS_AFTER_S exactly
    assert silent_for(watch, 0.01) == ["one"]
    assert silent_for(watch, 0.3, 0.3) == ["one"]
    assert watch.beats.silent == {"one"}


def test_a_node_that_is_heard_starts_its_silence_again() -> None:
    watch = unwatched()
    silent_for(watch, 0.3, 0.2)
    watch.beats.heard("one")
    assert watch.beats.silent == set()
    assert silent_for(watch, 0.3, 0.25) == []
    assert silent_for(watch, 0.01) == ["one"]


def test_the_time_that_answers_take_is_added_to_the_limit() -> None:
    watch = unwatched()
    watch.beats._answers["one"].add(0.1, hung=False)  # 0.25 s more
    assert silent_for(watch, 0.3, 0.3, 0.19) == []
    assert silent_for(watch, 0.02) == ["one"]


def test_time_without_any_sign_of_life_counts_for_two_beats_and_again_after_three_seconds() -> None:
    watch = unwatched()
    for seconds in (0.25, 2 * BEAT_S - 0.25):  # exactly two beats: both count
        watch.beats._pass_time(seconds)
    watch.beats._pass_time(2.0)  # does not count
    assert watch.hung == []
    assert silent_for(watch, 0.125) == []
    assert silent_for(watch, 0.0625) == ["one"]

    watch = unwatched()
    for seconds in (0.25, 0.125, 0.125, 2.375):  # 0.375 s of 2.875 s count
        watch.beats._pass_time(seconds)
    watch.beats._pass_time(0.125)  # exactly three seconds: counts
    assert watch.hung == []
    watch.beats._pass_time(0.125)
    assert sorted(watch.hung) == ["one", "other"]


def test_the_limit_is_the_smoothed_mean_and_four_deviations() -> None:
    answers = AnswerTime()
    assert answers.limit_s == 0.0
    answers.add(0.1, hung=False)
    assert (answers.mean_s, answers.deviation_s) == pytest.approx((0.1, 0.0375))  # 0.05, less a quarter
    answers.add(0.2, hung=False)
    assert (answers.mean_s, answers.deviation_s) == pytest.approx((0.1125, 0.053125))
    assert answers.limit_s == pytest.approx(0.1125 + 4 * 0.053125)


def test_an_answer_counts_at_most_as_the_limit() -> None:
    answers = AnswerTime()
    answers.add(9.0, hung=False)
    assert answers.mean_s == HANGS_AFTER_S


def test_only_the_second_late_answer_after_a_hang_counts_as_slow() -> None:
    answers = AnswerTime()
    answers.add(0.1, hung=False)
    answers.add(0.5, hung=True)
    assert (answers.mean_s, answers.last_s) == (pytest.approx(0.1), 0.5)
    answers.add(0.5, hung=True)
    assert answers.mean_s == pytest.approx(0.15)
    answers.add(0.1, hung=True)
    assert answers.mean_s == pytest.approx(0.14375)
