"""Activations as messages and back, bit for bit."""

from __future__ import annotations

from resplit.model.activation import Activation
from resplit.wire.node_pb2 import Tensor


def to_wire(activation: Activation) -> Tensor:
    """An activation as a message."""
    return Tensor(dtype=activation.dtype, shape=activation.shape, data=activation.data)


def from_wire(tensor: Tensor) -> Activation:
    """A message as an activation; the engine checks its dtype and shape."""
    return Activation(tensor.dtype, tuple(tensor.shape), tensor.data)
