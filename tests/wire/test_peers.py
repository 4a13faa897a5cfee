"""A peer that dies hands back what was on its way, and is found again when it is back."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from grpclib.const import Status
from grpclib.encoding.proto import ProtoCodec
from grpclib.exceptions import GRPCError
from grpclib.server import Server, Stream

from resplit.cluster.local import free_ports
from resplit.config import ClusterConfig
from resplit.errors import CapacityError, CommandRefusedError, NodeLostError, PeerFaultError
from resplit.model.activation import Activation, token_ids
from resplit.model.source import StoredModel
from resplit.node import probe
from resplit.security.identity import Member
from resplit.wire import message_limits, step_stream
from resplit.wire.addresses import Address
from resplit.wire.emulated_link import EmulatedLink, Shape
from resplit.wire.node_grpc import NodeBase
from resplit.wire.node_pb2 import Ack, CommandReply, ReportReply, Step, Token, TransferRequest
from resplit.wire.peers import Peer
from resplit.wire.permits import Permit
from resplit.wire.step_stream import Crossing
from resplit.wire.tensors import from_wire, to_wire
from tests.support.in_process import InProcessCluster, in_process, until


@pytest.fixture
def config() -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "near",
            "trusted": ["near"],
            "nodes": [{"name": name, "memory": "8 MiB"} for name in ("near", "far")],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "kv_tokens": 64,
        }
    )


@pytest.fixture
async def nodes(config: ClusterConfig, stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    async with in_process(config, stored_model, tmp_path) as running:
        yield running


class Watched:
    """A peer, and the crossings and lost steps that it reported."""

    def __init__(
        self, nodes: InProcessCluster, address: Address | None = None, link: EmulatedLink | None = None
    ) -> None:
        self.crossings: asyncio.Queue[Crossing] = asyncio.Queue()
        self.lost: asyncio.Queue[tuple[str, list[Step]]] = asyncio.Queue()
        self.peer = Peer(
            "far",
            address or nodes.addresses["far"],
            nodes.member,
            link or EmulatedLink(),
            self.crossings.put_nowait,
            lambda name, steps: self.lost.put_nowait((name, steps)),
        )


def step(session: str = "s", tokens: int = 2) -> Step:
    return Step(session=session, epoch=9, values=to_wire(token_ids([1] * tokens)), gateway="controller")


def large_step() -> Step:
    return step(tokens=4000)


async def test_an_acknowledgement_reports_the_round_trip_of_its_step(nodes: InProcessCluster) -> None:
    watched = Watched(nodes, link=EmulatedLink(Shape(0.03, 1e9)))
    watched.peer.send(step())
    crossing = await asyncio.wait_for(watched.crossings.get(), 5)
    assert (crossing.peer, crossing.payload_bytes) == ("far", 16)
    assert crossing.round_trip_s >= 0.03


async def test_a_large_step_is_acknowledged_with_all_steps_before_it(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_stream, "_ASK_EVERY_S", math.inf)
    watched = Watched(nodes)
    for each in (step(), step(), step(), large_step(), step("last")):
        watched.peer.send(each)
    crossings = [await asyncio.wait_for(watched.crossings.get(), 5) for _ in range(2)]
    assert [crossing.payload_bytes for crossing in crossings] == [16, 32_000]
    await nodes.stop("far")
    _, lost = await asyncio.wait_for(watched.lost.get(), 5)
    assert [each.session for each in lost] == ["last"]
    assert watched.crossings.empty()


async def test_a_thread_sends_steps_at_once_though_the_event_loop_is_busy(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_stream, "_ASK_EVERY_S", 0.0)
    watched = Watched(nodes)
    assert not watched.peer.send_at_once(step()), "there is no connection yet"
    watched.peer.send(step("opens the connection"))
    await asyncio.wait_for(watched.crossings.get(), 5)
    with ThreadPoolExecutor(1) as thread:
        sent = [thread.submit(watched.peer.send_at_once, step(f"{number}")) for number in range(3)]
        assert [each.result() for each in sent] == [True] * 3  # holds up the event loop
    for _ in range(3):
        await asyncio.wait_for(watched.crossings.get(), 5)
    await watched.peer.disconnect()
    assert watched.lost.empty()


async def test_no_step_overtakes_one_that_waits(nodes: InProcessCluster) -> None:
    link = EmulatedLink()
    watched = Watched(nodes, link=link)
    watched.peer.send(step("opens the connection"))
    await asyncio.wait_for(watched.crossings.get(), 5)
    link.shape = Shape(30.0, 1e9)
    assert not watched.peer.send_at_once(step()), "an emulated link delays steps in the event loop"
    watched.peer.send(step("waits"))
    link.shape = None
    assert not watched.peer.send_at_once(step()), "a step waits"
    await nodes.stop("far")
    _, lost = await asyncio.wait_for(watched.lost.get(), 5)
    assert [each.session for each in lost] == ["waits"]
    await watched.peer.disconnect()


async def test_an_acknowledgement_is_asked_for_again_after_a_while(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_stream, "_ASK_EVERY_S", 0.0)
    watched = Watched(nodes)
    for _ in range(3):
        watched.peer.send(step())
    for _ in range(3):
        await asyncio.wait_for(watched.crossings.get(), 5)
    await watched.peer.disconnect()
    assert watched.lost.empty()


async def test_steps_to_an_absent_peer_are_handed_back_and_calls_raise_node_lost(nodes: InProcessCluster) -> None:
    watched = Watched(nodes, Address("127.0.0.1", free_ports(1)[0]))
    watched.peer.send(step("one"))
    watched.peer.send(step("two"))
    name, steps = await asyncio.wait_for(watched.lost.get(), 5)
    assert (name, [each.session for each in steps]) == ("far", ["one", "two"])
    with pytest.raises(NodeLostError, match="does not answer"):
        await watched.peer.report(0)
    with pytest.raises(NodeLostError):
        await watched.peer.command("connect", "any")
    with pytest.raises(NodeLostError):
        await watched.peer.echo(64)
    with pytest.raises(NodeLostError):
        await watched.peer.listen(lambda token: None)
    await watched.peer.close_sessions(["a lost member has none"])


async def test_a_peer_that_accepts_a_connection_and_says_nothing_is_lost_within_the_connect_limit(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_limits, "CONNECT_WITHIN_S", 0.1)
    (port,) = free_ports(1)
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: held.append(writer), "127.0.0.1", port)
    watched = Watched(nodes, address=Address("127.0.0.1", port))
    async with asyncio.timeout(10):  # asyncio itself waits for a minute
        watched.peer.send(step())
        assert [each.session for each in (await watched.lost.get())[1]] == ["s"]
        with pytest.raises(NodeLostError, match=r"no connection within 0\.1 s"):
            await watched.peer.command("commit", "signed")
        with pytest.raises(NodeLostError, match="no connection"):
            await watched.peer.listen(lambda token: None)
    assert watched.peer.fault_count == 0
    await watched.peer.disconnect()
    for writer in held:
        writer.close()
    silent.close()


async def test_steps_that_a_dead_peer_did_not_acknowledge_are_handed_back_and_later_ones_reach_it_again(
    nodes: InProcessCluster,
) -> None:
    slow = EmulatedLink(Shape(0.0, 1e9))
    watched = Watched(nodes, link=slow)
    watched.peer.send(step("arrives"))
    await asyncio.wait_for(watched.crossings.get(), 5)
    slow.shape = Shape(30.0, 1e9)
    watched.peer.send(step("on its way"))
    await nodes.stop("far")
    name, steps = await asyncio.wait_for(watched.lost.get(), 5)
    assert (name, [each.session for each in steps]) == ("far", ["on its way"])

    await nodes.start("far")
    slow.shape = None
    watched.peer.send(step("again"))
    crossing = await asyncio.wait_for(watched.crossings.get(), 5)
    assert crossing.peer == "far"
    assert watched.lost.empty()
    await watched.peer.disconnect()


@pytest.mark.parametrize(("limit", "most", "sent"), [("_MOST_STEPS", 3, step), ("_MOST_BYTES", 96_000, large_step)])
async def test_what_a_peer_leaves_unacknowledged_is_bounded(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch, limit: str, most: int, sent: Callable[[], Step]
) -> None:
    monkeypatch.setattr(step_stream, limit, most)
    link = EmulatedLink(Shape(3600.0, 1e9))
    watched = Watched(nodes, link=link)
    for _ in range(3):
        watched.peer.send(sent())
    with pytest.raises(CapacityError, match="far has not acknowledged 3 steps"):
        watched.peer.send(sent())
    await watched.peer.disconnect()


async def test_a_single_step_may_be_as_large_as_a_message(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_stream, "_MOST_BYTES", 1000)
    watched = Watched(nodes)
    watched.peer.send(large_step())
    assert (await asyncio.wait_for(watched.crossings.get(), 30)).payload_bytes == 32_000
    watched.peer.send(large_step())  # what is acknowledged does not count
    await asyncio.wait_for(watched.crossings.get(), 30)
    await watched.peer.disconnect()


async def test_a_stream_whose_peer_never_acknowledges_breaks_and_its_steps_are_handed_back(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_stream, "_ASK_EVERY_S", 0.0)
    monkeypatch.setattr(step_stream, "_ACKNOWLEDGED_WITHIN_S", 0.0)
    (port,), arrived, held = free_ports(1), asyncio.Event(), list[asyncio.StreamWriter]()

    async def read_and_say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)
        await reader.read(1)
        arrived.set()

    context = Member.load(nodes.folder / "keys" / "far").server_context()
    silent = await asyncio.start_server(read_and_say_nothing, "127.0.0.1", port, ssl=context)
    watched = Watched(nodes, Address("127.0.0.1", port))
    watched.peer.send(step("one"))
    await asyncio.wait_for(arrived.wait(), 30)
    watched.peer.send(step("two"))
    _, lost = await asyncio.wait_for(watched.lost.get(), 30)
    assert [each.session for each in lost] == ["one", "two"]
    silent.close()
    for writer in held:
        writer.transport.abort()


async def test_the_gateway_notices_that_a_node_dies_and_returns(nodes: InProcessCluster) -> None:
    lost: asyncio.Queue[str] = asyncio.Queue()
    tokens: asyncio.Queue[tuple[str, Token]] = asyncio.Queue()
    nodes.router.on_lost = lost.put_nowait
    nodes.router.on_token = lambda *answer: tokens.put_nowait(answer)
    await nodes.stop("far")
    assert await asyncio.wait_for(lost.get(), 5) == "far"
    assert nodes.router.listening == {"near"}
    nodes.peer("far").send(step("to the dead"))
    node, answer = await asyncio.wait_for(tokens.get(), 5)
    assert (answer.session, answer.error_kind, node) == ("to the dead", "lost", "far")
    with pytest.raises(NodeLostError, match="no answer within 0 s from far"):
        await nodes.router.wait_for({"near", "far"}, 0.1)
    await nodes.start("far")
    assert nodes.router.listening == {"near", "far"}
    nodes.peer("far").send(step("to the living"))
    node, answer = await asyncio.wait_for(tokens.get(), 5)
    assert (answer.session, answer.error_kind) == ("to the living", "stale")


async def test_a_node_reports_a_lost_neighbour_to_the_gateway(nodes: InProcessCluster) -> None:
    tokens: asyncio.Queue[tuple[str, Token]] = asyncio.Queue()
    nodes.router.on_token = lambda *answer: tokens.put_nowait(answer)
    placement = ["near", "near", "far", "far", *["near"] * 4]
    for name in ("near", "far"):
        await nodes.command(name, "prepare", nodes.prepare_body(name, placement, 1))
        await nodes.command(name, "commit", {"epoch": 1})
    await nodes.stop("far")
    first = step("broken")
    first.epoch = 1
    await nodes.permit("near", "broken")
    nodes.peer("near").send(first)
    node, answer = await asyncio.wait_for(tokens.get(), 5)
    assert (answer.session, answer.error_kind, node) == ("broken", "lost", "near")
    assert "near lost its connection to far" in answer.error


async def test_a_peer_with_another_name_in_its_certificate_is_refused(nodes: InProcessCluster) -> None:
    watched = Watched(nodes, nodes.addresses["near"])  # `near` listens there, and `far` was asked for
    watched.peer.send(step())
    assert (await asyncio.wait_for(watched.lost.get(), 5))[0] == "far"
    await watched.peer.disconnect()


async def test_an_echo_takes_the_latency_and_bandwidth_of_its_link(nodes: InProcessCluster) -> None:
    watched = Watched(nodes, link=EmulatedLink(Shape(0.05, 1e6)))
    assert (await watched.peer.echo(64)).round_trip_s >= 0.05
    assert (await watched.peer.echo(100_000)).round_trip_s >= 0.15
    await watched.peer.disconnect()


async def test_a_report_contains_only_new_rows(nodes: InProcessCluster) -> None:
    addresses = {name: str(address) for name, address in nodes.addresses.items()}
    await nodes.command("far", "connect", nodes.connect_body(addresses))
    report, last = await nodes.peer("far").report(0)
    assert {(row.node, row.peer, row.source) for row in report.rows.links} == {("far", "near", "active")}
    assert last >= len(report.rows.links) > 0

    async def nothing_more() -> bool:
        return not (await nodes.peer("far").report(last))[0].rows.links

    await until(nothing_more)


async def test_a_report_has_a_bounded_number_of_rows_and_the_next_one_continues(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses = {name: str(address) for name, address in nodes.addresses.items()}
    await nodes.command("far", "connect", nodes.connect_body(addresses))
    whole, last = await nodes.peer("far").report(0)
    count = sum(len(getattr(whole.rows, table)) for table in ("nodes", "links", "blocks"))
    assert count > 2
    monkeypatch.setattr(probe, "MAX_REPORTED_ROWS", 2)
    report, number = await nodes.peer("far").report(0)
    seen = [*report.rows.nodes, *report.rows.links, *report.rows.blocks]
    while number < last:
        report, number = await nodes.peer("far").report(number)
        rows = [*report.rows.nodes, *report.rows.links, *report.rows.blocks]
        assert 0 < len(rows) <= 2
        seen += rows
    assert len(seen) >= count
    assert set(whole.rows.links) <= set(seen)


STATE = '"state": {"node": "far", "pid": 1}'
LINK = '"peer": "near", "payload_bytes": 64, "seconds": 0.01, "source": "active", "emulated": false'
ROW = f'{{"time_s": 1, "node": "far", {LINK}}}'
BAD_REPORTS = [
    ("no JSON", "Invalid JSON"),
    ("", "Invalid JSON"),
    ("[]", "should be an object"),
    ("{}", "state: Field required"),
    ("[" * 100_000, "Invalid JSON"),
    ('{"state": ' * 5_000, "Invalid JSON"),
    ('{"state": {"node": "far"}, "rows": {}, "time_s": 1}', "state.pid: Field required"),
    ('{"state": {"node": "near", "pid": 1}, "rows": {}, "time_s": 1}', "about 'near'"),
    (f'{{{STATE}, "rows": {{}}}}', "time_s: Field required"),
    (f'{{{STATE}, "rows": {{}}, "time_s": NaN}}', "time_s: Input"),
    (f'{{{STATE}, "rows": {{}}, "time_s": 1, "more": 1}}', "more: Unexpected"),
    (f'{{{STATE}, "rows": {{"secrets": []}}}}', "rows.secrets: Unexpected"),
    (
        '{"state": {"node": "far", "pid": 1, "epochs": [9223372036854775808]}, "rows": {}, "time_s": 1}',
        "state.epochs.0",
    ),
    ('{"state": {"node": "far", "pid": 1, "blocks": [-1]}, "rows": {}, "time_s": 1}', "state.blocks.0"),
    ('{"state": {"node": "far", "pid": 1, "memory_bytes": NaN}, "rows": {}, "time_s": 1}', "state.memory_bytes"),
    ('{"state": {"node": "far", "pid": 1' + "0" * 5_000 + '}, "rows": {}, "time_s": 1}', "cannot be read"),
    (f'{{{STATE}, "rows": {{"links": [{{"time_s": "now"}}]}}}}', "rows.links.0.time_s"),
    (f'{{{STATE}, "rows": {{"links": [{{"time_s": NaN, "node": "far", {LINK}}}]}}}}', "rows.links.0.time_s"),
    (f'{{{STATE}, "rows": {{"links": [{{"time_s": 1, "node": "near", {LINK}}}]}}, "time_s": 1}}', "about 'near'"),
    (f'{{{STATE}, "rows": {{"links": [{", ".join([ROW] * 2001)}]}}, "time_s": 1}}', "has 2001 rows, the limit is 2000"),
    (f'{{{STATE}, "rows": {{}}, "{"x" * 2**21}": 1}}', "characters, the limit is 2097152"),
]


class Answering:
    """A stand-in for the remote end of a peer. It answers every call with one message, or raises an error."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    async def __call__(self, request: Any, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@pytest.fixture
