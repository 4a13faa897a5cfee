"""Invalid messages for every call of a node, and an attacker that sends them.

The attacker is a member of the cluster: it holds certificates. It also sends bytes to the port without a certificate.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import Message
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import H2Error
from hypothesis import strategies as st

from resplit.security.identity import CACHES, CONTROLLER, TOKENS
from resplit.security.identity import CALLS as STREAM_OF_CALLS
from resplit.security.identity import STEPS as STREAM_OF_STEPS
from resplit.wire.addresses import Address
from resplit.wire.node_pb2 import (
    CachePart,
    CloseRequest,
    CommandRequest,
    EchoRequest,
    MeasureRequest,
    ReportRequest,
    Sampling,
    Step,
    Tensor,
    TransferRequest,
)
from resplit.wire.permits import Permit
from tests.support.fuzzing import send_for
from tests.support.hostile import HostileClient, exchange

_ANSWER_WITHIN_S = 10.0
_PATHS = ("Command", "Report", "Nothing")
_SIZES = st.sampled_from([0, 1, 2, 4, 16, 63, 64, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
_EPOCHS = st.sampled_from([0, 1, 2, 3, 7, 2**63, 2**64 - 1])
_DIMENSIONS = st.sampled_from([-(2**63), -4, -1, 0, 1, 2, 3, 4, 16, 64, 300, 2**31, 2**32, 2**62, 2**63 - 1])
_NUMBERS = st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 1e-38, 3e38, math.inf, -math.inf, math.nan])
_NAMES = st.sampled_from(["fuzz-1", "fuzz-2", "fuzz-3", "", "\0", "é" * 40, "x" * 100_000]) | st.text(max_size=8)
_DTYPES = st.sampled_from(["float32", "int64", "float16", "bfloat16", "float64", "", "object", "y" * 100_000])


@st.composite
def valid_tensors(draw: st.DrawFn) -> Tensor:
    """Tensors of valid shape, dtype and length: token ids, hidden states or a cache. The values are arbitrary."""
    tokens = draw(st.integers(1, 8))
    if draw(st.booleans()):
        ids = draw(st.lists(st.sampled_from([0, 1, 250, 299, 10**6, -1, 2**63 - 1]), min_size=tokens, max_size=tokens))
        return Tensor(dtype="int64", shape=(1, tokens), data=struct.pack(f"<{tokens}q", *ids))
    shape = draw(st.sampled_from([(1, tokens, 64), (2, 2, tokens, 16)]))
    count = math.prod(shape)
    value = draw(_NUMBERS)
    return Tensor(dtype="float32", shape=shape, data=struct.pack("<f", value) * count)


def tensors() -> st.SearchStrategy[Tensor]:
    """Valid tensors, valid ones with a part changed, and random ones."""
    changed = st.builds(
        _changed,
        valid_tensors(),
        st.none() | _DTYPES,
        st.none() | st.lists(_DIMENSIONS, max_size=5),
        st.integers(0, 9),
    )
    random = st.builds(Tensor, dtype=_DTYPES, shape=st.lists(_DIMENSIONS, max_size=70), data=st.binary(max_size=64))
    return valid_tensors() | changed | random


def _changed(tensor: Tensor, dtype: str | None, shape: list[int] | None, cut: int) -> Tensor:
    return Tensor(
        dtype=tensor.dtype if dtype is None else dtype,
        shape=list(tensor.shape) if shape is None else shape,
        data=tensor.data[: len(tensor.data) - cut],
    )


STEPS = st.builds(
    Step,
    number=st.sampled_from([0, 1, 2**64 - 1]),
    session=_NAMES,
    epoch=_EPOCHS,
    segment=st.sampled_from([0, 1, 2, 3, 2**32 - 1]),
    start=_SIZES,
    values=tensors(),
    sampling=st.builds(
        Sampling, temperature=_NUMBERS, top_p=_NUMBERS, seed=st.sampled_from([0, 1, -1, -(2**63), 2**63 - 1])
    ),
    gateway=st.sampled_from([CONTROLLER, "", "nobody"]),
    left_s=_NUMBERS,
)
PARTS = st.builds(
    CachePart, session=_NAMES, first=_SIZES, values=tensors(),
    blocks=st.lists(st.sampled_from([0, 1, 2, 3, 7, 8, 2**32 - 1]), max_size=3),
)  # fmt: skip
# Calls with one message and one answer.
CALLS: dict[str, st.SearchStrategy[Message]] = {
    "TransferCache": st.builds(
        TransferRequest,
        session=_NAMES,
        target=st.lists(st.sampled_from(["", "alpha", "delta", "nobody"]), max_size=9),
        first=_SIZES,
        last=_SIZES,
    ),
    "Command": st.builds(
        CommandRequest,
        kind=st.sampled_from(
            ["prepare", "commit", "abort", "release", "connect", "profile", "emulate", "", "x" * 9999]
        ),
        signed=st.text(max_size=40) | st.just("a.b.c") | st.just("A" * 2**21),
    ),
    "Report": st.builds(ReportRequest, after=st.sampled_from([0, 1, 2**63, 2**64 - 1])),
    "Measure": st.builds(MeasureRequest, nodes=st.lists(_NAMES, max_size=5)),
    "Close": st.builds(CloseRequest, sessions=st.lists(_NAMES, max_size=5)),
    "Echo": st.builds(EchoRequest, payload=st.sampled_from([b"", bytes(2**20)])),
}
GARBAGE = st.binary(max_size=200) | st.sampled_from(
    [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x80" * 5000]
)


FRAMES = st.binary(max_size=60) | st.builds(
    lambda flag, announced, body: bytes([flag]) + struct.pack(">I", announced) + body,
    st.sampled_from([0, 1, 255]),
    st.sampled_from([0, 1, 5, 40, 2**20, 2**31, 2**32 - 1]),
    st.binary(max_size=60),
)


# A length that is announced, and bytes.
_STREAMS = st.builds(
    lambda announced, body: struct.pack(">I", announced) + body,
    st.sampled_from([0, 1, 5, 40, 2**20, 2**31, 2**32 - 1]),
    st.binary(max_size=60),
)


@dataclass(frozen=True)
class Payload:
    """Something to send, and its name in the counts of outcomes."""

    name: str
    send: Callable[[Attacker, str], Awaitable[str]]


def _calls(name: str, messages: st.SearchStrategy[Message]) -> st.SearchStrategy[Payload]:
    members = st.sampled_from(["", CONTROLLER])
    return st.builds(lambda m, who: Payload(name, lambda a, node: a.call(node, name, m, who)), messages, members)


PAYLOADS: st.SearchStrategy[Payload] = st.one_of(
    st.lists(STEPS, min_size=1, max_size=4).map(lambda some: Payload("Steps", lambda a, node: a.steps(node, some))),
    st.lists(PARTS, min_size=1, max_size=4).map(lambda some: Payload("Caches", lambda a, node: a.parts(node, some))),
    *(_calls(name, messages) for name, messages in CALLS.items()),
    st.builds(
        lambda path, body: Payload(f"bytes as {path}", lambda a, node: a.frame(node, path, body)),
        st.sampled_from(_PATHS),
        FRAMES,
    ),
    GARBAGE.map(lambda body: Payload("bytes in TLS", lambda a, node: a.raw(node, body, tls=True))),
    (GARBAGE | _STREAMS).map(
        lambda body: Payload("bytes as steps", lambda a, node: a.as_stream(node, STREAM_OF_STEPS, body))
    ),
    (GARBAGE | _STREAMS).map(lambda body: Payload("bytes as caches", lambda a, node: a.as_stream(node, CACHES, body))),
    (GARBAGE | _STREAMS).map(
        lambda body: Payload("bytes as calls", lambda a, node: a.as_stream(node, STREAM_OF_CALLS, body))
    ),
    st.builds(
        lambda name, body: Payload(f"{name} of bytes", lambda a, node: a.call(node, name, body, "")),
        st.sampled_from([*CALLS, "Nothing"]),
        st.binary(max_size=60),
    ),
    (GARBAGE | _STREAMS).map(lambda body: Payload("bytes as tokens", lambda a, node: a.as_stream(node, TOKENS, body))),
    GARBAGE.map(lambda body: Payload("bytes on the port", lambda a, node: a.raw(node, body, tls=False))),
)


@dataclass
class Attacker:
    """Sends payloads to nodes as the member whose keys are in `keys`, and counts the outcomes."""

    addresses: dict[str, Address]
    keys: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._me = HostileClient(self.addresses, self.keys)
        self._controller = HostileClient(self.addresses, self.keys.parent / CONTROLLER)

    async def deliver(self, what: str, sending: Awaitable[str]) -> None:
        """Send one payload and count its outcome. No answer in time counts as a hang."""
        try:
            async with asyncio.timeout(_ANSWER_WITHIN_S):
                outcome = await sending
        except TimeoutError:
            outcome = "hang"
        except GRPCError as error:
            outcome = f"status {error.status.name}"
        except (OSError, StreamTerminatedError, H2Error) as error:
            outcome = type(error).__name__
        self.outcomes[f"{what}: {outcome}"] += 1
        if outcome in ("hang", "status UNKNOWN", "status INTERNAL") and not what.startswith("bytes"):
            self.broken[f"{what}: {outcome}"] += 1

    async def steps(self, node: str, steps: list[Step]) -> str:
        """Send steps on one stream, and wait for the acknowledgement of each. Each session has a permit."""
        await self._permit(node, [step.session for step in steps])
        await self._me.steps(node, steps)
        await self._close(node, [step.session for step in steps])
        return "acknowledged"

    async def parts(self, node: str, parts: list[CachePart]) -> str:
        """Send parts of caches on one stream. The node has permits to take them."""
        await self._permit(node, [part.session for part in parts])
        reply = await self._me.cache(node, parts)
        await self._close(node, [part.session for part in parts])
        return "refused" if reply.error else "taken"

    async def call(self, node: str, name: str, message: Message | bytes, member: str) -> str:
        """Make one call with one answer, as the attacker or as the controller."""
        client = self._controller if member == CONTROLLER else self._me
        reply = await client.call(node, name, message)
        return "refused" if getattr(reply, "error", "") else "answered"

    async def frame(self, node: str, path: str, body: bytes, waits_s: float = 0.1) -> str:
        """Send any bytes as the body of a call, in well-formed HTTP/2 and TLS."""
        await self._me.frame(node, path, body, waits_s)
        return "closed"

    async def raw(self, node: str, content: bytes, tls: bool, waits_s: float = 0.1) -> str:
        """Send any bytes on the port: inside TLS after a valid handshake, or instead of the handshake."""
        if tls:
            await self._me.raw(node, content, waits_s)
        else:
            await exchange(self.addresses[node], content, waits_s)
        return "closed"

    async def as_stream(self, node: str, protocol: str, content: bytes) -> str:
        """Send any bytes on a stream of steps or of caches."""
        await self._me.raw(node, content, protocol=protocol)
        return "closed"

    async def disconnect(self) -> None:
        """Close every connection."""
        await self._me.disconnect()
        await self._controller.disconnect()

    async def _permit(self, node: str, sessions: list[str]) -> None:
        """Give permits as the gateway does, so that the messages pass the check of their sender."""
        for session in sessions:
            permit = Permit(0, 16, frozenset({1, 2, 3}), dict.fromkeys(range(9), self._me.member.name))
            with contextlib.suppress(GRPCError):  # the name is too long, or the session has ended
                await self._controller.call(node, "Permit", permit.to_wire(session, keep=False))

    async def _close(self, node: str, sessions: list[str]) -> None:
        """Close sessions as the gateway does when they end, so that the attack's sessions free their memory."""
        await self._controller.call(node, "Close", CloseRequest(sessions=sessions))


def attack(attacker: Attacker, lasts_s: float) -> int:
    """Send random payloads for `lasts_s` seconds; returns how many. Runs its own event loop, so call it in a thread."""
    aimed = st.tuples(PAYLOADS, st.sampled_from(sorted(attacker.addresses)))
    with asyncio.Runner() as runner:

        def send(aim: tuple[Payload, str]) -> None:
            payload, node = aim
            runner.run(attacker.deliver(payload.name, payload.send(attacker, node)))

        sent = send_for(lasts_s, aimed, send)
        runner.run(attacker.disconnect())
    return sent
