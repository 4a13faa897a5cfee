"""Refuses messages that are small to send and large to keep: parsed, a field of two bytes can take fifty or more.

A large message of ours is data of the type `bytes`, as of a tensor, with little beside it. That can be seen without
parsing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from resplit.wire.node_pb2 import Tensor

# Smaller messages are parsed at once: they take few MiB and milliseconds, whatever is in them.
_SMALL_BYTES = 64 * 1024
# Beside the data: the tokens of a long prompt, and how tokens are to be chosen.
_MOST_BESIDE_BYTES = 2**20
_MOST_FIELDS = 4096
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the wire types of protobuf that our messages have


def ensure_plain(kind: type[Message], content: bytes) -> None:
    """DecodeError for a large serialised message of this kind that is more than some bytes and a few small fields."""
    if len(content) <= _SMALL_BYTES:
        return
    beside_bytes = len(content)
    for index, data_bytes in enumerate(_data_bytes(cast(Descriptor, kind.DESCRIPTOR), content, 0, len(content))):
        beside_bytes -= data_bytes
        if index >= _MOST_FIELDS:
            raise DecodeError(f"a message of {len(content)} bytes has more than {_MOST_FIELDS} fields")
    if beside_bytes > _MOST_BESIDE_BYTES:
        raise DecodeError(f"a message has {beside_bytes} bytes beside its data, the limit is {_MOST_BESIDE_BYTES}")


def _data_bytes(kind: Descriptor, content: bytes, first: int, end: int) -> Iterator[int]:
    """For each field, also those of a tensor in it: its size if it is of the type `bytes`, else 0."""
    for number, first_byte, end_byte in _fields(content, first, end):
        field = kind.fields_by_number.get(number)
        yield end_byte - first_byte if field and field.type == FieldDescriptor.TYPE_BYTES else 0
        if field and field.message_type is Tensor.DESCRIPTOR:
            yield from _data_bytes(Tensor.DESCRIPTOR, content, first_byte, end_byte)


def _fields(content: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, first byte and end of the value of each field; DecodeError for bytes that are no fields."""
    while at < end:
        tag, at = _varint(content, at)
        first, wire_type = at, tag & 7
        if wire_type == _BYTES:
            size, first = _varint(content, at)
            at = first + size
        elif wire_type == _VARINT:
            _, at = _varint(content, at)
            first = at
        elif wire_type in (_FIXED64, _FIXED32):
            at += 8 if wire_type == _FIXED64 else 4
            first = at
        else:
            raise DecodeError(f"a field of the wire type {wire_type}")
        if at > end:
            raise DecodeError("a field reaches beyond the end of its message")
        yield tag >> 3, first, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a position, and the position behind it; DecodeError if it has no end."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise DecodeError("a number without an end")