async def answering(nodes: InProcessCluster) -> AsyncIterator[tuple[Peer, list[str]]]:
    """A peer to put answers into, and the faults that it reports."""
    faults: list[str] = []
    peer = Peer(
        "far", nodes.addresses["far"], nodes.member, on_fault=lambda name, reason: faults.append(f"{name}: {reason}")
    )
    yield peer, faults
    await peer.disconnect()


@pytest.mark.parametrize(("body", "says"), BAD_REPORTS)
async def test_a_report_that_no_node_gives_is_a_fault_that_names_the_node_and_the_place(
    answering: tuple[Peer, list[str]], body: str, says: str
) -> None:
    peer, faults = answering
    peer._calls.report = Answering(ReportReply(body=body))  # type: ignore[method-assign]
    with pytest.raises(PeerFaultError, match=f"^far: .*{re.escape(says)}"):
        await peer.report(0)
    assert len(faults) == 1
    assert len(faults[0]) < 400


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (CommandReply(body="nonsense"), "Invalid JSON"),
        (CommandReply(), "Invalid JSON"),
        (CommandReply(body="[]"), "should be an object"),
        (CommandReply(body="{" * 50_000), "Invalid JSON"),
        (CommandReply(body='{"obeyed": [1]}'), "obeyed: Extra inputs"),
        (CommandReply(body='{"sessions": [7]}'), "sessions.0"),
        (CommandReply(body='{"loaded": [-1]}'), "loaded.0"),
        (CommandReply(body='{"loaded": 7}'), "loaded"),
        (CommandReply(error="no", error_kind="W" * 1000), "has no reason but"),
    ],
)
async def test_a_reply_to_a_command_that_no_node_gives_is_a_fault(
    answering: tuple[Peer, list[str]], reply: CommandReply, says: str
) -> None:
    peer, faults = answering
    peer._stub.Command = Answering(reply)
    with pytest.raises(PeerFaultError, match=says):
        await peer.command("commit", "signed")
    assert len(faults) == 1


