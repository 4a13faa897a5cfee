"""One node, assembled from its parts, and the controller's commands to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from resplit.config import ClusterConfig
from resplit.node.block_timing import time_block
from resplit.node.connections import Connections
from resplit.node.executor import Executor
from resplit.node.hosting import Hosting
from resplit.node.passes import Passes
from resplit.node.probe import Probe
from resplit.node.session_caches import SessionCaches
from resplit.security.identity import Member
from resplit.shards.registry import Registry
from resplit.wire.links import Shape
from resplit.wire.peers import Address
from resplit.wire.routes import Route

Body = dict[str, Any]


class Agent:
    """The node `name`. `member` holds its credentials; `unwrap` opens a data key that was wrapped for it."""

    def __init__(
        self,
        name: str,
        cluster: ClusterConfig,
        member: Member,
        registry: Registry,
        unwrap: Callable[[bytes, str], bytes],
    ) -> None:
        self.name = name
        self.connections = Connections(name, cluster, member)
        self.hosting = Hosting(name, cluster, registry, unwrap)
        self.passes = Passes(name, self.hosting, self.connections)
        self.caches = SessionCaches(self.hosting, self.connections)
        self.probe = Probe(name, self.hosting, self.connections)
        self.connections.on_lost = self.passes.lost
        self.connections.on_crossing = self.probe.crossed
        self.commands: dict[str, Callable[[Body], Awaitable[Body]]] = {
            "prepare": self._prepare,
            "clear": self.hosting.clear,
            "commit": self.hosting.commit,
            "abort": self.hosting.abort,
            "release": self.hosting.release,
            "trust": self.hosting.trust,
            "emulate": self._emulate,
            "connect": self._connect,
            "profile": self._profile,
        }
        self._commanded = asyncio.Lock()

    async def obey(self, kind: str, body: Body) -> Body:
        """Carry out a command, after those that came before it; its answer. ResplitError says why it was refused."""
        async with self._commanded:
            return await self.commands[kind](body)

    async def disconnect(self) -> None:
        """Cancel the running passes, close every connection, and stop the executor."""
        await self.passes.cancel()
        await self.connections.disconnect()
        if self.hosting.executor:
            self.hosting.executor.close()

    async def _prepare(self, body: Body) -> Body:
        answer = await self.hosting.prepare(body)
        self.connections.connect(Route.from_json(body["route"]).addresses)
        return answer

    async def _connect(self, body: Body) -> Body:
        """Take over addresses, links and trust from a controller, free the caches of ended sessions, measure links."""
        await self.hosting.trust(body)
        shapes = {name: Shape(**shape) for name, shape in body["links"].items()}
        self.connections.connect({name: Address.parse(text) for name, text in body["addresses"].items()}, shapes)
        self.caches.close_except(body["sessions"])
        await self.probe.echo_all()
        return {}

    async def _emulate(self, body: Body) -> Body:
        """Change the emulated hardware and links; refused on real hardware."""
        self.hosting.change_hardware(body.get("slowdown"), body.get("background_utilization"))
        self.connections.reshape(body.get("links", {}))
        return {}

    async def _profile(self, body: Body) -> Body:
        """Time blocks (capacity profiling)."""
        answer = await self.hosting.profile(body, self._time_block)
        self.probe.sample()
        return answer

    async def _time_block(self, executor: Executor, block: int) -> None:
        seconds = await time_block(executor, block)
        if executor.engine.kinds[block] in ("layer", "attention"):
            self.probe.note_reference(seconds)
