"""Commands to nodes: builds the content of each command, signs and sends it, and collects the replies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence

import structlog

from resplit.control.rules import PlacementRules
from resplit.errors import NodeLostError, ResplitError
from resplit.model.source import StoredModel
from resplit.security.identity import Member
from resplit.security.signing import CommandSigner
from resplit.shards.keyring import Keyring
from resplit.shards.sealing import wrap_key
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from resplit.wire.commands import Connect, NodeCommand, Prepare, Profile, Reply, Trust, WrappedShard, to_body
from resplit.wire.links import Shape
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)


class NodeCommands:
    """Builds, signs and sends commands. `epoch` is the epoch for which they are signed."""

    def __init__(self, model: StoredModel, member: Member, keyring: Keyring, peers: Mapping[str, Peer]) -> None:
        self._model = model
        self._member = member
        self._keyring = keyring
        self._peers = peers
        self._signer = CommandSigner(member)

    async def send(self, commands: Mapping[str, NodeCommand], epoch: int) -> dict[str, Reply | BaseException]:
        """Send each node its command, all at once. Returns the reply of each node, or its error."""
        calls = [self._send(self._peers[node], command, epoch) for node, command in commands.items()]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return dict(zip(commands, answers, strict=True))

    async def require(self, commands: Mapping[str, NodeCommand], epoch: int) -> dict[str, Reply]:
        """Send as `send` does, and return the replies. Raises the first error once all nodes have answered."""
        replies = {}
        for node, answer in (await self.send(commands, epoch)).items():
            if isinstance(answer, BaseException):
                raise answer
            replies[node] = answer
        return replies

    async def notify(self, commands: Mapping[str, NodeCommand], epoch: int) -> None:
        """Send as `send` does. If a node refuses or cannot be reached, that is logged and otherwise ignored."""
        for node, answer in (await self.send(commands, epoch)).items():
            if isinstance(answer, ResplitError):
                level = _log.info if isinstance(answer, NodeLostError) else _log.warning
                level("a command was not carried out", kind=commands[node].kind, node=node, error=str(answer))
            elif isinstance(answer, BaseException):
                raise answer

    def obeyed_epochs(self, nodes: Iterable[str]) -> dict[str, int]:
        """The highest epoch that each node had obeyed when it was connected."""
        hellos = {node: self._peers[node].hello for node in nodes}
        return {node: hello.epoch for node, hello in hellos.items() if hello}

    def prepare(self, node: str, route: Route, rules: PlacementRules, replace_current: bool) -> Prepare:
        """The command that has a node load its blocks of a route."""
        shards = self._shards(node, route.blocks_of(node), rules.features)
        return Prepare(route, replace_current, self._model.spec, rules.private, rules.cluster.kv_tokens, shards)

    def profile(self, node: str, rules: PlacementRules) -> Profile:
        """The command that has a node time one block of each kind that it may hold.

        One block is enough, because blocks of a kind take equal times.
        """
        trusted = node in rules.cluster.trusted
        first_of_kind: dict[str, int] = {}
        for index, block in enumerate(rules.features):
            if trusted or not block.private:
                first_of_kind.setdefault(block.kind, index)
        blocks = tuple(sorted(first_of_kind.values()))
        return Profile(blocks, self._model.spec, rules.private, self._shards(node, blocks, rules.features))

    def connect(
        self, node: str, addresses: Mapping[str, Address], rules: PlacementRules, sessions: Sequence[str]
    ) -> Connect:
        """The command that has a node connect to the others, and drop the caches of all but these sessions."""
        links = {name: rules.cluster.link(node, name) for name in addresses if name != node}
        shapes = {name: Shape(link.latency, link.bandwidth) for name, link in links.items() if link}
        trusted = node in rules.cluster.trusted
        return Connect(trusted, rules.private, addresses, shapes, frozenset(sessions))

    def trust(self, node: str, rules: PlacementRules) -> Trust:
        """The command that says whether a node is trusted, and which blocks are private."""
        return Trust(node in rules.cluster.trusted, rules.private)

    async def _send(self, peer: Peer, command: NodeCommand, epoch: int) -> Reply:
        signed = self._signer.sign(command.kind, to_body(command), audience=peer.audience, epoch=epoch)
        return await peer.command(command.kind, signed)

    def _shards(self, node: str, blocks: Sequence[int], features: Sequence[BlockFeatures]) -> dict[int, WrappedShard]:
        """The shard of each block, its data key wrapped for this node alone."""
        public_key = self._member.public_wrap_key(node)
        shards = {}
        for block in blocks:
            entry = self._keyring[features[block].name]
            wrapped = wrap_key(entry.key, public_key, node=node, shard=entry.shard)
            shards[block] = WrappedShard(entry.shard, entry.sealed_bytes, wrapped)
        return shards
