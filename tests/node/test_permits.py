"""Permits of sessions: messages of sessions and attempts without one are refused."""

from __future__ import annotations

import asyncio

import pytest

from resplit.errors import CommandRefusedError
from resplit.node import permits as permits_module
from resplit.node.permits import Permits
from resplit.wire.permits import Permit


def assert_stale(permits: Permits, session: str, attempt: int, reason: str) -> None:
    with pytest.raises(CommandRefusedError, match=reason) as refusal:
        permits.of(session, attempt)
    assert refusal.value.reason == "stale"


def test_only_the_attempt_that_the_controller_began_is_accepted() -> None:
    permits = Permits()
    assert_stale(permits, "s", 0, "session s has not begun here")
    assert permits.give("s", Permit(0, 8))
    assert permits.of("s", 0) == Permit(0, 8)
    assert_stale(permits, "s", 7, "is in attempt 0, not 7")
    assert permits.give("s", Permit(3, 8))
    for other in (0, 2, 4):
        assert_stale(permits, "s", other, f"is in attempt 3, not {other}")
        with pytest.raises(CommandRefusedError):
            permits.ensure_current("s", other)
    permits.ensure_current("s", 3)


def test_the_newest_permit_replaces_the_one_before_and_an_older_attempt_does_not_return() -> None:
    permits = Permits()
    permits.give("s", Permit(1, 8, frozenset({1})))
    assert not permits.give("s", Permit(1, 8, frozenset({2})))
    assert permits.of("s", 1).epochs == {2}
    with pytest.raises(CommandRefusedError, match="is in attempt 1, not 0"):
        permits.give("s", Permit(0, 8))


def test_an_ended_session_is_refused_in_every_attempt() -> None:
    permits = Permits()
    permits.give("s", Permit(1, 8))
    assert not permits.has_ended("s")
    permits.end("s")
    assert permits.has_ended("s")
    assert permits.sessions() == set()
    for attempt in (0, 1, 2):
        assert_stale(permits, "s", attempt, "session s has ended")
        with pytest.raises(CommandRefusedError, match="session s has ended"):
            permits.give("s", Permit(attempt, 8))


def test_the_sessions_that_ended_first_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permits_module, "_ENDED_REMEMBERED", 2)
    permits = Permits()
    for session in ("a", "b", "c"):
        permits.end(session)
    assert [session for session in "abc" if permits.has_ended(session)] == ["b", "c"]


async def test_a_step_waits_for_the_permit_of_its_own_session() -> None:
    permits = Permits()
    waiting = asyncio.create_task(permits.arrival("s", "alpha", 1))
    await asyncio.sleep(0)
    permits.give("other", Permit(0, 8))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not waiting.done()
    permits.give("s", Permit(0, 8))
    await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize(("most", "sizes"), [(1, (1, 1)), (64, (60, 41))])
async def test_few_steps_of_a_member_and_few_bytes_wait_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch, most: int, sizes: tuple[int, int]
) -> None:
    monkeypatch.setattr(permits_module, "_MOST_WAITING", most)
    monkeypatch.setattr(permits_module, "_MOST_WAITING_BYTES", 100)
    monkeypatch.setattr(permits_module, "_ARRIVES_WITHIN_S", 0.5)
    permits = Permits()
    waiting = asyncio.create_task(permits.arrival("first", "alpha", sizes[0]))
    of_another = asyncio.create_task(permits.arrival("first", "beta", 100))
    await asyncio.sleep(0)
    await asyncio.wait_for(permits.arrival("second", "alpha", sizes[1]), 0.4)
    assert not waiting.done()
    assert not of_another.done()
    await asyncio.wait_for(asyncio.gather(waiting, of_another), 5)
    again = asyncio.create_task(permits.arrival("third", "alpha", 100))
    await asyncio.sleep(0)
    assert not again.done()
    await again
