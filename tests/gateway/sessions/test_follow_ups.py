"""Passes that the head's node begins itself: when the gateway asks for them, and what it does with their tokens.

The peers only record what they get. That of the first node begins the passes that it is asked for, and answers for the
head, which is on the same node.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError, DataError, NodeLostError
from resplit.gateway.engine import GeneratedToken
from resplit.gateway.sessions import session as session_module
from resplit.gateway.sessions.answers import Awaited, New, PassAnswers
from resplit.gateway.sessions.follow_ups import FollowUps, most_follow_ups
from resplit.gateway.sessions.manager import Sessions
from resplit.gateway.sessions.pause_gate import PauseGate
from resplit.gateway.sessions.permits import SessionPermits
from resplit.gateway.sessions.router import Router
from resplit.gateway.sessions.session import Session
from resplit.pass_times import PassTime
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import SegmentTime, Step, Token
from resplit.wire.routes import Route
from tests.support.properties import examples
from tests.support.recording_peer import RecordingPeer
from tests.support.three_nodes import A, B, C, generation_request, three_node_config

FEATURES = [BlockFeatures(f"layer.{i}", "layer", 1, 1, 1, 500, 10, 1, i == 0, 0) for i in range(3)]
FIRST = Route(1, (A, B, A), {})
SECOND = Route(2, (A, C, A), {})  # block 1 moves from B to C
ELSEWHERE = Route(2, (B, A, B), {})
PROMPT = (1,) * 10
EXPECTED = [0, *range(10, 80)]  # of a peer that answers each pass with its start
AHEAD = 5


class Gateway:
    """Sessions over recording peers. Epoch 1 is live, and no replicas are made."""

    def __init__(self, first: Route = FIRST, kv_tokens: int = 256) -> None:
        self.config = self.configured(kv_tokens=kv_tokens)
        self.router = Router(self.config, cast(Any, SimpleNamespace(name="gateway")))
        self.sessions = Sessions(self.config, self.router, FEATURES)
        self.peers = {name: RecordingPeer(on_token=self._answer, follows=True) for name in (A, B, C)}
        self.router.peers.update(cast(Any, self.peers))
        self.router.listening.update(self.peers)
        self.router.activate(first)
        self.answering = True
        self.passes: list[PassTime] = []
        self.sessions.on_pass = self.passes.append

    def configured(self, **changed: Any) -> Any:
        limits = {"context_tokens": 128, "copy_every": 0, "drafts": 0, "deadline": "20 s"}
        return three_node_config(**{"limits": limits, "kv_tokens": 256, "trusted": [A, B]} | changed)

    def start(self, new_tokens: int = 40, **more: Any) -> Any:
        return self.sessions.generate(generation_request(new_tokens, PROMPT, **more))

    @property
    def session(self) -> Session:
        (session,) = self.sessions._live.values()
        return session

    def _answer(self, token: Token) -> None:
        if self.answering and (session := self.sessions._live.get(token.session)):
            self.router.on_token(session.route.placement[-1], token)


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway asks for so many follow-ups in advance, however long a pass takes on this machine."""
    monkeypatch.setattr(session_module, "most_follow_ups", lambda pass_s: AHEAD if pass_s else 0)


async def decode(stream: Any, count: int) -> list[int]:
    return [(await anext(stream)).token_id for _ in range(count)]


async def settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


def test_follow_ups_in_advance_take_a_tenth_of_a_second_and_none_is_asked_for_before_a_pass_was_timed() -> None:
    assert [most_follow_ups(pass_s) for pass_s in (0.0, 0.001, 0.004, 0.06, 0.1, 0.11, 5.0)] == [0, 32, 25, 1, 1, 0, 0]


class Alone:
    """The follow-ups of a session without the session: a pass of epoch 1 over position 7 is under way."""

    def __init__(self, until: int = 0) -> None:
        self.answers = PassAnswers(len(PROMPT))
        self.answers.expect(Awaited(FIRST, 0, 7, 8, 1, logprobs=False, scored=False, until=until))
        self.peer = RecordingPeer()
        permits = SessionPermits("s", 100, cast(Any, {A: self.peer}))
        self.follow_ups = FollowUps(permits, self.answers, PauseGate(), lambda answer, _: New(tuple(answer.token_ids)))

    def answer(self, position: int) -> None:
        followed = Token(session="s", epoch=1, position=position, token_ids=[position], followed=True)
        assert self.answers.accept(A, followed)


