"""One node, assembled from its parts, and the controller's commands to it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from resplit.config import ClusterConfig
from resplit.node.block_timing import time_block
from resplit.node.connections import Connections
from resplit.node.executor import Executor
from resplit.node.hosting import Hosting
from resplit.node.passes import Passes
from resplit.node.probe import Probe
from resplit.node.session_caches import SessionCaches
from resplit.security.identity import Member
from resplit.shards.kept import KeptShards
from resplit.wire.commands import (
    MOST_SESSIONS,
    Abort,
    Clear,
    Commit,
    Connect,
    Emulate,
    NodeCommand,
    Prepare,
    Profile,
    Recall,
    Release,
    Reply,
    Standby,
    Trust,
)


class Agent:
    """The node `name`. `member` holds its credentials; `unwrap` opens a data key that was wrapped for it."""

    def __init__(
        self,
        name: str,
        cluster: ClusterConfig,
        member: Member,
        shards: KeptShards,
        unwrap: Callable[[bytes, str], bytes],
    ) -> None:
        self.name = name
        self.connections = Connections(name, cluster, member)
        self.hosting = Hosting(name, cluster, shards, unwrap)
        self.passes = Passes(name, self.hosting, self.connections)
        self.caches = SessionCaches(self.hosting, self.connections)
        self.probe = Probe(name, self.hosting, self.connections)
        self.connections.on_lost = self.passes.lost
        self.connections.on_crossing = self.probe.crossed
        self.probe.on_news = self.passes.tell_news
        self._command_lock = asyncio.Lock()

    async def obey(self, command: NodeCommand) -> Reply:
        """Carry out a command after all earlier ones, and return the reply. ResplitError if the command is refused."""
        async with self._command_lock:
            match command:
                case Prepare():
                    return await self._prepare(command)
                case Standby():
                    return await self.hosting.stand_by(command)
                case Clear():
                    return await self.hosting.clear(command)
                case Commit():
                    return await self.hosting.commit(command)
                case Abort():
                    return await self.hosting.abort(command)
                case Release():
                    return await self.hosting.release(command)
                case Recall():
                    return await self.hosting.recall(command)
                case Connect():  # before Trust, which it extends
                    return await self._connect(command)
                case Trust():
                    return await self.hosting.trust(command)
                case Profile():
                    return await self._profile(command)
                case Emulate():
                    return await self._emulate(command)

    async def disconnect(self) -> None:
        """Cancel the running passes, close every connection, and stop the executor."""
        await self.passes.cancel()
        await self.connections.disconnect()
        if self.hosting.executor:
            self.hosting.executor.close()
        await self.hosting.tasks.stop()

    async def _prepare(self, command: Prepare) -> Reply:
        answer = await self.hosting.prepare(command)
        self.connections.connect(command.route.addresses)
        return answer

    async def _connect(self, command: Connect) -> Reply:
        """Adopt addresses, links and trust, measure the links, and tell of which sessions something is held."""
        await self.hosting.trust(command)
        self.connections.connect(command.addresses, command.links)
        await self.connections.forget_except(command.addresses.keys())
        await self.probe.echo_all()
        return {"sessions": sorted(self.caches.sessions())[:MOST_SESSIONS]}

    async def _emulate(self, command: Emulate) -> Reply:
        """Change the emulated hardware and links, or end this process; refused on real hardware."""
        self.hosting.change_hardware(command.slowdown, command.background_utilization)
        if command.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        self.connections.set_links(command.links)
        return {}

    async def _profile(self, command: Profile) -> Reply:
        """Time blocks (capacity profiling)."""
        answer = await self.hosting.profile(command, self._time_block)
        self.probe.sample()
        return answer

    async def _time_block(self, executor: Executor, block: int) -> None:
        seconds = await time_block(executor, block)
        if executor.engine.kinds[block] in ("layer", "attention"):
            self.probe.note_reference(seconds)
