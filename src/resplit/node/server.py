"""What a node serves: checks who calls or sends steps, and translates messages into calls of the agent."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from grpclib.const import Handler, Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream
from pydantic_core import to_json

from resplit.config import ClusterConfig
from resplit.errors import CommandRefusedError, DataError, ResplitError, wire_message, wire_word
from resplit.model.engines import preload
from resplit.node.agent import Agent
from resplit.process.cancellation import VitalTasks, until_stopped
from resplit.process.event_loop import absent_s
from resplit.security import signing
from resplit.security.identity import CACHES, CALLS, CONTROLLER, STEPS, TOKENS, Member
from resplit.shards.kept import KeptShards
from resplit.shards.registry import Registry
from resplit.shards.sealing import unwrap_key
from resplit.status import NodeReport
from resplit.wire.addresses import Address
from resplit.wire.call_server import MOST_CALL_BYTES, CallServer, ServedCall, caller_of
from resplit.wire.commands import NodeCommand, parse_command
from resplit.wire.emulated_link import EmulatedLink, Sender
from resplit.wire.listener import Listener
from resplit.wire.member_server import PER_MEMBER, STRANGERS, MemberServer, Streams
from resplit.wire.message_limits import Arriving, limited, receive_one
from resplit.wire.message_stream import MessageStream
from resplit.wire.node_grpc import NodeBase
from resplit.wire.node_pb2 import (
    Ack,
    CachePart,
    CacheReply,
    Call,
    CloseReply,
    CommandReply,
    CommandRequest,
    EchoReply,
    Hello,
    MeasureReply,
    PermitReply,
    ReportReply,
    Step,
    Token,
    TokensRequest,
    TransferReply,
)
from resplit.wire.patience import Patience
from resplit.wire.permits import Permit
from resplit.wire.version import Version, mismatch, own_version

_log = structlog.get_logger(__name__)
# So many messages of one member may be refused at once, and in each second. A member with more is read more slowly: an
# honest one has some when an epoch or a session ends, and those of a flood would hold up the messages of others.
_REFUSED_AT_ONCE, _REFUSED_PER_S = 1000, 200
_LONGEST_NAME_CHARS = 200
_LONGEST_REFUSAL_CHARS = 500
# The calls that come over streams of calls. All others come over gRPC.
_FREQUENT = ("Report", "Measure", "Echo", "TransferCache", "Permit", "Close")
_TOO_LONG = f"a name of more than {_LONGEST_NAME_CHARS} characters"


class NodeService(NodeBase):  # type: ignore[misc]  # generated code has no types
    """Every call comes over mutual TLS from a member of the same authority. Most calls are for the controller only."""

    def __init__(self, agent: Agent, verifier: signing.CommandVerifier) -> None:
        self._agent = agent
        self._verifier = verifier
        self._refusals: Counter[str] = Counter()
        self._patience = defaultdict[str, Patience](lambda: Patience(_REFUSED_AT_ONCE, _REFUSED_PER_S))
        self.arriving = Arriving()
        self._calls = CallServer(self.frequent(), self._bear)

    def __mapping__(self) -> dict[str, Handler]:
        """What is served over gRPC."""
        rare = {path: each for path, each in super().__mapping__().items() if _name(path) not in _FREQUENT}
        return limited(rare, self.arriving, self._bear)

    def frequent(self) -> dict[str, Handler]:
        """What is served over streams of calls, by name."""
        return {_name(path): each for path, each in super().__mapping__().items() if _name(path) in _FREQUENT}

    async def calls(self, stream: MessageStream[Call]) -> None:
        """Serve the calls of one member."""
        try:
            await self._calls.serve(stream)
        except ResplitError as error:
            self._count(error)

    async def steps(self, stream: MessageStream[Step]) -> None:
        """Run the steps of one caller, and acknowledge those that ask for it as they arrive."""
        connections = self._agent.connections
        link = connections.links.get(stream.member) or connections.link_to_gateway
        acks: Sender[Ack] = Sender(link, stream.send)
        acknowledging = asyncio.create_task(acks.run())
        try:
            await stream.each(lambda step: self._take(step, stream, acks))
        except ResplitError as error:
            self._count(error)
        finally:
            acknowledging.cancel()

    def _take(self, step: Step, stream: MessageStream[Step], acks: Sender[Ack]) -> None:
        if not _are_short(step.session, step.gateway):
            raise DataError(f"{stream.member} sent a step with {_TOO_LONG}")
        if step.acknowledge:
            acks.put(Ack(number=step.number), 0)
        try:
            self._agent.passes.accept(stream.member, step)
        except CommandRefusedError as error:
            self._refuse(error, stream)

    async def parts(self, stream: MessageStream[CachePart]) -> None:
        """Store parts of caches that another node sends. A transfer is answered at its end, and each refused part."""
        replies: Sender[CacheReply] = Sender(EmulatedLink(), stream.send)
        replying = asyncio.create_task(replies.run())
        try:
            await stream.each(lambda part: self._store(part, stream, replies))
        except ResplitError as error:
            self._count(error)
        finally:
            replying.cancel()

    def _store(self, part: CachePart, stream: MessageStream[CachePart], replies: Sender[CacheReply]) -> None:
        if not _are_short(part.session):
            raise DataError(f"{stream.member} sent a part of a cache with {_TOO_LONG}")
        refused = ""
        try:
            self._agent.caches.take(stream.member, part)
        except ResplitError as error:
            refused = f"{error}"[:_LONGEST_REFUSAL_CHARS]
            self._refuse(error, stream)
        if refused or part.ends:
            replies.put(CacheReply(transfer=part.transfer, error=refused), 0)

    async def tokens(self, stream: MessageStream[TokensRequest]) -> None:
        """Send tokens to the gateway that asks, until it disconnects."""
        asked = asyncio.Event()
        sending = asyncio.create_task(self._send_tokens(stream, asked))
        try:
            if stream.member != CONTROLLER:
                raise CommandRefusedError(
                    "unexpected", f"{stream.member} may not ask for tokens; only {CONTROLLER} may"
                )
            await stream.each(lambda request: self._admit(request, asked))
        except ResplitError as error:
            self._count(error)
            stream.abort()
        finally:
            sending.cancel()

    def _admit(self, request: TokensRequest, asked: asyncio.Event) -> None:
        """Note that the gateway has asked. One of another version ends the stream itself, once it knows of ours.

        CommandRefusedError for one that says none: it would not read ours either.
        """
        theirs = Version.said(request.version)
        if wrong := mismatch(CONTROLLER, theirs, self._agent.name):
            _log.error("the controller has another version", node=self._agent.name, version=wrong)
        if not theirs.wire:
            raise CommandRefusedError("unexpected", wrong)
        asked.set()

    async def _send_tokens(self, stream: MessageStream[TokensRequest], asked: asyncio.Event) -> None:
        """Send this process's first words once the gateway has asked, then tokens."""
        await asked.wait()
        hello = Hello(
            nonce=self._verifier.nonce,
            epoch=self._verifier.highest_epoch,
            clock_s=time.time(),
            version=own_version().message(),
        )
        await stream.send([Token(hello=hello)])
        sender: Sender[Token] = Sender(self._agent.connections.link_to_gateway, stream.send)
        gateways = self._agent.passes.gateways
        gateways[stream.member] = sender
        try:
            await sender.run()
        finally:
            if gateways.get(stream.member) is sender:  # a newer stream of the same gateway may have replaced it
                del gateways[stream.member]

    async def Command(self, stream: Stream[CommandRequest, CommandReply]) -> None:  # noqa: N802
        """Obey a signed command, or answer why it is refused."""
        request = await receive_one(stream)
        try:
            # Verified on receipt: a command must not expire while it waits for an earlier one.
            command = self._verified(request.kind, request.signed)
            reply = await self._agent.obey(command)
            await stream.send_message(CommandReply(body=json.dumps(reply)))
        except ResplitError as error:
            self._count(error)
            await self._bear(caller_of(stream))
            await stream.send_message(CommandReply(error=wire_message(error), error_kind=wire_word(error)))

    async def Report(self, stream: ServedCall) -> None:  # noqa: N802
        """Answer with the node's state and its telemetry rows since the last report."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        self._agent.probe.refresh()
        rows, last = self._agent.probe.rows_after(request.after)
        report = NodeReport(replace(self._agent.probe.state(), refusals=dict(self._refusals)), rows, time.time())
        await stream.send_message(ReportReply(body=to_json(report, inf_nan_mode="constants").decode(), last=last))

    async def Measure(self, stream: ServedCall) -> None:  # noqa: N802
        """Measure links now, and answer at the end. Reports have the results."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        await self._agent.probe.measure(set(request.nodes))
        await stream.send_message(MeasureReply())

    async def Echo(self, stream: ServedCall) -> None:  # noqa: N802
        """Answer over the emulated link back to the caller: at once, if it has not asked very often."""
        await receive_one(stream)
        caller = caller_of(stream)
        await self._bear(caller)
        await (self._agent.connections.links.get(caller) or EmulatedLink()).cross(0)
        await stream.send_message(EchoReply(absent_s=absent_s()))

    async def TransferCache(self, stream: ServedCall) -> None:  # noqa: N802
        """Send a session's caches to other nodes."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        try:
            await stream.send_message(await self._agent.caches.transfer(request))
        except ResplitError as error:
            await stream.send_message(TransferReply(error=str(error)))

    async def Permit(self, stream: ServedCall) -> None:  # noqa: N802
        """Accept of a session what the permit says; answer which positions of it are cached here."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        _ensure_short(request.session, *request.senders.values())
        try:
            lengths = await self._agent.caches.permit(request.session, Permit.from_wire(request), request.keep)
        except ResplitError as error:
            raise GRPCError(Status.FAILED_PRECONDITION, str(error)) from None
        await stream.send_message(PermitReply(lengths=lengths))

    async def Close(self, stream: ServedCall) -> None:  # noqa: N802
        """Free the caches of sessions."""
        _only_the_controller(stream)
        request = await receive_one(stream)
        self._agent.caches.close(list(request.sessions))
        await stream.send_message(CloseReply())

    def _refuse(self, error: ResplitError, stream: MessageStream[Any]) -> None:
        """Count a refused message. A member many of whose messages are refused is read more slowly."""
        self._count(error)
        if wait_s := self._patience[stream.member].note(time.monotonic()):
            stream.rest(wait_s)

    def _count(self, error: ResplitError) -> None:
        reason = wire_word(error)
        self._refusals[reason] += 1
        _log.warning("message refused", node=self._agent.name, reason=reason, error=str(error))

    async def _bear(self, caller: str) -> None:
        """Note a useless message of a member, and wait if it sends many of them."""
        await asyncio.sleep(self._patience[caller].note(time.monotonic()))

    def _verified(self, kind: str, signed: str) -> NodeCommand:
        command = self._verifier.verify(signed, kind=kind, current_epoch=self._agent.hosting.committed)
        return parse_command(command.kind, command.body)