async def test_those_in_advance_are_so_many_less_those_whose_tokens_were_not_read() -> None:
    alone = Alone(until=20)
    assert [alone.follow_ups.until(8, most, 100) for most in (0, 1, 5)] == [0, 9, 13]
    assert alone.follow_ups.until(8, 5, 12) == 12  # no more room
    alone.answer(8)
    await alone.answers.last()
    alone.follow_ups.begin()
    for position in (9, 10, 11):
        alone.answer(position)
    await settle()
    assert [alone.follow_ups.until(11, most, 100) for most in (3, 4, 5)] == [0, 12, 13]
    assert await alone.follow_ups.next() == New((9,))
    assert alone.follow_ups.until(11, 3, 100) == 12
    alone.follow_ups.stop()


def test_more_are_asked_for_once_half_of_those_in_advance_are_done() -> None:
    assert [Alone(until).follow_ups.end_if_half_done(6) for until in (10, 11, 12, 13)] == [8, 8, None, None]
    assert Alone(11).follow_ups.end_if_half_done(5) is None
    alone = Alone(11)
    alone.answers.forget()
    assert alone.follow_ups.end_if_half_done(6) is None


async def test_the_node_of_the_head_is_asked_only_for_more_and_told_to_stop_only_if_it_may_go_on() -> None:
    alone = Alone(until=11)
    for until in (0, 10, 11):
        alone.follow_ups.extend(until)
    assert alone.peer.followed_until == []
    alone.follow_ups.extend(12)
    assert alone.peer.followed_until == [12]
    assert alone.answers.awaited is not None
    assert alone.answers.awaited.until == 12
    alone.follow_ups.withdraw()
    assert alone.peer.followed_until == [12, 0]
    assert alone.answers.awaited.until == 12  # it may have begun them
    alone.answers.forget()
    alone.follow_ups.withdraw()
    alone.follow_ups.extend(20)
    assert alone.peer.followed_until == [12, 0]
    without = Alone(until=0)
    without.follow_ups.withdraw()
    assert without.peer.followed_until == []


def test_the_node_of_the_head_is_told_of_which_session_attempt_and_epoch() -> None:
    alone, told = Alone(until=11), list[Step]()
    alone.peer.send = told.append  # type: ignore[method-assign]
    alone.follow_ups.extend(12)
    assert told == [Step(session="s", attempt=0, epoch=1, follow_until=12)]


@pytest.mark.parametrize("error", [CapacityError("busy"), NodeLostError("lost")])
async def test_a_node_of_the_head_that_cannot_be_told_changes_nothing(error: Exception) -> None:
    def refuse(step: object) -> None:
        raise error

    alone = Alone(until=11)
    alone.peer.send = refuse  # type: ignore[method-assign, assignment]
    alone.follow_ups.withdraw()
    alone.follow_ups.extend(12)


async def test_one_step_of_the_gateway_is_enough_for_a_whole_answer() -> None:
    gateway = Gateway()
    assert await decode(gateway.start(), 40) == EXPECTED[:40]
    # The prompt, a first step whose time is measured, and the one that is followed.
    assert [step.start for step in gateway.peers[A].steps] == [0, 10, 11]
    assert gateway.peers[A].followed_until[0] == 0
    assert gateway.peers[A].followed_until[1] == 12 + AHEAD
    assert max(gateway.peers[A].followed_until) == len(PROMPT) + 40 - 1
    assert gateway.peers[B].followed_until == []


async def test_the_answer_ends_with_a_stop_token_and_nothing_follows_it() -> None:
    gateway = Gateway()
    found = [token async for token in gateway.start(stop_ids=frozenset({25}))]
    assert [token.token_id for token in found] == EXPECTED[: EXPECTED.index(25) + 1]
    assert [token.finish for token in found[-2:]] == [None, "stop"]
    assert list(gateway.peers[A].steps[-1].stop_ids) == [25]
    assert gateway.sessions.session_names() == []


class Steering:
    def changes(self, made: object, drafts: object) -> tuple[()]:
        return ()


@pytest.mark.parametrize(
    ("route", "more"),
    [(FIRST, {"steering": Steering()}), (Route(1, (A, B, B), {}), {}), (Route(1, (B, A, A), {}), {})],
    ids=["a steered request", "head elsewhere", "embedding elsewhere"],
)
async def test_none_is_asked_for_where_the_gateway_or_another_node_is_needed_between_two_tokens(
    route: Route, more: dict[str, Any]
) -> None:
    gateway = Gateway(route)
    assert await decode(gateway.start(**more), 12) == EXPECTED[:12]
    first = gateway.peers[route.placement[0]]
    assert len(first.steps) == 12
    assert set(first.followed_until) == {0}


async def test_a_caller_that_does_not_read_stops_them() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 3)
    await settle()
    assert len(PROMPT) + 2 < gateway.session.position <= len(PROMPT) + 3 + AHEAD
    assert gateway.session.answers.awaited is None
    async with gateway.sessions.paused():  # it is not held up
        pass
    assert await decode(stream, 37) == EXPECTED[3:40]


