"""What operators change on a running cluster: nodes drained, joined, trusted or not, and the cluster file as a whole.

Each is another desired that the cluster is led to without the loss of a request; how epochs change is the controller's.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import structlog

from resplit.control.controller import Controller
from resplit.control.desired_state import DesiredState, changes, load_desired_state, save_desired_state
from resplit.epochs import Proposal
from resplit.errors import ConfigError, ProposalRefusedError, ResplitError
from resplit.wire.peers import Address

_log = structlog.get_logger(__name__)
_TRIES = 3  # a plan is outdated by any other re-split
_SETTLED_WITHIN_S = 30.0
_ANSWERS_WITHIN_S = 10.0


class Network(Protocol):
    """The connections to the nodes."""

    def connect(self, addresses: dict[str, Address]) -> None:
        """Connect to nodes; a changed address replaces the connection."""
        ...

    def forget(self, names: set[str]) -> None:
        """End the connections to nodes."""
        ...

    async def wait_for(self, nodes: set[str], timeout_s: float) -> None:
        """Until these nodes answer; NodeLostError names those that do not."""
        ...


class Operator:
    """Leads one running cluster from desired to desired, one after the other; `content` is the cluster file's."""

    def __init__(self, controller: Controller, network: Network, content: Mapping[str, Any], file: Path) -> None:
        self._controller = controller
        self._network = network
        self._started_with = content
        self._file = file
        self._changing = asyncio.Lock()
        self.desired = load_desired_state(file, content)
        controller.adopt(self.desired.cluster, self.desired.drained, addresses_of(self.desired))

    async def drain(self, node: str) -> list[str]:
        """Move everything off a node and use it no more; what changed, in words.

        ProposalRefusedError where the others cannot hold the model; then everything is as it was.
        """
        return await self._change(lambda desired: desired.with_drained(node))

    async def join(self, node: str) -> list[str]:
        """Let a node serve again; it is given blocks at once where a plan for the newest problem gives it some."""
        said = await self._change(lambda desired: desired.with_joined(node))
        controller = self._controller
        if (live := controller.live) and node not in live.placement:
            plan = await controller.plan(live.placement, live.epoch, "join")
            if isinstance(plan, Proposal) and node in plan.placement:
                with contextlib.suppress(ProposalRefusedError):
                    await controller.deploy(plan)
        return said

    async def trust(self, node: str, on: bool) -> list[str]:
        """Trust a node or do so no more. Then nothing private is on it at the end, whatever that costs."""
        return await self._change(lambda desired: desired.with_trust(node, on))

    async def apply(self, content: Mapping[str, Any]) -> list[str]:
        """Follow a changed cluster file. ConfigError names what a running cluster cannot change."""
        return await self._change(lambda desired: desired.with_file(content))

    async def _change(self, make: Callable[[DesiredState], DesiredState]) -> list[str]:
        async with self._changing:
            old, new = self.desired, make(self.desired)
            said = changes(old, new)
            if not said:
                return []
            self._check(old, new)
            said += await (self._obey(new) if _takes_trust(old, new) else self._follow(new))
            said += await self._greet(old, new)
            _log.info("the cluster is changed", what="; ".join(said))
            return said

    def _check(self, old: DesiredState, new: DesiredState) -> None:
        """What would leave the cluster with less than it needs is refused before anything is done."""
        addresses_of(new)
        for name in set(new.cluster.node_names) - set(old.cluster.node_names):
            self._controller.member.public_wrap_key(name)
        before, after = (set(desired.cluster.trusted) - desired.drained for desired in (old, new))
        if before and not after and not _takes_trust(old, new):
            raise ProposalRefusedError(
                f"{', '.join(sorted(before))} is the last trusted node: private blocks have nowhere else to go; "
                "trust another first (`resplit trust NODE on`)"
            )

    async def _follow(self, new: DesiredState) -> list[str]:
        """Move off the nodes that are to be left, beside the service; nothing is changed where that fails.

        What is still to come, in words.
        """
        controller, old = self._controller, self.desired
        before, after = addresses_of(old), addresses_of(new)
        moved = {name for name in after if name in before and before[name] != after[name]}
        # Nodes that are left, and those that move elsewhere, are still told what they need to hand over.
        controller.adopt(new.cluster, new.drained | moved, after | before)
        try:
            await self._tell_trust()
            await self._relocate("drain")
            self._keep(new)
        except BaseException:
            controller.adopt(old.cluster, old.drained, before)
            await self._tell_trust()
            raise
        still = await self._settle()
        self._connect(new)
        await controller.resume()
        await controller.recover()
        return still

    async def _obey(self, new: DesiredState) -> list[str]:
        """Let nothing private be where it may not be any more: first of all that, then service; what is to come."""
        controller = self._controller
        self._keep(new)
        controller.adopt(new.cluster, new.drained, addresses_of(new) | controller.addresses)
        try:
            async with controller.gateway.paused():
                await self._relocate("obey", held=True)
        except ResplitError as error:
            _log.warning("private blocks are dropped before they are elsewhere", error=str(error))
            controller.broke(str(error))
        finally:
            await self._tell_trust()
        await controller.recover()
        still = await self._settle()
        untold = sorted(set(controller.silent) & set(new.cluster.node_names) - set(new.cluster.trusted))
        self._connect(new)
        return still + [
            f"{name} does not answer; it is told to drop what is private as soon as it does" for name in untold
        ]

    def _connect(self, new: DesiredState) -> None:
        """Have connections to the nodes that belong to the cluster, and to no others."""
        after = addresses_of(new)
        self._network.forget(set(self._controller.addresses) - set(after))
        self._controller.adopt(new.cluster, new.drained, after)
        self._network.connect(after)

    async def _relocate(self, action: str, held: bool = False) -> None:
        """Deploy a plan of the controller's own where what is live breaks a rule; ProposalRefusedError if none goes."""
        controller = self._controller
        for left in reversed(range(_TRIES)):
            live = controller.live
            if live is None or not controller.rules.violation(live.placement):
                return
            plan = await controller.plan(live.placement, live.epoch, action)
            if isinstance(plan, str):
                raise ProposalRefusedError(plan)
            try:
                await controller.deploy(plan, held)
            except ProposalRefusedError:
                if not left or controller.live is live:
                    raise

    async def _settle(self) -> list[str]:
        """Until all sessions have left earlier placements and their nodes have freed them; in words if they do not."""
        try:
            async with asyncio.timeout(_SETTLED_WITHIN_S):
                await self._controller.only_live()
        except TimeoutError:
            return [f"streams have not left earlier placements within {_SETTLED_WITHIN_S:.0f} s; see `resplit status`"]
        return []

    async def _tell_trust(self) -> None:
        controller = self._controller
        epoch = controller.live.epoch if controller.live else 0
        trust = {name: controller.commands.trust(name, controller.rules) for name in controller.answering}
        await controller.commands.notify(trust, epoch)

    async def _greet(self, old: DesiredState, new: DesiredState) -> list[str]:
        """Have nodes that are new introduced and timed, so that plans can use them; who does not answer, in words."""
        added = set(new.cluster.node_names) - set(old.cluster.node_names)
        if not added:
            return []
        with contextlib.suppress(ResplitError):
            await self._network.wait_for(added, _ANSWERS_WITHIN_S)
        await self._controller.introduce()
        with contextlib.suppress(ResplitError):
            await self._controller.profile(added)
        silent = sorted(added & set(self._controller.silent))
        return [f"{name} does not answer yet; profile once it does (`python -m flows.profile`)" for name in silent]

    def _keep(self, new: DesiredState) -> None:
        save_desired_state(new, self._started_with, self._file)
        self.desired = new


def addresses_of(desired: DesiredState) -> dict[str, Address]:
    """Where each node listens; ConfigError for a node without an address."""
    if missing := [node.name for node in desired.cluster.nodes if node.address is None]:
        raise ConfigError(
            f"nodes: {missing[0]}", "has no address; `resplit serve` needs `address: host:port` of every node"
        )
    return {node.name: Address.parse(node.address) for node in desired.cluster.nodes if node.address}


def _takes_trust(old: DesiredState, new: DesiredState) -> bool:
    """Whether something private may not be any more where it might be."""
    stay = set(new.cluster.node_names)
    less = set(old.cluster.trusted) & stay - set(new.cluster.trusted)
    return bool(less) or new.cluster.private_layers > old.cluster.private_layers