async def test_a_refusal_in_the_words_of_a_node_is_no_fault(answering: tuple[Peer, list[str]]) -> None:
    peer, faults = answering
    peer._stub.Command = Answering(CommandReply(error="not prepared", error_kind="unprepared"))
    with pytest.raises(CommandRefusedError, match="not prepared"):
        await peer.command("commit", "signed")
    assert faults == []


@pytest.mark.parametrize(
    ("error", "is_fault"),
    [
        (GRPCError(Status.UNIMPLEMENTED), True),
        (GRPCError(Status.UNKNOWN, "Internal Server Error"), True),
        (GRPCError(Status.UNAVAILABLE), False),
        (ConnectionResetError(), False),
        (TimeoutError(), False),
        (DecodeError("truncated"), True),
        (AssertionError("3 != 4"), True),
        (NotImplementedError("compressed"), True),
        (KeyError(":status"), True),
        (RecursionError(), True),
    ],
)
async def test_an_answer_that_cannot_be_read_is_a_fault_and_silence_is_none(
    answering: tuple[Peer, list[str]], error: Exception, is_fault: bool
) -> None:
    peer, faults = answering
    call = Answering(error)
    calls: Any = peer._calls
    calls.report = calls.echo = calls.permit = calls.transfer_cache = call
    permit = peer.permit("s", Permit(1, 8), keep=True)
    for ask in (peer.report(0), peer.echo(64), permit, peer.transfer_cache(TransferRequest())):
        with pytest.raises(PeerFaultError if is_fault else NodeLostError):
            await ask
    assert len(faults) == (4 if is_fault else 0)