async def test_a_pause_lets_those_asked_for_end_and_none_is_asked_for_meanwhile() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 4)
    async with gateway.sessions.paused():
        assert gateway.session.answers.awaited is None
        asked, done = list(gateway.peers[A].followed_until), gateway.session.position
        reading = asyncio.create_task(decode(stream, 30))
        await settle()
        assert gateway.peers[A].followed_until == asked
        assert gateway.session.position == done
        await gateway.sessions.move_all(ELSEWHERE)
        # The caches of all passes move, also of those whose tokens the caller has not read.
        assert max(request.last for request in gateway.peers[A].requests) == done
    gateway.router.activate(ELSEWHERE)
    tokens += await reading
    assert tokens == EXPECTED[:34]
    assert gateway.peers[B].steps[0].start == done


async def test_a_pause_begins_although_the_caller_reads() -> None:
    gateway = Gateway()
    stream = gateway.start(60)
    tokens = await decode(stream, 4)
    reading = asyncio.create_task(decode(stream, 56))
    async with gateway.sessions.paused():
        assert not reading.done()
    assert tokens + await reading == EXPECTED[:60]


async def test_a_session_that_moves_asks_for_none_until_it_has_moved() -> None:
    gateway = Gateway()
    stream = gateway.start(60)
    tokens = await decode(stream, 4)
    gateway.peers[B].transferring.clear()
    gateway.router.activate(SECOND)
    tokens += await decode(stream, 20)
    asked = len(gateway.peers[A].followed_until)
    tokens += await decode(stream, 5)
    assert gateway.peers[A].followed_until[asked:] == [0] * 5
    gateway.peers[B].transferring.set()
    await settle()
    tokens += await decode(stream, 20)
    assert tokens == EXPECTED[: len(tokens)]
    assert gateway.peers[A].steps[-1].epoch == 2
    assert gateway.peers[A].followed_until[-1] > 0
    await stream.aclose()


async def test_after_a_loss_the_passes_whose_tokens_came_are_repeated_and_no_others() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 5)
    await settle()
    done = gateway.session.position
    gateway.router.on_lost(B)
    tokens += await decode(stream, 30)
    assert tokens == EXPECTED[:35]
    replayed = [(step.start, step.values.shape[1]) for step in gateway.peers[A].steps if step.attempt == 1]
    assert replayed[:3] == [(0, 10), (10, done - 10), (done, 1)]
    await stream.aclose()


async def test_passes_that_are_given_back_end_them_and_are_repeated_on_the_live_route() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 4)
    gateway.router.activate(SECOND)
    session = gateway.session
    awaited = session.answers.awaited
    assert awaited is not None
    gateway.answering = False
    # The error of a later pass overtakes the tokens of those before it.
    given_back = Token(session=session.name, epoch=1, position=awaited.end + 1, error="no", error_kind="recalled")
    gateway.router.on_token(B, given_back)
    await settle()
    gateway.answering = True
    tokens += await decode(stream, 20)
    assert tokens == EXPECTED[:24]
    await stream.aclose()
    assert gateway.sessions.records(0)[-1].recalls == 1


async def test_any_other_error_ends_the_request() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 4)
    awaited = gateway.session.answers.awaited
    assert awaited is not None
    wrong = Token(session=gateway.session.name, epoch=1, position=awaited.start, error="no", error_kind="data")
    gateway.router.on_token(A, wrong)
    with pytest.raises(DataError, match="no"):
        await decode(stream, 30)
    assert gateway.sessions.session_names() == []


async def test_when_the_route_breaks_a_rule_the_head_is_told_to_begin_no_more() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 4)
    assert gateway.session.answers.awaited
    gateway.sessions.reconfigure(gateway.configured(trusted=[B]), FEATURES, frozenset())
    assert gateway.peers[A].followed_until[-1] == 0
    reading = asyncio.create_task(decode(stream, 20))
    await settle()
    assert gateway.session.answers.awaited is None
    steps = len(gateway.peers[A].steps)
    gateway.router.activate(ELSEWHERE)
    gateway.sessions.reconfigure(gateway.configured(trusted=[B]), FEATURES, frozenset())
    assert tokens + await reading == EXPECTED[:24]
    assert len(gateway.peers[A].steps) == steps
    assert gateway.peers[B].steps[0].epoch == 2
    await stream.aclose()


async def test_when_a_node_is_excluded_the_head_is_told_and_the_session_begins_again_elsewhere() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 4)
    gateway.sessions.leave(frozenset({B}))
    assert gateway.peers[A].followed_until[-1] == 0
    gateway.router.activate(SECOND)
    tokens += await decode(stream, 20)
    assert tokens == EXPECTED[:24]
    assert {step.epoch for step in gateway.peers[A].steps if step.attempt == 1} == {2}
    await stream.aclose()


