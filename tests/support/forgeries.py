"""What a member can say with its own credentials to change the answer of a session, to end it, or to use its blocks."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable
from typing import Any

from grpclib.exceptions import GRPCError

from resplit.model.activation import Activation, token_ids
from resplit.security.identity import CONTROLLER
from resplit.wire.node_pb2 import CachePart, CloseRequest, PermitRequest, Step, Token
from resplit.wire.tensors import to_wire
from tests.support.hostile import HostileClient, HostileNode

LARGEST = 2**32 - 1
_LAYERS = range(1, 7)
_IDS = to_wire(token_ids([1, 2, 3, 4]))
_HIDDEN = to_wire(Activation("float32", (1, 4, 64), struct.pack("<f", 0.5) * 256))


def forged_tokens(session: str, epoch: int, positions: int) -> list[Token]:
    """A token and an error for every position below `positions`."""
    errors: dict[str, Any] = {"error": "no", "error_kind": "data"}
    return [
        Token(session=session, epoch=epoch, position=position, token_ids=[3], **more)
        for position in range(positions)
        for more in ({}, errors)
    ]


def forged_permit(session: str, epoch: int, member: str, attempt: int = LARGEST) -> PermitRequest:
    """A permit under which `member` may send every cache of a session."""
    senders = dict.fromkeys(_LAYERS, member)
    return PermitRequest(session=session, attempt=attempt, capacity=256, epochs=[epoch], senders=senders)


def forged_steps(session: str, epoch: int, member: str, segments: int = 7) -> list[Step]:
    """A step at position 0 for each segment, of this attempt and of a later one, and each again with a permit."""
    return [
        Step(
            session=session,
            epoch=epoch,
            segment=segment,
            attempt=attempt,
            values=_HIDDEN if segment else _IDS,
            gateway=CONTROLLER,
            permit=permit,
        )
        for attempt in (0, LARGEST)
        for segment in range(segments)
        for permit in (None, forged_permit(session, epoch, member, attempt))
    ]


def forged_parts(session: str, positions: int) -> list[CachePart]:
    """The first positions of every layer's cache, of this attempt and of a later one.

    A part replaces the positions that are held if it reaches further than they do.
    """
    values = to_wire(Activation("float32", (2, 2, positions, 16), struct.pack("<f", 0.5) * 64 * positions))
    return [
        CachePart(session=session, blocks=[block], values=values, attempt=attempt)
        for block in _LAYERS
        for attempt in (0, LARGEST)
    ]


async def forge_everything(
    session: str, epoch: int, positions: int, node: HostileNode, liar: HostileClient, to: Iterable[str]
) -> None:
    """Say all of this at once: tokens to the gateway as `node`, and the rest to nodes with the same credentials."""
    await node.say(*forged_tokens(session, epoch, positions))
    permit = forged_permit(session, epoch, liar.member.name)
    for name in to:
        await liar.steps(name, forged_steps(session, epoch, liar.member.name))
        await liar.cache(name, forged_parts(session, positions))
        for call, message in (("Permit", permit), ("Close", CloseRequest(sessions=[session]))):
            with contextlib.suppress(GRPCError):
                await liar.call(name, call, message)
