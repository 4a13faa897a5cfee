"""A member that hosts no block floods nodes and gateway with messages of one kind after another, beside streams."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import time
from collections.abc import Callable
from pathlib import Path

from grpclib.exceptions import GRPCError, StreamTerminatedError

from benchmarks.chaos.findings import Finding
from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster
from resplit.epochs import Proposal
from resplit.errors import ProposalRefusedError
from resplit.security.identity import CONTROLLER, GRPC, STEPS
from resplit.wire.node_pb2 import CommandRequest, EchoRequest, Step, Token
from tests.support.cluster import CLUSTER, load_unsplit, make_model, started
from tests.support.hostile import HostileClient, HostileNode, framed
from tests.support.hostile_members import in_place_of, speaking_as
from tests.support.processes import answering, kill, poll_until, ready
from tests.support.streams import PROMPTS, Streams, expected_tokens, streaming

LASTS_S = 5.0
NEW_TOKENS = 120
LANES = PROMPTS[:4]
HOSTILE, OTHERS = "delta", ("alpha", "beta", "gamma")
_PLACEMENT = ("alpha", "alpha", "beta", "gamma", "gamma", "beta", "beta", "alpha")
_TEXT = CLUSTER.replace("rate_rps: 0.5", "rate_rps: 0.02")
_BYTES = 2**18  # written at once
_HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the preface, and empty settings
_PING = bytes([0, 0, 8, 6, 0, 0, 0, 0, 0]) + bytes(8)
_EMPTY_TIMES = b"\x82\x01\x00" * (2**24 // 3)  # a step of 16 MiB with millions of empty fields


def _step(epoch: int) -> bytes:
    return framed(Step(session="flood", epoch=epoch, gateway=CONTROLLER))


# For each kind: the protocol of the connection, what begins it, and what is sent again and again.
BYTES: dict[str, Callable[[int], tuple[str, bytes, bytes]]] = {
    "empty steps": lambda live: (STEPS, b"", struct.pack(">I", 0)),
    "steps of the live epoch": lambda live: (STEPS, b"", _step(live)),
    "steps of an unknown epoch": lambda live: (STEPS, b"", _step(10**6)),
    "steps with millions of fields": lambda live: (STEPS, b"", framed(_EMPTY_TIMES)),
    "pings": lambda live: (GRPC, _HTTP2, _PING),
}
KINDS = ("nothing", *BYTES, "tokens", "commands", "echoes")


async def run(scale: float, folder: Path) -> list[Finding]:
    """Each kind for a few seconds. The streams go on, and no honest node is lost."""
    model = make_model(folder)
    expected = expected_tokens(load_unsplit(model), NEW_TOKENS, LANES)
    with started(folder, model, _TEXT) as cluster, ControlClient(cluster.url, cluster.token) as client:
        kill(cluster, HOSTILE)
        member = HostileNode()
        async with in_place_of(cluster, HOSTILE, member), speaking_as(cluster, HOSTILE) as liar:
            await poll_until(lambda: answering(client, *OTHERS, HOSTILE) and ready(client))
            await asyncio.to_thread(_deploy, client)
            flood, findings = _Flood(cluster, client, member, liar, LASTS_S * scale), list[Finding]()
            for kind in KINDS:
                findings += await _beside(flood, kind, expected)
    return findings


async def _beside(flood: _Flood, kind: str, expected: list[list[int]]) -> list[Finding]:
    epoch = flood.client.model().epoch
    async with streaming(flood.cluster, expected, LANES) as streams:
        begun_s = time.monotonic()
        sent = await flood.of(kind, epoch)
        tokens_per_s = _tokens_since(streams, begun_s) / (time.monotonic() - begun_s)
    lost = flood.client.model().epoch != epoch
    bad = streams.wrong + len(streams.failed)
    first = f" ({streams.failed[0][:100]})" if streams.failed else ""
    what = f"beside a flood of {kind}"
    return [
        Finding("floods", f"streams that failed or had a wrong token {what}", f"{bad}{first}", "0", not bad),
        Finding("floods", f"a node was replaced {what}", "yes" if lost else "no", "no", not lost),
        Finding("floods", f"tokens per second {what}", f"{tokens_per_s:.0f} (sent: {sent})"),
    ]


def _tokens_since(streams: Streams, begun_s: float) -> int:
    return sum(at_s >= begun_s for lane in streams.lanes for request in lane for at_s in request)


def _deploy(client: ControlClient) -> None:
    while tuple((live := client.model()).placement or ()) != _PLACEMENT:
        with contextlib.suppress(ProposalRefusedError):
            client.propose(Proposal(_PLACEMENT, "re-split", live.epoch))
        time.sleep(0.1)


class _Flood:
    """Sends as much as it can for some seconds. Each kind returns how much, in bytes or messages."""

    def __init__(
        self, cluster: Cluster, client: ControlClient, member: HostileNode, liar: HostileClient, lasts_s: float
    ) -> None:
        self.cluster, self.client = cluster, client
        self._member, self._liar, self._lasts_s = member, liar, lasts_s
        self._sent = 0

    async def of(self, kind: str, epoch: int) -> int:
        """Flood all others with one kind at the same time."""
        self._sent = 0
        works = [self._tokens()] if kind == "tokens" else [asyncio.sleep(self._lasts_s)] if kind == "nothing" else []
        if kind in BYTES:
            works = [self._bytes(node, *BYTES[kind](epoch)) for node in OTHERS]
        elif not works:
            calls: dict[str, tuple[str, CommandRequest | EchoRequest]] = {
                "commands": ("Command", CommandRequest(signed="A" * 2000)),
                "echoes": ("Echo", EchoRequest()),
            }
            works = [self._calls(node, *calls[kind]) for node in OTHERS for _ in range(100)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._lasts_s):
                await asyncio.gather(*works)
        return self._sent

    async def _bytes(self, node: str, protocol: str, begin: bytes, again: bytes) -> None:
        address, context = self._liar._addresses[node], self._liar.member.client_context(protocol)
        again *= max(1, _BYTES // len(again))
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(address.host, address.port, ssl=context, server_hostname=node)
                try:
                    writer.write(begin)
                    while not writer.is_closing():
                        writer.write(again)
                        self._sent += len(again)
                        await writer.drain()
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.01)

    async def _calls(self, node: str, call: str, message: CommandRequest | EchoRequest) -> None:
        while True:
            with contextlib.suppress(GRPCError, StreamTerminatedError, OSError):
                await self._liar.call(node, call, message)
                self._sent += 1
            await asyncio.sleep(0)

    async def _tokens(self) -> None:
        tokens = [Token(session="flood", epoch=1, token_ids=[3], position=9)] * 5000
        while True:
            for stream in list(self._member._streams):
                await stream.send(tokens)
                self._sent += len(tokens)
            await asyncio.sleep(0.01)
