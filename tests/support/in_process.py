"""A cluster on the test's own event loop: real nodes with TLS sockets, keys, sealed shards and signed commands.

Faster than node processes, and open to inspection. For a cluster of processes, see `cluster`.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resplit.cluster.local import free_ports
from resplit.config import ClusterConfig
from resplit.control.controller import Controller
from resplit.control.log import EpochLog
from resplit.epochs import Proposal
from resplit.gateway.sessions.manager import Sessions
from resplit.gateway.sessions.router import Router
from resplit.model.source import StoredModel
from resplit.node.server import NodeService, serve_node
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER, Member
from resplit.security.signing import CommandSigner
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from resplit.shards.sealing import wrap_key
from resplit.status import ReportedState
from resplit.wire.addresses import Address
from resplit.wire.commands import Prepare, Reply, WrappedShard, to_body
from resplit.wire.peers import Peer
from resplit.wire.permits import Permit
from resplit.wire.routes import Route
from tests.support.tcp_proxy import TcpProxy

_made = tempfile.TemporaryDirectory(prefix="resplit-tests-")


def _keys_and_shards(names: Sequence[str], model: StoredModel) -> Path:
    """A folder with the keys of these nodes and the sealed shards, made once: it takes long to sync so many files."""
    folder = Path(_made.name) / model.folder.name / ",".join(names)
    if not folder.exists():
        keys_command(folder / "keys", names)
        package(model, Registry(str(folder / "registry")), Keyring(folder / "keyring.json"))
    return folder


class InProcessCluster:
    """Nodes, gateway and controller on one event loop. Each node is reached through a TCP proxy."""

    def __init__(self, config: ClusterConfig, model: StoredModel, folder: Path) -> None:
        self.config, self.model, self.folder = config, model, folder
        shutil.copytree(_keys_and_shards(tuple(config.node_names), model), folder, dirs_exist_ok=True)
        self.member = Member.load(folder / "keys" / CONTROLLER)
        self.keyring = Keyring(folder / "keyring.json")
        ports = iter(free_ports(2 * len(config.nodes)))
        self.addresses = {name: Address("127.0.0.1", next(ports)) for name in config.node_names}
        self.inside = {name: Address("127.0.0.1", next(ports)) for name in config.node_names}
        self.proxies = {name: TcpProxy(self.addresses[name], self.inside[name]) for name in config.node_names}
        self.features = model.features(config.private_layers)
        self.private = frozenset(index for index, block in enumerate(self.features) if block.private)
        self.start_gateway()
        self.signer = CommandSigner(self.member)
        self._running: dict[str, tuple[asyncio.Event, asyncio.Task[None]]] = {}
        self.cleanup = contextlib.ExitStack()

    def start_gateway(self) -> None:
        """Start a gateway without sessions: the first one, or the next one after a crash."""
        self.router = Router(self.config, self.member, self.model.spec.vocabulary)
        self.sessions = Sessions(self.config, self.router, self.features)

    async def start(self, name: str, service: Callable[..., Any] = NodeService) -> None:
        """Start one node and wait until the gateway receives its tokens. `service` replaces that of an honest node."""
        stop, keys, registry = asyncio.Event(), self.folder / "keys" / name, str(self.folder / "registry")
        serving = serve_node(name, self.config, keys, registry, self.inside[name], stop, service)
        self._running[name] = stop, asyncio.create_task(serving)
        await self.proxies[name].open()
        self.router.connect({name: self.addresses[name]})
        await self.router.wait_for({name}, 10)

    async def stop(self, name: str) -> None:
        """End one node. Its connections break and its caches are lost."""
        self.proxies[name].close()
        stop, task = self._running.pop(name)
        stop.set()
        await task

    async def stop_all(self) -> None:
        await self.router.disconnect()
        for name in list(self._running):
            await self.stop(name)

    def break_connections(self, name: str) -> None:
        """Break every connection to a node. New ones can be made at once."""
        self.proxies[name].break_connections()

    def peer(self, name: str) -> Peer:
        return self.router.peers[name]

    def route(self, placement: Sequence[str], epoch: int) -> Route:
        return Route(epoch, tuple(placement), dict(self.addresses))

    async def permit(self, node: str, session: str, **fields: Any) -> dict[int, int]:
        """Let a node accept passes of a session in epoch 1, or what `fields` of the permit say.

        Returns the positions that it holds of the session, by block, if an attempt begins.
        """
        permit = replace(Permit(attempt=0, capacity=64, epochs=frozenset({1})), **fields)
        return await self.peer(node).permit(session, permit, keep=True)

    async def command(self, node: str, kind: str, body: dict[str, Any], epoch: int = 1) -> Reply:
        """Send one signed command."""
        peer = self.peer(node)
        return await peer.command(kind, self.signer.sign(kind, body, audience=peer.audience, epoch=epoch))

    async def state(self, node: str) -> ReportedState:
        """The node's state as it reports it now."""
        report, _ = await self.peer(node).report(0)
        return report.state

    async def rows(self, node: str, table: str) -> list[dict[str, Any]]:
        """A node's telemetry."""
        report, _ = await self.peer(node).report(0)
        return [asdict(row) for row in getattr(report.rows, table)]

    def prepare_body(self, node: str, placement: Sequence[str], epoch: int, kv_tokens: int = 64) -> dict[str, Any]:
        """The body of a prepare command."""
        shards = {block: self._shard(node, block) for block, name in enumerate(placement) if name == node}
        route = self.route(placement, epoch)
        return to_body(Prepare(route, False, self.model.spec, self.private, kv_tokens, shards))

    def connect_body(self, addresses: dict[str, str]) -> dict[str, Any]:
        """The body of a connect command, for a trusted node."""
        return {"addresses": addresses, "links": {}, "sessions": [], "trusted": True, "private": []}

    def _shard(self, node: str, block: int) -> WrappedShard:
        entry = self.keyring[self.features[block].name]
        wrapped = wrap_key(entry.key, self.member.public_wrap_key(node), node=node, shard=entry.shard)
        return WrappedShard(entry.shard, entry.sealed_bytes, wrapped)

    def controller(self, log: EpochLog | None = None, peers: Mapping[str, Peer] | None = None) -> Controller:
        """A controller that is notified of lost and returned nodes. By default its log is in the folder."""
        log = log or self.cleanup.enter_context(contextlib.closing(EpochLog(self.folder / "epochs.db")))
        controller = Controller(
            self.config,
            self.model,
            self.member,
            self.keyring,
            log,
            self.router.peers if peers is None else peers,
            self.addresses,
            self.sessions,
            self.folder,
        )
        self.sessions.on_settled = controller.deployment.sessions_left
        self.sessions.on_lost = controller.node_lost
        self.router.on_found = controller.node_found
        return controller


async def deploy(controller: Controller, placement: Sequence[str]) -> None:
    """Deploy a placement, planned against the live epoch."""
    live = controller.live.epoch if controller.live else 0
    await controller.deploy(Proposal(tuple(placement), "re-split", live))


@contextlib.asynccontextmanager
async def in_process(
    config: ClusterConfig, model: StoredModel, folder: Path, services: Mapping[str, Callable[..., Any]] | None = None
) -> AsyncIterator[InProcessCluster]:
    """Run all nodes of `config`. `services` replaces those of some nodes."""
    cluster, others = InProcessCluster(config, model, folder), services or {}
    try:
        await asyncio.gather(*(cluster.start(name, others.get(name, NodeService)) for name in config.node_names))
        yield cluster
    finally:
        await cluster.stop_all()
        cluster.cleanup.close()


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 30.0) -> None:
    """Await a condition again and again until it holds; TimeoutError if it does not hold in time."""
    async with asyncio.timeout(timeout_s):
        while not await condition():  # noqa: ASYNC110 - the state is another node's; there is no event to wait for
            await asyncio.sleep(0.01)
