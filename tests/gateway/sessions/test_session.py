"""One session's moves and recoveries step by step, with peers that only record what the session sends."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from resplit.errors import CapacityError, DataError, NodeLostError
from resplit.gateway.engine import GeneratedToken
from resplit.gateway.sessions import session_caches
from resplit.gateway.sessions.kv_transfer import PreCopy
from resplit.gateway.sessions.manager import Sessions
from resplit.gateway.sessions.router import Router
from resplit.pass_times import PassTime
from resplit.session_records import SessionRecord
from resplit.types import BlockFeatures
from resplit.wire.node_pb2 import SegmentTime, Token, TransferReply
from resplit.wire.routes import Route
from tests.support.recording_peer import RecordingPeer
from tests.support.three_nodes import A, B, C, generation_request, three_node_config

FEATURES = [BlockFeatures(f"layer.{i}", "layer", 1, 1, 1, 500, 10, 1, i == 0, 0) for i in range(3)]
FIRST = Route(1, (A, B, B), {})
SECOND = Route(2, (A, C, B), {})  # block 1 moves from B to C
PROMPT = (1,) * 10


class Gateway:
    """Sessions over recording peers. Epoch 1 is live, and no replicas are made."""

    def __init__(self, **more: object) -> None:
        config = three_node_config(limits={"context_tokens": 64, "copy_every": 0}, **more)
        self.router = Router(config, cast(Any, SimpleNamespace(name="gateway")))
        self.sessions = Sessions(config, self.router, FEATURES)
        self.peers = {name: RecordingPeer(on_token=self._answer) for name in (A, B, C)}
        self.router.peers.update(cast(Any, self.peers))
        self.router.listening.update(self.peers)
        self.router.activate(FIRST)
        self.settled: list[int] = []
        self.sessions.on_settled = self.settled.append

    def start(self, new_tokens: int = 40) -> Any:
        return self.sessions.generate(generation_request(new_tokens, PROMPT))

    def _answer(self, token: Token) -> None:
        """Answer a step as the node of the head."""
        if session := self.sessions._live.get(token.session):
            self.router.on_token(session.route.placement[-1], token)

    def transfers(self) -> list[tuple[int, int, bool]]:
        """First and last position of every transfer from B, and whether it was in the background."""
        return [(request.first, request.last, request.background) for request in self.peers[B].requests]

    def record(self) -> SessionRecord:
        return self.sessions.records(0)[-1]


async def decode(stream: Any, count: int) -> list[GeneratedToken]:
    return [await anext(stream) for _ in range(count)]


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_passes_continue_on_the_old_route_until_the_caches_are_transferred() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    gateway.router.activate(SECOND)
    gateway.peers[B].transferring.clear()
    await decode(stream, 2)
    assert [step.epoch for step in gateway.peers[A].steps] == [1, 1, 1]
    assert gateway.sessions.oldest_epoch() == 1
    gateway.peers[B].transferring.set()
    await settle()
    await decode(stream, 1)
    # Ten positions in the background while two passes ran, then these two during the pause.
    assert gateway.transfers() == [(0, 10, True), (10, 12, False)]
    assert [list(request.target) for request in gateway.peers[B].requests] == [["", C, ""]] * 2
    assert gateway.peers[A].steps[-1].epoch == 2
    assert gateway.settled == [2]
    await stream.aclose()
    assert gateway.record().epochs == (1, 2)
    assert [(move.epoch, move.cache_bytes, move.replayed) for move in gateway.record().moves] == [(2, 200, False)]


async def test_rounds_are_sent_in_the_background_while_they_become_shorter() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    gateway.router.activate(SECOND)
    for passes in (3, 3):  # the second round is as long as the first was: no third one
        gateway.peers[B].transferring.clear()
        await decode(stream, passes)
        gateway.peers[B].transferring.set()
        await settle()
    await decode(stream, 1)
    assert gateway.transfers() == [(0, 10, True), (10, 13, True), (13, 16, False)]
    assert gateway.peers[A].steps[-1].epoch == 2
    await stream.aclose()


async def test_a_session_begins_on_the_route_that_is_live_at_its_first_pass() -> None:
    gateway = Gateway()
    stream = gateway.start()
    async with gateway.sessions.paused():
        first = asyncio.create_task(anext(stream))
        await settle()
        gateway.router.activate(SECOND)
    await first
    assert [step.epoch for step in gateway.peers[A].steps] == [2]
    assert gateway.transfers() == []
    await stream.aclose()


async def test_a_pass_says_how_much_is_left_of_its_objective() -> None:
    classes = [
        {"name": name, "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8} | objective
        for name, objective in (("chat", {"slo": "9 s"}), ("batch", {}), ("label", {"slo": "2 s"}))
    ]
    gateway = Gateway(classes=classes)
    for name in ("chat", "batch", "label"):
        await decode(gateway.sessions.generate(generation_request(4, PROMPT, request_class=name)), 2)
    left_s = [step.left_s for step in gateway.peers[A].steps]
    assert left_s == pytest.approx([9, 9, 9, 9, 2, 2], abs=1)
    assert left_s[1] < left_s[0] < 9


async def test_while_passes_are_paused_a_session_moves_at_once() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 3)
    async with gateway.sessions.paused():
        await gateway.sessions.move_all(SECOND)
        assert gateway.transfers() == [(0, 12, False)]
    gateway.router.activate(SECOND)
    await decode(stream, 1)
    assert gateway.peers[A].steps[-1].epoch == 2
    await stream.aclose()


async def test_a_session_whose_caches_cannot_move_is_replayed_on_the_new_route() -> None:
    gateway = Gateway()
    stream = gateway.start()
    tokens = await decode(stream, 3)
    gateway.peers[B].reply = TransferReply(error="no room")
    async with gateway.sessions.paused():
        await gateway.sessions.move_all(SECOND)
        gateway.router.activate(SECOND)
    tokens += await decode(stream, 1)
    # One pass fails. Then the prompt is repeated, and all steps after it in one pass that keeps their bits.
    steps = gateway.peers[A].steps
    assert [(step.epoch, step.attempt, step.start, step.values.shape[1], step.stepwise) for step in steps] == [
        *[(1, 0, 0, 10, False), (1, 0, 10, 1, False), (1, 0, 11, 1, False)],
        (2, 0, 12, 1, False),
        *[(2, 1, 0, 10, False), (2, 1, 10, 2, True), (2, 1, 12, 1, False)],
    ]
    assert [token.index for token in tokens] == [0, 1, 2, 3]
    await stream.aclose()
    (move,) = gateway.record().moves
    assert move.recovery is not None
    assert (move.replayed, move.recovery.restored_positions, move.recovery.replayed_positions) == (True, 0, 12)


THIRD = Route(3, (B, C, B), {})  # the private block 0 moves from A to B


def distrust_a(gateway: Gateway) -> None:
    config = three_node_config(trusted=[B], limits={"context_tokens": 64, "copy_every": 0})
    gateway.sessions.reconfigure(config, FEATURES, frozenset())


async def test_a_session_waits_for_a_lawful_route_and_takes_its_caches_there_without_another_pass() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 3)
    distrust_a(gateway)
    assert gateway.sessions.ready() == "block layer.0 is private and alpha is not trusted"
    following = asyncio.ensure_future(anext(stream))
    await settle()
    assert len(gateway.peers[A].steps) == 3
    gateway.router.activate(THIRD)
    await following
    assert len(gateway.peers[A].steps) == 3
    assert [(step.epoch, step.start) for step in gateway.peers[B].steps] == [(3, 12)]
    assert [(request.first, request.last) for request in gateway.peers[A].requests] == [(0, 12)]
    assert gateway.settled == [3]
    await stream.aclose()
    assert not gateway.record().moves[0].replayed


async def test_a_session_stays_on_a_lawful_route_while_the_live_one_breaks_the_rule() -> None:
    gateway = Gateway()
    gateway.router.activate(THIRD)
    stream = gateway.start()
    await decode(stream, 1)
    gateway.router.activate(Route(4, (A, B, B), {}))  # the private block 0 moves from B to A
    distrust_a(gateway)
    await decode(stream, 2)
    assert [step.epoch for step in gateway.peers[B].steps] == [3, 3, 3]
    gateway.router.activate(Route(5, (B, B, B), {}))
    await decode(stream, 1)
    await settle()
    await decode(stream, 1)
    assert [step.epoch for step in gateway.peers[B].steps][-1] == 5
    assert (gateway.peers[A].steps, gateway.settled) == ([], [5])
    await stream.aclose()


async def test_without_a_lawful_route_a_session_ends_with_the_reason() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    distrust_a(gateway)
    following = asyncio.ensure_future(anext(stream))
    await settle()
    gateway.sessions.set_unavailable("no trusted node is left")
    with pytest.raises(NodeLostError, match="no trusted node is left"):
        await following


@pytest.mark.parametrize("why", ["drained", "removed"])
async def test_a_session_that_has_not_left_an_excluded_node_is_replayed_elsewhere(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_caches, "_MOVE_WITHIN_S", 0.05)
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 2)
    gateway.router.activate(Route(2, (B, C, C), {}))
    gateway.peers[A].transferring.clear()  # A never hands over its caches
    await decode(stream, 1)
    assert [step.epoch for step in gateway.peers[A].steps] == [1, 1, 1]
    if why == "drained":
        gateway.sessions.leave(frozenset({A}))
    else:
        gateway.sessions.leave(frozenset({A}))
        del gateway.router.peers[A]
        gateway.router.listening.discard(A)
        gateway.sessions.leave(frozenset())
    await decode(stream, 1)
    assert len(gateway.peers[A].steps) == 3
    assert [(step.epoch, step.start) for step in gateway.peers[B].steps][-1] == (2, 12)
    await stream.aclose()


async def test_a_session_that_cannot_move_in_time_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_caches, "_MOVE_WITHIN_S", 0.05)
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 3)
    gateway.peers[A].transferring.clear()
    distrust_a(gateway)
    gateway.router.activate(THIRD)
    await decode(stream, 1)
    assert len(gateway.peers[A].steps) == 3
    assert [step.start for step in gateway.peers[B].steps if step.attempt == 1] == [0, 10, 12]
    await stream.aclose()


async def test_a_stream_that_ends_after_its_transfer_failed_leaves_no_error_behind() -> None:
    gateway = Gateway()
    unretrieved: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(context))
    stream = gateway.start()
    await decode(stream, 3)
    gateway.peers[B].reply = TransferReply(error="no room")
    [session] = gateway.sessions._live.values()
    transfer = session.caches._precopy(PreCopy(SECOND))
    await settle()
    await stream.aclose()
    cast(Any, transfer).__del__()  # what the garbage collector calls, some time
    assert unretrieved == []


async def test_after_a_loss_whole_passes_are_restored_and_only_the_others_replayed() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 4)
    gateway.peers[A].held, gateway.peers[B].held = {0: 13}, {1: 13, 2: 11}
    gateway.router.on_lost(B)
    await decode(stream, 1)
    assert [(step.attempt, step.start) for step in gateway.peers[A].steps[4:]] == [
        (0, 13),
        *[(1, 11), (1, 13)],
    ]
    assert gateway.transfers() == []
    await stream.aclose()


async def test_when_caches_cannot_be_restored_three_times_every_pass_is_replayed() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 3)
    gateway.router.activate(SECOND)
    gateway.peers[A].held, gateway.peers[B].held = {0: 12}, {1: 12, 2: 12}
    gateway.peers[B].reply = TransferReply(error="no room")
    await decode(stream, 1)  # begins to copy, which fails
    await settle()
    await decode(stream, 1)
    begun = [permit.attempt for permit in gateway.peers[A].permits]
    assert sorted(set(begun)) == [0, 1, 2, 3, 4]
    assert [(step.attempt, step.start) for step in gateway.peers[A].steps[3:]] == [
        (0, 12),
        *[(4, 0), (4, 10), (4, 13)],
    ]
    await stream.aclose()


async def test_a_session_that_comes_to_a_node_after_its_loss_waits_until_the_node_can_answer() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    gateway.router.listening.discard(C)
    gateway.router.on_lost(C)  # the session is on the first route, which does not have C
    gateway.router.activate(SECOND)
    tokens = []
    waiting = asyncio.create_task(anext(stream))
    while (await asyncio.wait({waiting}, timeout=0.5))[0]:  # on the first route, until the move
        tokens.append((await waiting).token_id)
        waiting = asyncio.create_task(anext(stream))
    gateway.router.listening.add(C)
    gateway.router._notify_change()
    async with asyncio.timeout(5):
        tokens.append((await waiting).token_id)
    assert tokens == list(range(10, 10 + len(tokens)))
    await stream.aclose()


async def test_an_answer_to_an_older_attempt_is_ignored() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 2)
    gateway.router.on_lost(B)
    await decode(stream, 1)
    (name,) = gateway.sessions.session_names()
    gateway.router.on_token(B, Token(session=name, attempt=0, epoch=1, position=13, token_ids=[99]))
    (token,) = await decode(stream, 1)
    assert token.token_id == 12
    await stream.aclose()


ANSWER = {"attempt": 0, "epoch": 1, "position": 11, "token_ids": [99]}


@pytest.mark.parametrize(
    ("node", "changed"),
    [
        (A, {}),
        (C, {}),
        (B, {"epoch": 2}),
        (B, {"attempt": 1}),
        (B, {"position": 10}),
        (B, {"position": 12}),
        (C, {"error": "no", "error_kind": "data"}),
        (B, {"error": "no", "error_kind": "data", "epoch": 7}),
        (B, {"error": "no", "error_kind": "lost", "attempt": 2**32 - 1}),
        (B, {"error": "no", "error_kind": "data", "position": 2}),
    ],
    ids=[
        "token of a node of the route that does not host the head",
        "token of a node that is not on the route",
        "token of another epoch",
        "token of another attempt",
        "token of an earlier position",
        "token of a later position",
        "error of a node that is not on the route",
        "error of another epoch",
        "error of another attempt",
        "error of another position",
    ],
)
async def test_an_answer_that_does_not_belong_to_the_pass_under_way_is_ignored(
    node: str, changed: dict[str, Any]
) -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    (name,) = gateway.sessions.session_names()
    forged = Token(session=name, **ANSWER | changed)
    gateway.router.on_token(node, forged)  # between two passes
    gateway.peers[A].on_token = lambda token: None
    waiting = asyncio.create_task(anext(stream))
    await settle()
    gateway.router.on_token(node, forged)
    gateway.router.on_token(B, Token(session=name, **ANSWER | {"token_ids": [5]}))
    assert (await waiting).token_id == 5
    await stream.aclose()


async def test_a_second_token_for_the_same_position_does_not_answer_the_next_pass() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    (name,) = gateway.sessions.session_names()
    gateway.router.on_token(B, Token(session=name, **ANSWER | {"position": 10}))
    assert [token.token_id for token in await decode(stream, 2)] == [10, 11]
    await stream.aclose()


@pytest.mark.parametrize(("kind", "error"), [("capacity", CapacityError), ("data", DataError)])
async def test_an_error_other_than_a_loss_ends_the_session(kind: str, error: type[Exception]) -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    (name,) = gateway.sessions.session_names()
    gateway.peers[A].on_token = lambda token: None  # no node answers the next pass
    waiting = asyncio.create_task(anext(stream))
    await settle()
    gateway.router.on_token(A, Token(session=name, attempt=0, epoch=1, position=10, error="no", error_kind=kind))
    with pytest.raises(error, match="no"):
        await waiting
    assert gateway.sessions.session_names() == []


async def test_at_the_end_every_node_that_may_have_caches_closes_them() -> None:
    gateway = Gateway()
    stream = gateway.start()
    await decode(stream, 1)
    gateway.router.activate(SECOND)
    gateway.peers[B].transferring.clear()
    await decode(stream, 1)
    (name,) = gateway.sessions.session_names()
    await settle()
    await stream.aclose()  # in the middle of the move
    await settle()
    assert [gateway.peers[node].closed for node in (A, B, C)] == [[name]] * 3
    assert gateway.settled == [2]


async def test_the_times_of_a_pass_are_passed_on_unless_they_are_incomplete_or_of_no_batch() -> None:
    gateway = Gateway()
    passes: list[PassTime] = []
    gateway.sessions.on_pass = passes.append
    good = SegmentTime(waited_s=0.5, computed_s=0.25, background_utilization=0.5, decodes=2)
    times = [[good, good], [good], [good, SegmentTime(waited_s=-1.0)], [good, SegmentTime(computed_s=float("nan"))]]
    times += [[good, SegmentTime(background_utilization=1.0)], [good, SegmentTime(computed_s=1e9)], []]
    times += [[good, SegmentTime(prompt_half=3)]]
    for peer in gateway.peers.values():
        peer.times = iter(times)
    stream = gateway.start()
    await decode(stream, len(times))
    await stream.aclose()
    (done,) = passes
    record = gateway.record()
    assert (record.waited_s, record.computed_s) == (1.0, 0.5)
    assert (done.epoch, done.start, done.tokens) == (1, 0, len(PROMPT))
    assert [(each.node, each.first, each.last, each.decodes) for each in done.segments] == [(A, 0, 0, 2), (B, 1, 2, 2)]
    assert (*done.spent_s(), done.segments[0].node_s) == (1.0, 0.5, 0.0, 0.125)
