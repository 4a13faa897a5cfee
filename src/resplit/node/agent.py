"""What a node is between messages: epochs and their routes, blocks, and the passes that go through it.

The wire (server) and the measuring (probe) stand beside it; it decides nothing about placements, it obeys commands.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from resplit.cancellation import cancel_and_wait
from resplit.config import ClusterConfig
from resplit.errors import CapacityError, CommandRefusedError, DataError, NodeLostError, ResplitError, wire_word
from resplit.garbage import freeze_startup_objects
from resplit.model.engine import ModelSpec, TorchEngine
from resplit.node.emulation import Hardware
from resplit.node.executor import Executor, SegmentPass
from resplit.security.identity import Member
from resplit.shards.registry import Registry
from resplit.shards.sealing import open_shard
from resplit.types import Sampling
from resplit.wire.links import Link, Sender, Shape
from resplit.wire.node_pb2 import CachePart, Step, Token, TransferReply, TransferRequest
from resplit.wire.peers import BACKGROUND_BYTES, CHUNK_BYTES, Address, Crossing, Peer, from_wire, to_wire
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)


@dataclass
class Agent:
    """One node. `member` holds its credentials; `unwrap` opens a data key that was wrapped for it."""

    name: str
    cluster: ClusterConfig
    member: Member
    registry: Registry
    unwrap: Callable[[bytes, str], bytes]
    crossings: Callable[[Crossing], None] = lambda crossing: None
    routes: dict[int, Route] = field(default_factory=dict)
    prepared: dict[int, Route] = field(default_factory=dict)
    committed: int = 0
    executor: Executor | None = None
    gateways: dict[str, Sender[Token]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = self.cluster.node(self.name)
        self.trusted = self.name in self.cluster.trusted
        self.memory_bytes = config.memory
        self.hardware = Hardware.declared(config.emulate) if config.emulate else None
        self.links = {name: self._link(name) for name in self.cluster.node_names if name != self.name}
        self.peers: dict[str, Peer] = {}
        self._spec: ModelSpec | None = None
        self._private: frozenset[int] = frozenset()
        self._cleared: frozenset[int] = frozenset()  # blocks whose weights are gone and whose caches are not, yet
        self._aborted = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def link_to_gateway(self) -> Link:
        """The way back to the gateway, which stands on the source node."""
        return self.links.get(self.cluster.source) or Link()

    def connect(self, addresses: dict[str, Address], shapes: Mapping[str, Shape] | None = None) -> None:
        """Know where the other nodes listen; a changed address makes a new connection.

        `shapes` of emulated links to nodes that the cluster file did not have when this one started.
        """
        for name, address in addresses.items():
            known = self.peers.get(name)
            if name != self.name and (known is None or known.address != address):
                link = self.links.setdefault(name, Link((shapes or {}).get(name)))
                context = self.member.client_context()
                self.peers[name] = Peer(name, address, context, link, self.crossings, self._lost)

    async def prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        """Fetch and load the blocks that an epoch wants here and that are not here yet; nothing serves them yet.

        Where the epoch replaces the current one (`replace_current`), the blocks of the current one are dropped first.

        Raises CommandRefusedError for a private block on a node that is not trusted and, as "insufficient_memory",
        where the blocks fit, but not beside what is held; CapacityError and ShardError where a block cannot be held or
        opened. Then nothing new stays loaded.
        """
        route = Route.from_json(body["route"])
        if route.epoch <= self._aborted:  # the order was on its way for long
            raise CommandRefusedError("stale", f"epoch {route.epoch} was aborted")
        await self._ensure_executor(body["model"])
        blocks = route.blocks_of(self.name)
        self._private = frozenset(body["private"])
        if not self.trusted and (forbidden := [b for b in blocks if b in body["private"]]):
            raise CommandRefusedError("privacy", f"{self.name} is not trusted and may not hold blocks {forbidden}")
        if body["replace_current"]:
            self.routes, self.prepared = {}, {}
            # The caches stay, as copies: from here they are carried to the new nodes.
            self._drop_unwanted(but=blocks, drop=self._running().engine.unload)
        self._running().expected = frozenset(blocks)
        self._ensure_room(blocks, body["kv_tokens"])
        self.connect(route.addresses)
        loaded = await self._load(blocks, body["shards"])
        self.prepared[route.epoch] = route
        return {"loaded": loaded}

    async def clear(self, body: dict[str, Any]) -> dict[str, Any]:
        """Make room for an epoch that fits only without what is held: drop the weights that it does not want here.

        Nothing is served from then on. The caches stay, to be carried away, until the epoch is prepared or aborted.
        """
        wanted, engine = Route.from_json(body["route"]).blocks_of(self.name), self._running().engine
        self.routes, self.prepared = {}, {}
        self._cleared = frozenset(engine.blocks) - frozenset(wanted)
        self._running().expected = frozenset(wanted)
        for block in self._cleared:
            engine.unload(block)
        return {"cleared": sorted(self._cleared)}

    async def trust(self, body: dict[str, Any]) -> dict[str, Any]:
        """Be trusted from now on, or not: then what is private is dropped at once, whatever it serves."""
        self.trusted, self._private = bool(body["trusted"]), frozenset(body["private"])
        if self.trusted:
            return {}
        mine = {number: set(route.blocks_of(self.name)) for number, route in (self.routes | self.prepared).items()}
        forbidden = {number for number, blocks in mine.items() if blocks & self._private}
        self.routes = {number: route for number, route in self.routes.items() if number not in forbidden}
        self.prepared = {number: route for number, route in self.prepared.items() if number not in forbidden}
        if self.executor:
            for block in self._private:
                self.executor.engine.drop(block)
        return {"ended": sorted(forbidden)}

    async def commit(self, body: dict[str, Any]) -> dict[str, Any]:
        """Serve a prepared epoch from now on; those before it go on until they are released."""
        epoch = int(body["epoch"])
        route = self.prepared.pop(epoch, None) or self.routes.get(epoch)
        if route is None:
            raise CommandRefusedError("unprepared", f"epoch {epoch} was not prepared here")
        self.routes[epoch] = route
        self.committed = max(self.committed, epoch)
        return {}

    async def abort(self, body: dict[str, Any]) -> dict[str, Any]:
        """Forget a prepared epoch and free what only it wanted."""
        self.prepared.pop(int(body["epoch"]), None)
        self._aborted = max(self._aborted, int(body["epoch"]))
        return {"dropped": self._drop_unwanted()}

    async def release(self, body: dict[str, Any]) -> dict[str, Any]:
        """End every epoch before `epoch`, those that were only prepared too, and free what only they wanted."""
        oldest = int(body["epoch"])
        self.routes = {number: route for number, route in self.routes.items() if number >= oldest}
        self.prepared = {number: route for number, route in self.prepared.items() if number >= oldest}
        return {"dropped": self._drop_unwanted()}

    async def profile(self, body: dict[str, Any], timed: Callable[[int], Awaitable[None]]) -> dict[str, Any]:
        """Load blocks one at a time, have each `timed`, and drop it unless an epoch wants it."""
        await self._ensure_executor(body["model"])
        for block in body["blocks"]:
            if block in body["private"] and not self.trusted:
                raise CommandRefusedError("privacy", f"{self.name} is not trusted and may not hold block {block}")
            try:
                await self._load((block,), body["shards"])
                await timed(block)
            finally:
                self._drop_unwanted()
        return {}

    async def emulate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Change the emulated hardware or links; refused on real ones."""
        if self.hardware is None:
            raise CommandRefusedError("real", f"{self.name} is real hardware; it plays no other")
        self.hardware = self.hardware.changed(body.get("slowdown"), body.get("background_utilization"))
        if self.executor:
            self.executor.hardware = self.hardware
        for name, shape in body.get("links", {}).items():
            self.links[name].shape = Shape(shape["latency_s"], shape["bandwidth_bytes_per_s"])
        return {}

    def accept(self, step: Step) -> None:
        """Take a step: run its segment and send the result on, in a task of its own."""
        task = asyncio.create_task(self._serve(step))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def take_cache(self, part: CachePart) -> None:
        """Put a part of a session's cache of one block in its place."""
        if not self.trusted and part.block in self._private:
            raise CommandRefusedError("privacy", f"{self.name} is not trusted and may hold no cache of {part.block}")
        values = from_wire(part.values)
        self._running().take_cache(part.session, part.block, part.first, part.capacity, values, part.attempt)

    async def transfer_cache(self, request: TransferRequest) -> TransferReply:
        """Push positions `first..last-1` of a session's caches to the nodes that `target` names for its blocks."""
        executor = self._running()
        executor.ensure_current(request.session, request.attempt)
        engine = executor.engine
        leaving: dict[str, list[int]] = {}
        for block, name in enumerate(request.target[: len(engine.features)]):
            if name and engine.has_cache(block):
                leaving.setdefault(name, []).append(block)
        peers = [self._peer(name) for name in leaving]
        pushes = [self._push(peer, request, blocks) for peer, blocks in zip(peers, leaving.values(), strict=True)]
        return TransferReply(bytes=sum(await asyncio.gather(*pushes)))

    async def begin_attempt(self, session: str, attempt: int) -> dict[int, int]:
        """A session is tried again: older attempts are refused from now on. The positions held of it, by block."""
        return await self.executor.begin_attempt(session, attempt) if self.executor else {}

    def close_sessions(self, sessions: list[str]) -> None:
        """Free the caches of these sessions."""
        if self.executor:
            for session in sessions:
                self.executor.end(session)

    def close_all_sessions_but(self, known: set[str]) -> None:
        """Free the caches of sessions that the gateway does not know any more."""
        if self.executor:
            self.close_sessions(sorted(self.executor.sessions() - known))

    async def disconnect(self) -> None:
        """Cancel what runs and close every connection."""
        await cancel_and_wait(self._tasks)
        await asyncio.gather(*(peer.disconnect() for peer in self.peers.values()))
        if self.executor:
            self.executor.close()

    async def _serve(self, step: Step) -> None:
        try:
            await self._forward(step, await self._compute(step))
        except ResplitError as error:
            self._answer(step, error=error)
        except Exception as error:
            # A defect must not leave the gateway waiting for an answer that never comes.
            _log.exception("a pass broke", node=self.name, session=step.session)
            self._answer(step, error=error)

    async def _compute(self, step: Step) -> Any:
        route = self.routes.get(step.epoch)
        if route is None or step.segment >= len(route.segments) or route.segments[step.segment].node != self.name:
            raise self._stale(step)
        segment = route.segments[step.segment]
        last = step.segment == len(route.segments) - 1
        drawn = Sampling(step.sampling.temperature, step.sampling.top_p, step.sampling.seed)
        values = from_wire(step.values)
        work = SegmentPass(
            step.session,
            segment.first,
            segment.last,
            step.start,
            step.capacity,
            values,
            drawn if last else None,
            step.attempt,
        )
        try:
            return await self._running().run(work)
        except DataError as error:
            if self.routes.get(step.epoch) is route:
                raise
            raise self._stale(step) from error  # its blocks were dropped meanwhile

    async def _forward(self, step: Step, result: Any) -> None:
        if isinstance(result, int):
            self._answer(step, token_id=result)
            return
        onward = Step()
        onward.CopyFrom(step)
        onward.segment += 1
        onward.values.CopyFrom(to_wire(result))
        route = self.routes.get(step.epoch)
        if route is None:  # ended meanwhile
            raise self._stale(step)
        self.peers[route.segments[onward.segment].node].send(onward)

    def _stale(self, step: Step) -> CommandRefusedError:
        return CommandRefusedError("stale", f"{self.name} serves no segment {step.segment} of epoch {step.epoch}")

    def _answer(self, step: Step, token_id: int = 0, error: Exception | None = None) -> None:
        """Send the token, or the error, to the gateway that asked."""
        # Of a step that failed, only where it began is sure to be a position at all.
        position = step.start if error is not None else step.start + step.values.shape[1]
        token = Token(session=step.session, epoch=step.epoch, position=position, token_id=token_id, node=self.name)
        token.attempt = step.attempt
        if error is not None:
            token.error, token.error_kind = str(error), wire_word(error)
            _log.warning("a pass failed", node=self.name, session=step.session, epoch=step.epoch, error=str(error))
        gateway = self.gateways.get(step.gateway)
        if gateway is None:
            _log.warning("no gateway to answer", node=self.name, gateway=step.gateway, session=step.session)
            return
        with contextlib.suppress(CapacityError):
            gateway.put(token, 4)

    def _lost(self, peer: str, steps: list[Step]) -> None:
        for step in steps:
            self._answer(step, error=NodeLostError(f"{self.name} lost {peer} with a step on its way"))

    async def _ensure_executor(self, model: dict[str, Any]) -> None:
        spec = ModelSpec(model["config"], model["dtype"], model["split"])
        if self.executor is None:
            engine = await asyncio.to_thread(TorchEngine, spec)
            self.executor = Executor(engine, self.memory_bytes, self.hardware, self.cluster.kv_tokens)
            self._spec = spec
            freeze_startup_objects()
        elif spec != self._spec:
            raise CommandRefusedError("model", f"{self.name} already runs another model; restart it to change")

    def _ensure_room(self, blocks: tuple[int, ...], kv_tokens: float) -> None:
        """Weights and reserved caches of everything that would then be held must fit under the ceiling."""
        engine = self._running().engine

        def more_bytes(held: set[int]) -> float:
            features = [engine.features[block] for block in held]
            return sum(f.weight_bytes + kv_tokens * f.kv_bytes_per_token for f in features) - self.memory_bytes

        if (more := more_bytes(set(blocks))) > 0:
            raise CapacityError(f"its blocks need {more / 2**20:.1f} MiB more than {self.name} has")
        if (more := more_bytes(set(blocks) | set(engine.blocks))) > 0:
            raise CommandRefusedError(
                "insufficient_memory",
                f"old and new blocks together need {more / 2**20:.1f} MiB more than {self.name} has",
            )

    async def _load(self, blocks: tuple[int, ...], shards: dict[str, dict[str, str]]) -> list[int]:
        executor = self._running()
        absent = [block for block in blocks if block not in executor.engine.blocks]
        try:
            for block in absent:
                shard = shards[str(block)]
                key = self.unwrap(bytes.fromhex(shard["key"]), shard["name"])
                sealed = await asyncio.to_thread(self.registry.get, shard["name"])
                tensors = await asyncio.to_thread(open_shard, sealed, key)
                await asyncio.to_thread(executor.load, block, tensors)
        except (ResplitError, KeyError):
            self._drop_unwanted()
            raise
        return absent

    def _drop_unwanted(self, but: tuple[int, ...] = (), drop: Callable[[int], None] | None = None) -> list[int]:
        executor = self.executor
        if executor is None:
            return []
        routes = [*self.routes.values(), *self.prepared.values()]
        wanted = {block for route in routes for block in route.blocks_of(self.name)} | set(but)
        unwanted = sorted((self._cleared | set(executor.engine.blocks)) - wanted)
        self._cleared = executor.expected = frozenset()
        for block in unwanted:
            (drop or executor.engine.drop)(block)
        return unwanted

    async def _push(self, peer: Peer, request: TransferRequest, blocks: list[int]) -> int:
        """Push a session's caches of these blocks to another node; the bytes sent."""
        if not request.background:
            return await peer.cache(list(self._parts(request, blocks, CHUNK_BYTES)))
        return await peer.cache_in_background(self._parts(request, blocks, BACKGROUND_BYTES))

    def _parts(self, request: TransferRequest, blocks: list[int], most_bytes: int) -> Iterator[CachePart]:
        engine = self._running().engine
        for block in blocks:
            stride = max(1, int(most_bytes / engine.features[block].kv_bytes_per_token))
            capacity = engine.capacity(request.session, block)
            for first in range(request.first, request.last, stride):
                values = engine.export_cache(request.session, block, first, min(first + stride, request.last))
                yield CachePart(
                    session=request.session,
                    attempt=request.attempt,
                    block=block,
                    first=first,
                    capacity=capacity,
                    values=to_wire(values),
                )

    def _peer(self, name: str) -> Peer:
        if name not in self.peers:
            raise DataError(f"{self.name} knows no {name!r} to send a cache to")
        return self.peers[name]

    def _running(self) -> Executor:
        if self.executor is None:
            raise DataError(f"{self.name} holds no model yet")
        return self.executor

    def _link(self, other: str) -> Link:
        shape = self.cluster.link(self.name, other)
        return Link(Shape(shape.latency, shape.bandwidth) if shape else None)