async def test_a_node_that_does_not_answer_a_command_in_time_is_faulty(answering: tuple[Peer, list[str]]) -> None:
    peer, faults = answering
    peer._stub.Command = Answering(TimeoutError())
    with pytest.raises(PeerFaultError, match="did not answer 'trust' within 3 s"):
        await peer.command("trust", "signed", 3.0)
    assert len(faults) == 1


async def test_an_answer_of_endless_length_is_refused_before_it_is_read(
    nodes: InProcessCluster, answering: tuple[Peer, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, _ = answering
    monkeypatch.setattr(message_limits, "MAX_ANSWER_BYTES", 10)
    with pytest.raises(PeerFaultError, match=r"an answer of \d+ bytes is too long"):
        await peer.command("trust", "not signed")


@pytest.mark.parametrize(
    "token",
    [
        Token(session="s", token_ids=[-1]),
        Token(session="s", token_ids=[300]),
        Token(session="s" * 201, token_ids=[1]),
        Token(session="s", error="no reason"),
        Token(session="s", error="x", error_kind="LOST!"),
    ],
)
def test_a_token_that_no_model_has_is_a_fault(token: Token) -> None:
    peer: Any = Peer.__new__(Peer)
    peer.name, peer.vocabulary, peer.on_fault = "far", 300, lambda name, reason: None
    peer._check(Token(session="s", token_ids=[299]))
    with pytest.raises(PeerFaultError, match="it sent no token"):
        peer._check(token)


def test_an_activation_is_transferred_bit_for_bit() -> None:
    given = Activation("bfloat16", (1, 2, 3), bytes(range(12)))
    assert from_wire(to_wire(given)) == given


class _Nonsense(ProtoCodec):  # type: ignore[misc]
    """Encodes every message as bytes that are no message."""

    def encode(self, message: object, message_type: object) -> bytes:
        return b"\xff\xff\xff"


class _Liar(NodeBase):  # type: ignore[misc]
    """A member that answers every call with nonsense."""

    async def _lie(self, stream: Stream[object, object]) -> None:
        await stream.recv_message()
        await stream.send_message(Ack())

    Command = Report = Measure = Echo = Cache = TransferCache = Permit = Close = _lie


async def test_a_peer_whose_answers_cannot_be_read_counts_as_lost(nodes: InProcessCluster) -> None:
    address = Address("127.0.0.1", free_ports(1)[0])
    server = Server([_Liar()], codec=_Nonsense())
    await server.start(address.host, address.port, ssl=Member.load(nodes.folder / "keys" / "far").server_context())
    watched = Watched(nodes, address)
    try:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: watched.peer.command("abort", "signed"),
        ]
        for call in calls:
            with pytest.raises(PeerFaultError, match=r"far: its .* cannot be read"):
                await call()

        watched.peer.send(Step(session="a"))
        async with asyncio.timeout(5):
            name, steps = await watched.lost.get()
        assert (name, [step.session for step in steps]) == ("far", ["a"])
    finally:
        await watched.peer.disconnect()
        server.close()
        await server.wait_closed()


async def test_a_node_that_does_not_know_the_stream_of_tokens_is_named_as_older(
    nodes: InProcessCluster, tmp_path: Path
) -> None:
    context = Member.load(tmp_path / "keys" / "far").server_context()
    context.set_alpn_protocols(["h2"])  # as nodes did before tokens had a stream of their own
    port = free_ports(1)[0]
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", port, ssl=context)
    async with server:
        peer = Watched(nodes, Address("127.0.0.1", port)).peer
        with pytest.raises(PeerFaultError, match=r"far: far runs a resplit that says no version.*resplit on far"):
            await peer.listen(lambda token: None)
        await peer.disconnect()
