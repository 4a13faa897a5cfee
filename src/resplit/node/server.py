"""The service that a node offers to members: checks who calls, translates messages, and runs until told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import structlog
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.server import Server, Stream

from resplit.config import ClusterConfig
from resplit.errors import CommandRefusedError, ConfigError, ResplitError, wire_word
from resplit.node.agent import Agent
from resplit.node.block_timing import time_block
from resplit.node.probe import Probe
from resplit.security import signing
from resplit.security.identity import CONTROLLER, Member, certificate_name
from resplit.shards.registry import Registry
from resplit.wire.links import Link, Sender, Shape
from resplit.wire.message_limits import limited, receive_one
from resplit.wire.node_grpc import NodeBase
from resplit.wire.node_pb2 import (
    Ack,
    AttemptReply,
    AttemptRequest,
    CachePart,
    CacheReply,
    CloseReply,
    CloseRequest,
    CommandReply,
    CommandRequest,
    EchoReply,
    EchoRequest,
    ReportReply,
    ReportRequest,
    Step,
    Token,
    TokensRequest,
    TransferReply,
    TransferRequest,
)
from resplit.wire.peers import Address

_log = structlog.get_logger(__name__)
_LONGEST_NAME = 200


class NodeService(NodeBase):  # type: ignore[misc]  # generated code has no types
    """Messages in, agent's methods out; every call comes over mutual TLS from a member of the same authority."""

    def __init__(self, agent: Agent, probe: Probe, verifier: signing.CommandVerifier) -> None:
        self._agent = agent
        self._probe = probe
        self._verifier = verifier
        self._changing = asyncio.Lock()
        self._refusals: Counter[str] = Counter()
        self._commands: dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]] = {
            "prepare": agent.prepare,
            "clear": agent.clear,
            "commit": agent.commit,
            "abort": agent.abort,
            "release": agent.release,
            "trust": agent.trust,
            "emulate": agent.emulate,
            "connect": self._connect,
            "profile": self._profile,
        }

    def __mapping__(self) -> dict[str, Handler]:
        return limited(super().__mapping__())

    async def Steps(self, stream: Stream[Step, Ack]) -> None:  # noqa: N802
        """Take steps for as long as the caller sends them; each is acknowledged on its way back."""
        caller = certificate_name(stream.peer.cert())
        acks: Sender[Ack] = Sender(self._agent.links.get(caller) or self._agent.link_to_gateway(), stream.send_message)
        acknowledging = asyncio.create_task(acks.run())
        try:
            await stream.send_initial_metadata()
            async for step in stream:
                _ensure_short(step.session, step.gateway)
                acks.put(Ack(number=step.number), 0)
                self._agent.accept(step)
        except StreamTerminatedError:
            pass
        finally:
            acknowledging.cancel()

    async def Tokens(self, stream: Stream[TokensRequest, Token]) -> None:  # noqa: N802
        """Send tokens to the gateway that asks, until it goes."""
        gateway = _only_the_controller(stream)
        await receive_one(stream)
        await stream.send_initial_metadata()
        sender: Sender[Token] = Sender(self._agent.link_to_gateway(), stream.send_message)
        self._agent.gateways[gateway] = sender
        try:
            await sender.run()
        except StreamTerminatedError:
            pass
        finally:
            if self._agent.gateways.get(gateway) is sender:
                del self._agent.gateways[gateway]

    async def Command(self, stream: Stream[CommandRequest, CommandReply]) -> None:  # noqa: N802
        """Obey a signed command, or say why not."""
        request = await receive_one(stream)
        try:
            # Checked on receipt: one that waits behind a long one must not expire meanwhile.
            command = self._verified(request.kind, request.signed)
            async with self._changing:
                body = await self._commands[command.kind](command.body)
            await stream.send_message(CommandReply(body=json.dumps(body)))
        except ResplitError as error:
            kind = wire_word(error)
            self._refusals[kind] += 1
            _log.warning("command refused", node=self._agent.name, reason=kind, error=str(error))
            await stream.send_message(CommandReply(error=str(error), error_kind=kind))

    async def Report(self, stream: Stream[ReportRequest, ReportReply]) -> None:  # noqa: N802
        """State, and telemetry since."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        rows, last = self._probe.rows_after(request.after)
        body = {"state": self._probe.state() | {"refusals": dict(self._refusals)}, "rows": rows}
        await stream.send_message(ReportReply(body=json.dumps(body), last=last))

    async def Echo(self, stream: Stream[EchoRequest, EchoReply]) -> None:  # noqa: N802
        """Answer at once, over the link back."""
        await receive_one(stream)
        caller = certificate_name(stream.peer.cert())
        await (self._agent.links.get(caller) or Link()).cross(0)
        await stream.send_message(EchoReply())

    async def Cache(self, stream: Stream[CachePart, CacheReply]) -> None:  # noqa: N802
        """Take parts of caches from the node that held them."""
        error = ""
        async for part in stream:
            _ensure_short(part.session)
            try:
                await self._agent.take_cache(part)
            except ResplitError as problem:
                error = error or str(problem)
        await stream.send_message(CacheReply(error=error))

    async def TransferCache(self, stream: Stream[TransferRequest, TransferReply]) -> None:  # noqa: N802
        """Push a session's caches to other nodes."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        try:
            await stream.send_message(await self._agent.transfer_cache(request))
        except ResplitError as error:
            await stream.send_message(TransferReply(error=str(error)))

    async def Attempt(self, stream: Stream[AttemptRequest, AttemptReply]) -> None:  # noqa: N802
        """A session is tried again after a loss: what is there of it."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        try:
            lengths = await self._agent.begin_attempt(request.session, request.attempt)
        except ResplitError as error:
            raise GRPCError(Status.FAILED_PRECONDITION, str(error)) from None
        await stream.send_message(AttemptReply(lengths=lengths))

    async def Close(self, stream: Stream[CloseRequest, CloseReply]) -> None:  # noqa: N802
        """Free sessions."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        self._agent.close_sessions(list(request.sessions))
        await stream.send_message(CloseReply())

    def _verified(self, kind: str, signed: str) -> signing.Command:
        command = self._verifier.verify(signed, kind=kind, current_epoch=self._agent.committed)
        if kind not in self._commands:
            raise CommandRefusedError("kind", f"{kind!r} is no command of a node")
        return command

    async def _connect(self, body: dict[str, Any]) -> dict[str, Any]:
        await self._agent.trust(body)
        shapes = {name: Shape(**shape) for name, shape in body["links"].items()}
        self._agent.connect({name: Address.parse(text) for name, text in body["addresses"].items()}, shapes)
        self._agent.close_all_sessions_but(set(body["sessions"]))
        await self._probe.echo_all()
        return {}

    async def _profile(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._agent.profile(body, self._timed)
        self._probe.sample()
        return answer

    async def _timed(self, block: int) -> None:
        executor = self._agent.executor
        assert executor is not None
        seconds = await time_block(executor, block)
        if executor.engine.kinds[block] in ("layer", "attention"):
            self._probe.note_reference(seconds)


async def serve_node(
    name: str, cluster: ClusterConfig, keys: Path, registry_url: str, listen: Address, stop: asyncio.Event
) -> None:
    """Run one node until `stop` is set. ConfigError where the address cannot be listened on."""
    from resplit.shards.sealing import unwrap_key

    member = Member.load(keys)

    def unwrap(wrapped: bytes, shard: str) -> bytes:
        return unwrap_key(wrapped, member.wrap_key or b"", node=name, shard=shard)

    agent = Agent(name, cluster, member, Registry(registry_url), unwrap)
    probe = Probe(agent)
    server = Server([NodeService(agent, probe, signing.CommandVerifier(member))])
    try:
        await server.start(listen.host, listen.port, ssl=_server_context(member))
    except OSError as error:
        raise ConfigError(f"--listen {listen}", f"cannot listen there: {error.strerror or error}") from None
    _log.info("node is listening", node=name, address=str(listen), emulated=agent.hardware is not None)
    probing = asyncio.create_task(probe.run(), name="probe")
    try:
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((probing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if probing.done():
            probing.result()
    finally:
        probing.cancel()
        server.close()
        await agent.disconnect()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 2.0)


def _server_context(member: Member) -> ssl.SSLContext:
    return member.server_context()


def _only_the_controller(stream: Stream[Any, Any]) -> str:
    """The caller's name, which must be the controller's: it speaks for the gateway too."""
    caller = certificate_name(stream.peer.cert())
    if caller != CONTROLLER:
        raise GRPCError(Status.PERMISSION_DENIED, f"{caller} may not ask this; only {CONTROLLER} may")
    return caller


def _ensure_short(*names: str) -> None:
    """Names are kept and logged; one of a megabyte is nobody's."""
    if any(len(name) > _LONGEST_NAME for name in names):
        raise GRPCError(Status.INVALID_ARGUMENT, f"a name of more than {_LONGEST_NAME} characters")