async def serve_node(
    name: str,
    cluster: ClusterConfig,
    keys: Path,
    registry_url: str,
    listen: Address,
    stop: asyncio.Event,
    service: Callable[[Agent, signing.CommandVerifier], NodeService] = NodeService,
    kept: Path | None = None,
) -> None:
    """Run one node until `stop` is set. Shards of blocks that stand by lie in the folder `kept`, if it is given.

    ConfigError if it cannot listen at the address `listen`, or if `keys` are another member's. The error of a vital
    task if one fails.
    """
    member = Member.load_as(name, keys)
    preload(cluster.engine)

    def unwrap(wrapped: bytes, shard: str) -> bytes:
        return unwrap_key(wrapped, member.wrap_key or b"", node=name, shard=shard)

    agent = Agent(name, cluster, member, KeptShards(Registry(registry_url), kept), unwrap)
    listener = Listener(listen, STRANGERS + PER_MEMBER * (len(cluster.nodes) + 1))
    served = service(agent, signing.CommandVerifier(member))
    server = MemberServer([served], _streams(served), served.arriving, listener)
    await server.listen(member)
    _log.info("node is listening", node=name, address=str(listen), emulated=agent.hosting.hardware is not None)
    tasks = VitalTasks()
    tasks.spawn(agent.probe.run(), "probe")
    try:
        await until_stopped(stop, tasks, agent.hosting.tasks)
    finally:
        await tasks.stop()
        server.close()
        await agent.disconnect()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 2.0)


def _streams(served: NodeService) -> dict[str, Streams]:
    """What connections carry other than gRPC, by the protocol of their TLS handshake."""
    return {
        CALLS: Streams(Call, served.calls, MOST_CALL_BYTES),
        STEPS: Streams(Step, served.steps),
        CACHES: Streams(CachePart, served.parts),
        TOKENS: Streams(TokensRequest, served.tokens),
    }


def _name(path: str) -> str:
    """The name of a call, in the path that gRPC gives it."""
    return path.rpartition("/")[2]


def _only_the_controller(stream: Stream[Any, Any] | ServedCall) -> str:
    """The caller's name. GRPCError unless it is the controller, in whose process the gateway runs."""
    caller = caller_of(stream)
    if caller != CONTROLLER:
        raise GRPCError(Status.PERMISSION_DENIED, f"{caller} may not make this call; only {CONTROLLER} may")
    return caller


def _ensure_short(*names: str) -> None:
    """INVALID_ARGUMENT for a name that is too long: names are stored and logged."""
    if not _are_short(*names):
        raise GRPCError(Status.INVALID_ARGUMENT, _TOO_LONG)


def _are_short(*names: str) -> bool:
    return all(len(name) <= _LONGEST_NAME_CHARS for name in names)