async def test_a_head_that_follows_a_pass_unasked_changes_nothing() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    gateway.answering = False
    reading = asyncio.create_task(decode(stream, 2))
    await settle()
    name, position = gateway.session.name, gateway.session.position + 1
    answer = {"session": name, "epoch": 1, "followed": True}
    gateway.router.on_token(A, Token(position=position, token_ids=[7], **answer))
    gateway.router.on_token(A, Token(position=position + 1, token_ids=[8], **answer))
    gateway.answering = True
    assert await reading == [7, 11]
    await stream.aclose()


async def test_the_room_of_a_session_bounds_them() -> None:
    gateway = Gateway(kv_tokens=128)
    stream, other = gateway.start(100), gateway.start(100)
    await decode(stream, 3)
    await decode(other, 3)
    tokens = await decode(stream, 60)
    assert tokens == [start % 100 for start in range(12, 72)]
    for session in gateway.sessions._live.values():
        assert session.position <= session.reservation.held
        if session.answers.awaited:
            assert session.answers.awaited.until <= session.reservation.held
    await stream.aclose()
    await other.aclose()


async def test_the_times_of_a_pass_say_whether_it_followed_and_count_from_the_token_before() -> None:
    gateway = Gateway()
    segment = SegmentTime(waited_s=0.0, computed_s=0.001, decodes=1)
    gateway.peers[A].times = iter([[segment] * 3] * 100)
    await decode(gateway.start(), 20)
    assert [done.followed for done in gateway.passes[:20]] == [False] * 3 + [True] * 17
    assert [done.start for done in gateway.passes[:20]] == [0, *range(10, 29)]
    followed = gateway.passes[3:20]
    assert 0 < sum(done.total_s for done in followed) <= followed[-1].at_s - gateway.passes[0].at_s


EVENTS = ["read", "read some", "turns", "lose", "move", "pause", "recall", "break a rule"]


@given(st.lists(st.sampled_from(EVENTS), max_size=25))
@examples(100)
def test_whatever_happens_each_token_comes_once_and_in_order(events: list[str]) -> None:
    async def play() -> list[GeneratedToken]:
        gateway, epoch = Gateway(), 1
        stream, tokens = gateway.start(60), list[GeneratedToken]()
        tokens.append(await anext(stream))
        for event in events:
            session, epoch = gateway.session, epoch + 1
            live = Route(epoch, [(A, B, A), (A, C, A), (B, C, B), (B, A, A)][epoch % 4], {})
            if event == "read" and len(tokens) < 55:
                tokens.append(await anext(stream))
            elif event == "read some" and len(tokens) < 45:
                tokens += [await anext(stream) for _ in range(8)]
            elif event == "turns":
                await settle()
            elif event == "lose":
                session.lose("lost by the test")
            elif event == "move":
                gateway.router.activate(live)
            elif event == "pause":
                async with gateway.sessions.paused():
                    await gateway.sessions.move_all(live)
                    gateway.router.activate(live)
            elif event == "recall":
                gateway.router.activate(live)
                where = {"epoch": session.route.epoch, "position": session.position, "attempt": session.permits.attempt}
                recalled = Token(session=session.name, error="no", error_kind="recalled", **where)
                gateway.router.on_token(session.route.placement[1], recalled)
            elif event == "break a rule":
                gateway.sessions.leave(frozenset({C}))
                gateway.router.activate(Route(epoch, (B, A, B), {}))
                gateway.sessions.leave(frozenset())
        tokens += [token async for token in stream]
        with contextlib.suppress(NodeLostError):
            async with gateway.sessions.paused():
                pass
        return tokens

    tokens = asyncio.run(play())
    assert [token.token_id for token in tokens] == EXPECTED[:60]
    assert [token.index for token in tokens] == list(range(60))


async def test_the_deadline_of_a_request_ends_follow_ups_that_are_not_answered() -> None:
    gateway = Gateway()
    stream = gateway.start(deadline_s=0.3)
    await decode(stream, 5)
    gateway.answering = False
    with pytest.raises(TimeoutError):
        await decode(stream, 35)
    assert gateway.sessions.session_names() == []
    async with gateway.sessions.paused():  # nothing holds it up any more
        pass


async def test_a_defect_in_taking_an_answer_reaches_the_request_and_not_the_connection() -> None:
    def defective(answer: Token, took_s: float) -> New:
        raise ZeroDivisionError

    alone = Alone(until=20)
    alone.follow_ups = FollowUps(SessionPermits("s", 100, {}), alone.answers, PauseGate(), defective)
    alone.answer(8)
    await alone.answers.last()
    alone.follow_ups.begin()
    alone.answer(9)
    with pytest.raises(ZeroDivisionError):
        await alone.follow_ups.next()
    assert not alone.follow_ups.are_under_way
