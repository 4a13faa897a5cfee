"""Malformed and forbidden messages: each is answered with a reason, takes no memory and affects no other session."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError
from hypothesis import given
from hypothesis import strategies as st

from resplit.errors import CapacityError, CommandRefusedError, DataError, NodeLostError, ShardError
from resplit.model.activation import Activation
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine
from resplit.model.sampling import sample
from resplit.model.source import StoredModel
from resplit.security.identity import CACHES, CONTROLLER, STEPS
from resplit.types import Sampling
from resplit.wire import message_limits
from resplit.wire.call_server import MOST_CALL_BYTES
from resplit.wire.node_pb2 import CachePart, CloseRequest, CommandRequest, Step, Tensor, Token
from resplit.wire.tensors import from_wire, to_wire
from tests.support.engines import run_rows
from tests.support.hostile import AnyPart, HostileClient, framed
from tests.support.in_process import InProcessCluster, in_process, until
from tests.support.properties import examples
from tests.support.two_nodes import MIDDLE, take_caches, two_node_config
from tests.support.wire_fuzzing import Attacker, tensors

HIDDEN = Activation("float32", (1, 1, 64), bytes(256))
CACHE = Activation("float32", (2, 2, 4, 16), bytes(2 * 2 * 4 * 16 * 4))
NARROW = Activation("float32", (2, 2, 8, 8), CACHE.data)


@pytest.fixture
async def nodes(stored_model: StoredModel, tmp_path: Path) -> AsyncIterator[InProcessCluster]:
    """Two nodes, the middle blocks on `plain`, and one honest session that holds caches there."""
    async with in_process(two_node_config(), stored_model, tmp_path) as running:
        await running.command("plain", "prepare", running.prepare_body("plain", MIDDLE, 1), 1)
        await running.command("plain", "commit", {"epoch": 1}, 1)
        await take_caches(running, "honest", [2], 16)
        yield running


def part(session: str, **changed: object) -> CachePart:
    return CachePart(**{"session": session, "blocks": [2], "values": to_wire(CACHE)} | changed)


def step(**changed: object) -> Step:
    right = {"session": "bad", "epoch": 1, "segment": 1, "values": to_wire(HIDDEN)}
    return Step(**right | {"gateway": "controller"} | changed)


async def answer_to(nodes: InProcessCluster, bad: Step, capacity: int = 16) -> Token:
    """Send a step as the node of the segment before, and return the answer that the gateway receives."""
    answers: list[Token] = []
    nodes.router.on_token = lambda node, token: answers.append(token)
    await nodes.permit("plain", "bad", capacity=capacity)
    sender = HostileClient(nodes.addresses, nodes.folder / "keys" / "trusted")
    await sender.steps("plain", [bad])
    await sender.disconnect()

    async def answered() -> bool:
        return bool(answers)

    await until(answered)
    return answers[0]


@pytest.mark.parametrize(
    ("changed", "kind", "says"),
    [
        ({"start": 2**32 - 1}, "data", "the step begins at"),
        ({"values": Tensor(dtype="float32", shape=[1, -2, -32], data=bytes(256))}, "data", "256 bytes are not"),
        ({"values": Tensor(dtype="float32", shape=[2**32, 2**32 + 1], data=b"")}, "data", "0 bytes are not"),
        ({"values": Tensor(dtype="float32", shape=[1] * 100, data=bytes(4))}, "data", "4 bytes are not"),
        ({"values": Tensor(dtype="float32", shape=[1, 2**62, 64], data=bytes(256))}, "data", "256 bytes are not"),
        ({"values": Tensor(dtype="object" * 1000, shape=[1], data=b"1")}, "data", "unknown dtype 'objectobject"),
        ({"values": Tensor()}, "data", "unknown dtype"),
        ({"epoch": 2**64 - 1}, "stale", "does not serve epoch"),
        ({"attempt": 1}, "stale", "is in attempt 0, not 1"),
        ({"attempt": 2**32 - 1}, "stale", "is in attempt 0, not 4294967295"),
    ],
    ids=[
        "position beyond every cache",
        "negative shape",
        "overflowing shape",
        "many dimensions",
        "huge shape",
        "unknown dtype",
        "no tensor",
        "unknown epoch",
        "later attempt",
        "huge attempt",
    ],
)
async def test_an_impossible_step_is_answered_with_an_error_and_takes_no_memory(
    nodes: InProcessCluster, changed: dict[str, object], kind: str, says: str
) -> None:
    before = await nodes.state("plain")
    answer = await answer_to(nodes, step(**changed))
    assert (answer.error_kind, answer.session) == (kind, "bad")
    assert says in answer.error
    assert len(answer.error) < 300
    after = await nodes.state("plain")
    assert (after.sessions, after.held_bytes) == (before.sessions, before.held_bytes)


@pytest.mark.parametrize(("capacity", "says"), [(0, "room for 0"), (2**32 - 1, "the cache of session bad needs")])
async def test_a_step_of_a_session_whose_cache_cannot_be_is_answered_with_an_error_and_takes_no_memory(
    nodes: InProcessCluster, capacity: int, says: str
) -> None:
    before = await nodes.state("plain")
    answer = await answer_to(nodes, step(), capacity)
    assert answer.error_kind == "capacity"
    assert says in answer.error
    assert (await nodes.state("plain")).held_bytes == before.held_bytes


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"blocks": [99]}, "controller may not send the cache of block 99"),
        ({"blocks": [2, 0]}, r"may not hold blocks \[0\] or their caches"),
        ({"blocks": [2, 3]}, "caches of 2 blocks has the shape"),
        ({"blocks": []}, "caches of 0 blocks has the shape"),
        ({"first": 5}, "0 positions held, the part begins at 5"),
        ({"attempt": 2**32 - 1}, "is in attempt 0, not 4294967295"),
        ({"values": to_wire(HIDDEN)}, "caches of 1 blocks has the shape"),
        ({"values": to_wire(NARROW)}, "block 2 was given a cache"),
        ({"values": Tensor(dtype="float32", shape=[-2, -2, 4, 16], data=CACHE.data)}, "1024 bytes are not"),
    ],
    ids=[
        "unknown block",
        "private block",
        "more blocks than values",
        "no block",
        "a gap",
        "huge attempt",
        "another shape",
        "another width",
        "negative shape",
    ],
)
async def test_an_impossible_part_of_a_cache_is_refused_and_takes_no_memory(
    nodes: InProcessCluster, changed: dict[str, object], says: str
) -> None:
    await nodes.permit("plain", "bad", capacity=16, senders=dict.fromkeys(range(8), CONTROLLER))
    before = await nodes.state("plain")
    with pytest.raises(CapacityError, match=says):
        await nodes.peer("plain").cache([AnyPart(part("bad", **changed))])
    after = await nodes.state("plain")
    assert (after.sessions, after.held_bytes) == (before.sessions, before.held_bytes)


async def test_a_message_above_the_size_limit_is_refused_before_it_is_read(
    nodes: InProcessCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_limits, "MAX_MESSAGE_BYTES", 100_000)
    with pytest.raises(GRPCError) as refusal:
        await nodes.peer("plain")._stub.Command(CommandRequest(signed="x" * 200_000))
    assert refusal.value.status is Status.RESOURCE_EXHAUSTED
    assert (await nodes.state("plain")).sessions == 1


async def test_a_call_above_its_size_limit_ends_its_stream_before_it_is_read(nodes: InProcessCluster) -> None:
    with pytest.raises(NodeLostError):
        await nodes.peer("plain").echo(2 * MOST_CALL_BYTES)
    assert (await nodes.state("plain")).refusals == {"capacity": 1}
    assert (await nodes.peer("plain").echo(64)).round_trip_s > 0


NO_MESSAGES = {
    "no message": framed(b"\xff\xff"),
    "a long message": struct.pack(">I", 2**32 - 1) + bytes(9),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}
LONG_NAMES = {STEPS: framed(Step(session="x" * 10_000)), CACHES: framed(CachePart(session="x" * 10_000))}


@pytest.mark.parametrize(
    ("protocol", "sent"),
    [(protocol, sent) for protocol in LONG_NAMES for sent in (LONG_NAMES[protocol], *NO_MESSAGES.values())],
    ids=[f"{protocol}: {what}" for protocol in LONG_NAMES for what in ("a long name", *NO_MESSAGES)],
)
async def test_what_is_no_message_of_a_stream_ends_this_stream_only(
    nodes: InProcessCluster, sent: bytes, protocol: str
) -> None:
    attacker = HostileClient(nodes.addresses, nodes.folder / "keys" / "trusted")
    reader, writer = await asyncio.open_connection(
        nodes.addresses["plain"].host,
        nodes.addresses["plain"].port,
        ssl=attacker.member.client_context(protocol),
        server_hostname="plain",
    )
    writer.write(sent)
    async with asyncio.timeout(10):
        with contextlib.suppress(OSError):
            assert await reader.read() == b"", "nothing comes back"
    writer.close()

    await attacker.steps("plain", [step()])
    state = await nodes.state("plain")
    assert state.sessions == 1
    assert sum(state.refusals.values()) == 1


async def test_bytes_that_are_not_a_message_end_only_their_own_call(
    nodes: InProcessCluster, caplog: pytest.LogCaptureFixture
) -> None:
    attacker = Attacker(nodes.addresses, nodes.folder / "keys" / "trusted")
    huge, no_step = b"\0" + struct.pack(">I", 2**32 - 1) + b"ab", b"\0\0\0\0\2\xff\xff"
    for path in ("Command", "Report", "Measure", "Echo", "TransferCache", "Permit", "Close", "Nothing"):
        for body in (b"", b"\1\0\0\0\0", b"\0\0\0\0\5ab", b"\0\0\0\0\5", huge, no_step):
            await attacker.frame("plain", path, body, waits_s=0.01)
    for body in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", bytes(4000)):
        await attacker.raw("plain", body, tls=True)
        await attacker.raw("plain", body, tls=False)
    assert (await nodes.state("plain")).sessions == 1
    assert "Application error" not in caplog.text, "the bytes must not cause an error in the node"


@pytest.fixture(scope="module")
def engine(stored_model: StoredModel) -> Engine[Any]:
    """An engine with embed, one layer and head: token ids, hidden states and logits as inputs."""
    engine = open_engine(stored_model.spec)
    for block in (0, 1, 7):
        engine.load(block, stored_model.content(engine.features[block].name))
    return engine


@examples(300)
@given(tensor=tensors(), block=st.sampled_from([0, 1, 7]), start=st.sampled_from([0, 1, 2**32 - 1]))
def test_any_tensor_is_computed_or_refused_and_a_refused_one_takes_no_memory(
    engine: Engine[Any], tensor: Tensor, block: int, start: int
) -> None:
    held = engine.held_bytes
    try:
        run_rows(engine, "s", (block, block), start, from_wire(tensor), 16)
    except (DataError, CapacityError):
        assert engine.held_bytes == held
    engine.close("s")
    try:
        engine.import_cache("s", block, 0, 16, from_wire(tensor))
    except (DataError, CapacityError):
        assert engine.held_bytes == held
    engine.close("s")


@pytest.mark.parametrize(
    ("value", "sampling"),
    [
        (float("nan"), Sampling()),
        (float("inf"), Sampling(temperature=1.0)),
        (1.0, Sampling(temperature=float("nan"))),
        (1.0, Sampling(temperature=1.0, top_p=float("nan"))),
        (1.0, Sampling(temperature=1.0, top_p=0.0)),
    ],
)
def test_sampling_without_valid_probabilities_is_an_error(
    engine: Engine[Any], value: float, sampling: Sampling
) -> None:
    logits = Activation("float32", (1, 4), struct.pack("<4f", value, 3.0, 2.0, 1.0))
    with pytest.raises(DataError):
        sample(logits, sampling, 0)


async def test_a_running_node_detects_and_counts_a_flipped_bit_in_a_shard(nodes: InProcessCluster) -> None:
    later = ["trusted", "trusted", "trusted", "plain", "plain", *["trusted"] * 3]
    body = nodes.prepare_body("plain", later, 2)
    shard = nodes.folder / "registry" / body["shards"]["4"]["name"]
    sealed = bytearray(shard.read_bytes())
    sealed[len(sealed) // 2] ^= 1
    shard.write_bytes(sealed)
    with pytest.raises(ShardError, match="corrupt"):
        await nodes.command("plain", "prepare", body, 2)
    state = await nodes.state("plain")
    assert (state.blocks, state.refusals) == ((2, 3), {"shard": 1})


async def test_refusals_are_counted_by_reason_in_the_state_of_the_node(nodes: InProcessCluster) -> None:
    private = nodes.prepare_body("plain", ["plain", *MIDDLE[1:]], 2)
    private["shards"] = {}
    for kind, body, epoch, reason in [
        ("prepare", private, 2, "privacy"),
        ("commit", {"epoch": 9}, 9, "unprepared"),
        ("explode", {}, 1, "kind"),
    ]:
        with pytest.raises(CommandRefusedError) as refusal:
            await nodes.command("plain", kind, body, epoch)
        assert refusal.value.reason == reason
    assert (await nodes.state("plain")).refusals == {"privacy": 1, "unprepared": 1, "kind": 1}


async def test_a_node_may_not_make_calls_of_the_controller(nodes: InProcessCluster) -> None:
    attacker = HostileClient(nodes.addresses, nodes.folder / "keys" / "trusted")
    with pytest.raises(GRPCError) as refusal:
        await attacker.call("plain", "Close", CloseRequest(sessions=["honest"]))
    assert refusal.value.status is Status.PERMISSION_DENIED
    assert (await nodes.state("plain")).sessions == 1
    await attacker.disconnect()
