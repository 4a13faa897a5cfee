"""Membership: introduce nodes to one another, bring returned nodes up to date, and have nodes measure themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Mapping, Sequence

import structlog

from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.node_commands import NodeCommands
from resplit.control.recovery import Recovery
from resplit.epochs import RECOVER, Proposal
from resplit.errors import CapacityError, ConfigError, NodeLostError, ProposalRefusedError, ResplitError
from resplit.wire.commands import Connect, Emulate, Reply
from resplit.wire.peers import Peer
from resplit.wire.routes import Route

_log = structlog.get_logger(__name__)


class Membership:
    """Connects, updates and profiles the nodes of one cluster."""

    def __init__(
        self,
        view: ClusterView,
        commands: NodeCommands,
        deployment: Deployment,
        recovery: Recovery,
        peers: Mapping[str, Peer],
    ) -> None:
        self._view = view
        self._commands = commands
        self._deployment = deployment
        self._recovery = recovery
        self._peers = peers
        self.introduced = False  # from then on, each node that answers is welcomed

    async def introduce(self) -> None:
        """Abort an unfinished epoch, then connect the nodes that answer to one another. Each measures its links."""
        await self._deployment.abort_unfinished()
        self.introduced = True
        replies = await self._commands.notify(self._connects(self._view.reachable), self._deployment.live_number)
        await self._close_ended(replies)

    async def welcome(self, name: str) -> None:
        """Connect a node that answers again. If it is not up to date, deploy the placement again."""
        try:
            replies = await self._commands.require(self._connects([name]), self._deployment.live_number)
            await self._close_ended(replies)
            up_to_date = await self._deployment.resync(name, self._commands.peer(name))
        except ResplitError as error:
            _log.warning("a node returned and was lost again", node=name, error=str(error))
            if not isinstance(error, NodeLostError):
                self._commands.fault(name, f"it cannot be connected: {error}")
            return
        self._view.gateway.welcome(name)
        await self._recovery.resume()
        live = self._deployment.live
        if live and not up_to_date:
            await self._deploy_again(name, live)
        await self._recovery.recover()

    async def _deploy_again(self, name: str, live: Route) -> None:
        """Have a node load the blocks of the live epoch again. Refused, for example on a full disk, it is an outage."""
        try:
            await self._deployment.deploy(Proposal(live.placement, RECOVER, live.epoch))
        except (ProposalRefusedError, CapacityError) as error:
            if self._deployment.live is live:
                self._deployment.broken = f"{name} has lost its blocks: {error}"

    async def profile(self, nodes: Collection[str] | None = None) -> None:
        """Have nodes (by default all) time one block of each kind that they may hold. Drained nodes are left out.

        A node that fails has no timings; those of the others count. Raises the first error if all nodes fail.
        """
        wanted = set(self._view.addresses if nodes is None else nodes) - self._view.rules.drained
        commands = {
            name: self._commands.profile(name, self._view.rules) for name in self._view.reachable if name in wanted
        }
        answers = await self._commands.send(commands, self._deployment.live_number)
        errors = {name: answer for name, answer in answers.items() if isinstance(answer, BaseException)}
        for name, error in errors.items():
            _log.warning("a node was not timed", node=name, error=str(error))
            if len(errors) == len(answers) or not isinstance(error, ResplitError):
                raise error

    async def send_trust(self) -> list[str]:
        """Send every node whether it is trusted.

        An untrusted node drops its private blocks, a drained node its stand-by blocks.
        Returns the nodes that have not answered in time.
        """
        commands = {name: self._commands.trust(name, self._view.rules) for name in self._view.reachable}
        drained = self._view.rules.drained.intersection(commands)
        unready = {name: self._commands.standby(name, (), self._view.rules) for name in drained}
        await self._deployment.tell(unready, self._deployment.live_number)
        return await self._deployment.tell(commands, self._deployment.live_number)

    async def emulate(self, node: str, change: Emulate) -> None:
        """Change the hardware or the links of an emulated node; ConfigError for an unknown node or link."""
        for name in (node, *change.links):
            self._check_known(name)
        if node in change.links:
            raise ConfigError(repr(node), "a link is between two nodes")
        await self._commands.require({node: change}, self._deployment.live_number)

    async def kill(self, node: str) -> None:
        """End the process of an emulated node as if it crashed; ConfigError for an unknown node.

        Returns once it has ended. CommandRefusedError on real hardware.
        """
        self._check_known(node)
        with contextlib.suppress(NodeLostError):  # it ends without an answer
            await self._commands.require({node: Emulate(kill=True)}, self._deployment.live_number)

    def _check_known(self, name: str) -> None:
        if name not in self._view.addresses:
            raise ConfigError(repr(name), f"not in this cluster; it has {', '.join(self._view.addresses)}")

    def _connects(self, nodes: Sequence[str]) -> dict[str, Connect]:
        view = self._view
        return {name: self._commands.connect(name, view.addresses, view.rules) for name in nodes}

    async def _close_ended(self, replies: Mapping[str, Reply]) -> None:
        """Have nodes free what they said to hold of sessions that do not run any more.

        A session runs here before a node hears of it. So one that began since the nodes replied is not among them.
        """
        running = set(self._view.gateway.session_names())
        ended = {name: sorted(set(reply.get("sessions", ())) - running) for name, reply in replies.items()}
        closing = [self._peers[name].close_sessions(sessions) for name, sessions in ended.items() if sessions]
        await asyncio.gather(*closing)
