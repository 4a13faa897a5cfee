"""Operations: drain, join, trust and a changed cluster file, on a running cluster and without lost requests.

Each operation makes a new desired state and applies it: first the rules, then a plan, then an epoch.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from resplit.config import ClusterFile
from resplit.control.controller import Controller
from resplit.control.desired_state import DesiredState, changes, load_desired_state, save_desired_state
from resplit.errors import ConfigError, DataError, InfeasibleError, ProposalRefusedError, ResplitError
from resplit.wire.addresses import Address

_log = structlog.get_logger(__name__)
_RELOCATE_TRIES = 3  # a plan is outdated if another epoch went live meanwhile
_SETTLE_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 10.0
_RECOVERS_WITHIN_S = 10.0  # while the registry is away, a recovery tries without end


class Network(Protocol):
    """The connections to the nodes."""

    def connect(self, addresses: dict[str, Address]) -> None:
        """Connect to nodes; a changed address replaces the connection."""
        ...

    def forget(self, names: set[str]) -> None:
        """End the connections to nodes."""
        ...

    async def wait_for(self, nodes: set[str], timeout_s: float) -> None:
        """Wait until these nodes answer; NodeLostError names the nodes that do not in time."""
        ...


class Operator:
    """Applies operations to one cluster. `content` is the cluster file at the start, as parsed from YAML.

    Every operation returns its changes, one sentence for each. `file` holds the desired state between restarts.
    """

    def __init__(self, controller: Controller, network: Network, content: ClusterFile, file: Path) -> None:
        self._view = controller.view
        self._planner = controller.planner
        self._deployment = controller.deployment
        self._recover = controller.recover
        self._membership = controller.membership
        self._member = controller.member
        self._network = network
        self._started_with = content
        self._file = file
        self._changing = asyncio.Lock()
        self.desired = load_desired_state(file, content)
        self._view.adopt(self.desired.cluster, self.desired.drained, addresses_of(self.desired))

    async def drain(self, node: str) -> list[str]:
        """Move everything off a node and stop using it.

        ProposalRefusedError if the other nodes cannot hold the model; then nothing is changed.
        """
        return await self._change(lambda desired: desired.with_drained(node))

    async def join(self, node: str) -> list[str]:
        """Let a drained node serve again. It gets blocks at once if a plan for the latest problem places some on it."""
        found = await self._change(lambda desired: desired.with_joined(node))
        if (live := self._deployment.live) and node not in live.placement:
            with contextlib.suppress(InfeasibleError, DataError, ProposalRefusedError):
                proposal = await self._planner.plan(live.placement, live.epoch, "join")
                if node in proposal.placement:
                    await self._deployment.deploy(proposal)
        return found

    async def trust(self, node: str, on: bool) -> list[str]:
        """Trust a node, or stop trusting it.

        A node without trust holds no private block when this returns, even if service ends.
        """
        return await self._change(lambda desired: desired.with_trust(node, on))

    async def apply(self, content: Mapping[str, Any]) -> list[str]:
        """Apply a changed cluster file. ConfigError names a key that cannot change on a running cluster."""
        return await self._change(lambda desired: desired.with_file(content))

    async def _change(self, revise: Callable[[DesiredState], DesiredState]) -> list[str]:
        async with self._changing:
            old, new = self.desired, revise(self.desired)
            found = changes(old, new)
            if not found:
                return []
            self._check(old, new)
            self._deployment.interrupt()  # commands would wait for a node that takes long to prepare
            found += await (self._enforce(new) if _narrows_trust(old, new) else self._follow(new))
            found += await self._introduce_added(old, new)
            _log.info("the cluster is changed", what="; ".join(found))
            return found

    def _check(self, old: DesiredState, new: DesiredState) -> None:
        """Refuse a change that the cluster cannot follow, before any of it is applied."""
        addresses_of(new)
        for name in set(new.cluster.node_names) - set(old.cluster.node_names):
            self._member.public_wrap_key(name)  # ConfigError if the node has no keys
        before, after = (set(desired.cluster.trusted) - desired.drained for desired in (old, new))
        if before and not after and not _narrows_trust(old, new):
            raise ProposalRefusedError(
                f"{', '.join(sorted(before))} is the last trusted node: no other may hold private blocks; "
                "trust another first (`resplit trust NODE on`)"
            )

    async def _follow(self, new: DesiredState) -> list[str]:
        """Apply a change while requests are served. First all blocks leave the nodes that the new state does not use.

        If that fails, nothing is changed. Returns a sentence for each part that is still pending.
        """
        old = self.desired
        before, after = addresses_of(old), addresses_of(new)
        moved = {name for name in after if name in before and before[name] != after[name]}
        # Nodes that leave, and those whose address changes, stay in the view: they still have caches to transfer.
        self._view.adopt(new.cluster, new.drained | moved, after | before)
        try:
            await self._membership.send_trust()
            await self._relocate("drain")
            self._save(new)
        except BaseException:
            self._view.adopt(old.cluster, old.drained, before)
            await self._membership.send_trust()
            raise
        pending = await self._settle(new)
        self._connect(new)
        recovering = self._recover()
        await asyncio.wait({recovering}, timeout=_RECOVERS_WITHIN_S)
        return pending if recovering.done() else [*pending, "no placement can be prepared yet; requests wait for one"]

    async def _enforce(self, new: DesiredState) -> list[str]:
        """Take private blocks off nodes that may not hold them any more, even if that ends service.

        The gateway sends nothing along a route that breaks the new rule, whatever the nodes do. Returns a sentence for
        each part that is still pending.
        """
        suspects = set(self.desired.cluster.trusted) - set(new.cluster.trusted)
        self._save(new)
        self._view.adopt(new.cluster, new.drained, addresses_of(new) | self._view.addresses)
        try:
            await self._relocate("obey", suspects)
        except ResplitError as error:
            _log.warning("private blocks are dropped before other nodes hold them", error=str(error))
            self._deployment.broken = str(error)
        finally:
            pending = await self._settle(new)
            unanswered = await self._membership.send_trust()
        self._recover()  # not awaited: the rule holds already
        untrusted = set(new.cluster.node_names) - set(new.cluster.trusted)
        silent = sorted((set(self._view.unreachable) | set(unanswered)) & untrusted)
        self._connect(new)
        return pending + [
            f"{name} does not answer; it drops its private blocks as soon as it answers" for name in silent
        ]

    def _connect(self, new: DesiredState) -> None:
        """Connect to the nodes of the new state, and end all other connections."""
        after = addresses_of(new)
        self._network.forget(set(self._view.addresses) - set(after))
        self._view.adopt(new.cluster, new.drained, after)
        self._network.connect(after)

    async def _relocate(self, action: str, suspects: Collection[str] = ()) -> None:
        """If the live placement violates a rule, deploy one that does not; ProposalRefusedError if there is none.

        A node that refuses is avoided by the next plan. `suspects` get little time to answer.
        """
        refused_by: frozenset[str] = frozenset()
        for tries_left in reversed(range(_RELOCATE_TRIES)):
            live = self._deployment.live
            if live is None or not self._view.rules.violation(live.placement):
                return
            try:
                proposal = await self._planner.plan(live.placement, live.epoch, action, refused_by)
            except (InfeasibleError, DataError) as error:
                raise ProposalRefusedError(str(error)) from None
            try:
                await self._deployment.deploy(proposal, suspects)
            except ProposalRefusedError as error:
                outdated = self._deployment.live is not live
                if not tries_left or not (outdated or error.refused_by - refused_by):
                    raise
                refused_by |= error.refused_by

    async def _settle(self, new: DesiredState) -> list[str]:
        """Wait until all sessions have left earlier placements, then send nothing to the nodes that `new` excludes.

        Sessions that have not left in time lose their caches there, and are replayed. Returns a sentence about them.
        """
        settled = await self._deployment.settle(_SETTLE_TIMEOUT_S)
        self._view.gateway.leave(new.drained | (set(self._view.addresses) - set(new.cluster.node_names)))
        if settled:
            return []
        return [f"streams had not left earlier placements within {_SETTLE_TIMEOUT_S:.0f} s, and are replayed"]

    async def _introduce_added(self, old: DesiredState, new: DesiredState) -> list[str]:
        """Connect and profile new nodes, so that plans can use them. Returns a sentence for each silent one."""
        added = set(new.cluster.node_names) - set(old.cluster.node_names)
        if not added:
            return []
        with contextlib.suppress(ResplitError):
            await self._network.wait_for(added, _ANSWER_TIMEOUT_S)
        await self._membership.introduce()
        with contextlib.suppress(ResplitError):
            await self._membership.profile(added)
        unreachable = sorted(added & set(self._view.unreachable))
        return [f"{name} does not answer yet; profile once it does (`python -m flows.profile`)" for name in unreachable]

    def _save(self, new: DesiredState) -> None:
        save_desired_state(new, self._started_with, self._file)
        self.desired = new


def addresses_of(desired: DesiredState) -> dict[str, Address]:
    """Where each node listens; ConfigError for a node without an address."""
    if missing := [node.name for node in desired.cluster.nodes if node.address is None]:
        raise ConfigError(
            f"nodes: {missing[0]}", "has no address; `resplit serve` needs `address: host:port` of every node"
        )
    return {node.name: Address.parse(node.address) for node in desired.cluster.nodes if node.address}


def _narrows_trust(old: DesiredState, new: DesiredState) -> bool:
    """Whether some node may no longer hold a private block that it could hold before."""
    distrusted = set(old.cluster.trusted) & set(new.cluster.node_names) - set(new.cluster.trusted)
    return bool(distrusted) or new.cluster.private_layers > old.cluster.private_layers
