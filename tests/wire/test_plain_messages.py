"""Messages that would take much more memory than they have bytes are refused before they are parsed."""

from __future__ import annotations

import contextlib

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from resplit.model.activation import Activation
from resplit.wire.node_pb2 import CachePart, CommandRequest, EchoRequest, SegmentTime, Step, Tensor
from resplit.wire.plain_messages import ensure_plain
from resplit.wire.tensors import to_wire
from tests.support.properties import examples
from tests.support.wire_fuzzing import PARTS, STEPS

MIB = 2**20
HIDDEN = to_wire(Activation("float32", (1, 2048, 1024), bytes(8 * MIB)))
TIMES = [SegmentTime(waited_s=0.1, computed_s=0.2, decodes=3)] * 64


@pytest.mark.parametrize(
    "message",
    [
        Step(session="s", values=HIDDEN, times=TIMES, left_s=1.5, scored=range(32768)),
        CachePart(session="s", blocks=[3], values=HIDDEN),
        EchoRequest(payload=bytes(4 * MIB)),
        Step(session="s", scored=range(100_000)),
    ],
)
def test_large_messages_of_honest_members_are_plain(message: Message) -> None:
    ensure_plain(type(message), message.SerializeToString())


EMPTY_TIMES = b"\x82\x01\x00"  # a field `times` of a step without content, three bytes


def varint(value: int) -> bytes:
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def within(field: bytes, content: bytes) -> bytes:
    return field + varint(len(content)) + content


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        (Step, EMPTY_TIMES * 50_000, "more than 4096 fields"),
        (Step, b"\xa0\x01\x05" * 50_000, "more than 4096 fields"),  # `scored`, one by one
        (Step, within(b"\xa2\x01", b"\x05" * 2 * MIB), "bytes beside its data"),  # `scored`, packed
        (Step, within(b"\x3a", within(b"\x12", b"\x05" * 2 * MIB)), "bytes beside its data"),  # a tensor's shape
        (Step, within(b"\x3a", b"\x10\x05" * 50_000), "more than 4096 fields"),
        (CachePart, within(b"\x2a", within(b"\x12", b"\x05" * 2 * MIB)), "bytes beside its data"),
        (CommandRequest, within(b"\x12", b"A" * 2 * MIB), "bytes beside its data"),
        (Step, b"\xff" * 100_000, "a number without an end"),
        (Step, b"\x3a" + varint(200_000) + bytes(100_000), "beyond the end"),
        (Step, b"\x3b" + bytes(100_000), "wire type 3"),
    ],
)
def test_messages_that_grow_when_they_are_parsed_are_refused(kind: type[Message], content: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        ensure_plain(kind, content)


@examples(100)
@given(message=STEPS | PARTS, size=st.sampled_from([0, 1, 70_000, 300_000]))
def test_what_protobuf_writes_is_read_to_its_end(message: Step | CachePart, size: int) -> None:
    message.values.CopyFrom(Tensor(dtype="float32", shape=[size], data=bytes(size)))
    ensure_plain(type(message), message.SerializeToString())


@examples(200)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_plain_or_refused(content: bytes) -> None:
    with contextlib.suppress(DecodeError):
        ensure_plain(Step, content + bytes(70_000))
