"""Which passes the head's node begins itself: those that the gateway asked for, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from resplit.model.activation import token_ids
from resplit.node.follow_ups import RequestedFollowUps
from resplit.wire.node_pb2 import LogitChange, Step
from resplit.wire.tensors import from_wire, to_wire


def step(start: int = 7, until: int = 10, values: tuple[int, ...] = (5,), **more: Any) -> Step:
    fields: dict[str, Any] = {"session": "s", "attempt": 2, "epoch": 4, "stop_ids": [1], "gateway": "g"} | more
    return Step(start=start, follow_until=until, values=to_wire(token_ids(values)), **fields)


def asked(first: Step) -> RequestedFollowUps:
    follow_ups = RequestedFollowUps()
    follow_ups.ask(first)
    return follow_ups


def test_passes_follow_one_another_up_to_the_position_that_was_asked_for() -> None:
    done = step()
    follow_ups = asked(done)
    assert not done.follow_until
    assert not done.stop_ids  # no other node learns them
    begun = []
    end = 8
    while following := follow_ups.after(done, end, (40 + end,)):
        begun.append((following.start, from_wire(following.values), following.session, following.attempt))
        assert (following.epoch, following.gateway, following.follow_until, list(following.stop_ids)) == (4, "g", 0, [])
        done, end = following, end + 1
    assert begun == [(8, token_ids((48,)), "s", 2), (9, token_ids((49,)), "s", 2)]
    assert follow_ups.after(done, end, (50,)) is None


@pytest.mark.parametrize(
    ("done", "end", "tokens"),
    [
        (step(), 8, (1,)),
        (step(), 8, ()),
        (step(), 8, (3, 4)),
        (step(), 9, (3,)),
        (step(), 7, (3,)),
        (step(attempt=3), 8, (3,)),
        (step(epoch=5), 8, (3,)),
        (step(session="t"), 8, (3,)),
    ],
    ids=["stop token", "no token", "two tokens", "later", "earlier", "attempt", "epoch", "session"],
)
def test_nothing_follows_a_stop_token_or_a_pass_that_is_not_the_one_under_way(
    done: Step, end: int, tokens: tuple[int, ...]
) -> None:
    assert asked(step()).after(done, end, tokens) is None


@pytest.mark.parametrize(
    "more",
    [
        {"until": 8},
        {"drafts": 1},
        {"stepwise": True},
        {"more": True},
        {"changes": [LogitChange()]},
        {"scored": [3]},
    ],
    ids=str,
)
def test_nothing_follows_a_pass_that_cannot_be_repeated_with_the_next_token(more: dict[str, Any]) -> None:
    assert asked(step(**more)).after(step(), 8, (3,)) is None


def test_a_step_replaces_what_was_asked_before() -> None:
    follow_ups = asked(step())
    follow_ups.ask(step(until=0))
    assert follow_ups.after(step(), 8, (3,)) is None


def test_the_gateway_may_ask_for_more_or_for_no_more_of_the_same_attempt() -> None:
    follow_ups = asked(step(until=9))
    for other in (Step(session="s", attempt=1, epoch=4), Step(session="s", attempt=2, epoch=3), Step(session="t")):
        follow_ups.extend(other)
    follow_ups.extend(Step(session="s", attempt=2, epoch=4, follow_until=10))
    assert follow_ups.after(step(), 8, (3,))
    assert follow_ups.after(step(), 9, (3,))
    follow_ups = asked(step())
    follow_ups.extend(Step(session="s", attempt=2, epoch=4, follow_until=0))
    assert follow_ups.after(step(), 8, (3,)) is None


def test_nothing_follows_once_the_session_has_ended() -> None:
    follow_ups = asked(step())
    follow_ups.forget("s")
    assert follow_ups.after(step(), 8, (3,)) is None
