"""Activations as messages and back, bit for bit."""

from __future__ import annotations

from resplit.model.activation import Activation
from resplit.wire.node_pb2 import Tensor


def to_wire(activation: Activation) -> Tensor:
    """An activation as a message."""
    return Tensor(dtype=activation.dtype, shape=activation.shape, data=activation.data)


def data_prefix(field: int, size: int) -> bytes:
    """What stands before the data of a tensor in the field `field` of a serialised message: `size` bytes follow.

    To serialise a message without its data, and to add the data behind this, spares copies: protobuf's own take longer
    than to encrypt it.
    """
    head = _tag(Tensor.DATA_FIELD_NUMBER) + _varint(size)
    return _tag(field) + _varint(len(head) + size) + head


def from_wire(tensor: Tensor) -> Activation:
    """A message as an activation; the engine checks its dtype and shape."""
    return Activation(tensor.dtype, tuple(tensor.shape), tensor.data)


def _tag(field: int) -> bytes:
    return _varint(field << 3 | 2)  # 2: a field with a length


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*found, value))
