"""Attempts of sessions: late messages of earlier attempts and of ended sessions are refused."""

from __future__ import annotations

import pytest

from resplit.errors import CommandRefusedError
from resplit.node import attempts
from resplit.node.attempts import Attempts


def assert_stale(seen: Attempts, session: str, attempt: int, reason: str) -> None:
    with pytest.raises(CommandRefusedError, match=reason) as refusal:
        seen.ensure_current(session, attempt)
    assert refusal.value.reason == "stale"


def test_an_attempt_is_accepted_until_a_later_one_begins() -> None:
    seen = Attempts()
    seen.ensure_current("s", 0)
    seen.ensure_current("s", 1)
    seen.ensure_current("s", 1)
    assert_stale(seen, "s", 0, "attempt 0 of session s: 1 has begun")
    seen.ensure_current("s", 3)
    assert_stale(seen, "s", 2, "3 has begun")
    seen.ensure_current("other", 0)


def test_an_ended_session_is_refused_in_every_attempt() -> None:
    seen = Attempts()
    seen.ensure_current("s", 1)
    assert not seen.has_ended("s")
    seen.end("s")
    assert seen.has_ended("s")
    for attempt in (0, 1, 2):
        assert_stale(seen, "s", attempt, "session s has ended")


def test_only_sessions_that_were_tried_again_and_have_not_ended_are_listed() -> None:
    seen = Attempts()
    for session, attempt in (("first", 0), ("again", 1), ("ended", 1)):
        seen.ensure_current(session, attempt)
    seen.end("ended")
    assert seen.sessions() == {"again"}


def test_the_sessions_that_ended_first_are_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_ENDED_REMEMBERED", 2)
    seen = Attempts()
    for session in ("a", "b", "c"):
        seen.end(session)
    assert [session for session in "abc" if seen.has_ended(session)] == ["b", "c"]
