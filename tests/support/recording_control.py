"""Stand-ins for the nodes and the gateway of a controller. They record what it does, in order."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resplit.config import ClusterConfig
from resplit.control.cluster_view import ClusterView
from resplit.control.deployment import Deployment
from resplit.control.log import EpochLog
from resplit.control.node_commands import NodeCommands
from resplit.epochs import RECOVER, Proposal
from resplit.estimate import Forecast
from resplit.model.source import StoredModel
from resplit.process.cancellation import VitalTasks
from resplit.types import BlockFeatures
from resplit.wire.addresses import Address
from resplit.wire.commands import NodeCommand, Prepare, Reply, WrappedShard
from resplit.wire.routes import Route
from tests.support.three_nodes import A, B, C, three_node_config


class RecordingCommands(NodeCommands):
    """Records each command as `KIND NODE EPOCH (STEP)`, where STEP is the pending epoch's step in the log at that time.

    A command is answered with what `answers` has for its kind and node, an error included; else a prepare with the
    blocks that the node is to load, and everything else with an empty reply.
    """

    def __init__(self, model: StoredModel, log: EpochLog, events: list[str]) -> None:
        self._model = model
        self._log = log
        self._events = events
        self.answers: dict[tuple[str, str], Reply | BaseException] = {}
        self.sent: list[tuple[str, NodeCommand]] = []
        self.faults: dict[str, str] = {}
        self.on_fault: Callable[[str], None] = lambda node: None
        self.limits_s: list[Mapping[str, float]] = []  # of the sends that gave nodes less time
        self.obeyed: dict[str, int] = {}  # the highest epoch that a node has obeyed, if not 0

    async def send(
        self, commands: Mapping[str, NodeCommand], epoch: int, within_s: Mapping[str, float] | None = None
    ) -> dict[str, Reply | BaseException]:
        self.limits_s += [within_s] if within_s else []
        for node, command in commands.items():
            self._events.append(f"{command.kind} {node} {epoch} ({self._log.epochs.pending_step})")
            self.sent.append((node, command))
        return {node: self._answer(node, command) for node, command in commands.items()}

    def fault(self, node: str, reason: str) -> None:
        self.faults[node] = reason
        self.on_fault(node)

    def obeyed_epochs(self, nodes: Iterable[str]) -> dict[str, int]:
        return {node: self.obeyed.get(node, 0) for node in nodes}

    def _answer(self, node: str, command: NodeCommand) -> Reply | BaseException:
        loaded = list(command.route.blocks_of(node)) if isinstance(command, Prepare) else []
        return self.answers.get((command.kind, node), {"loaded": loaded})

    def _shards(self, node: str, blocks: Sequence[int], features: Sequence[BlockFeatures]) -> dict[int, WrappedShard]:
        return {block: WrappedShard(f"shard-{block}", 0, b"") for block in blocks}


@dataclass
class RecordingGateway:
    """The part of a gateway that epochs need. `connected` are the nodes that answer."""

    connected: set[str]
    events: list[str]
    oldest: int = 0
    unavailable: str | None = None
    expected: dict[str, Forecast] = field(default_factory=dict)

    def rates(self) -> dict[str, Forecast]:
        return self.expected

    def connected_nodes(self) -> set[str]:
        return self.connected

    def reconfigure(self, cluster: ClusterConfig, features: Sequence[BlockFeatures], drained: frozenset[str]) -> None:
        self.events.append(f"reconfigure {cluster.name}")

    def activate(self, route: Route) -> None:
        self.events.append(f"activate {route.epoch}")

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        self.events.append("pause")
        try:
            yield
        finally:
            self.events.append("resume")

    async def move_all(self, route: Route) -> None:
        self.events.append(f"move all to {route.epoch}")

    def leave(self, nodes: frozenset[str]) -> None:
        self.events.append(f"leave {', '.join(sorted(nodes))}")

    def lose(self, node: str) -> None:
        self.connected = self.connected - {node}

    def oldest_epoch(self) -> int:
        return self.oldest

    def set_available(self) -> None:
        self.unavailable = None

    def set_unavailable(self, reason: str) -> None:
        self.unavailable = reason


class RecordingPlanner:
    """Plans `placement` whatever was lost, after those in `first`; or raises `error`."""

    def __init__(self, placement: tuple[str, ...]) -> None:
        self.first: list[tuple[str, ...]] = []
        self.placement = placement
        self.note = ""
        self.error: Exception | None = None
        self.asked: list[tuple[tuple[str, ...], int]] = []
        self.actions: list[str] = []
        self.avoided: list[frozenset[str]] = []

    async def plan(
        self, current: tuple[str, ...], based_on: int, action: str = RECOVER, avoid: frozenset[str] = frozenset()
    ) -> Proposal:
        self.asked.append((current, based_on))
        self.actions.append(action)
        self.avoided.append(avoid)
        if self.error:
            raise self.error
        return Proposal(self.first.pop(0) if self.first else self.placement, action, based_on, note=self.note)


class RecordedDeployment:
    """The epochs of three nodes. Nodes and gateway are stand-ins, and `events` has what they were told, in order."""

    def __init__(self, model: StoredModel, folder: Path) -> None:
        config = three_node_config()
        self.events: list[str] = []
        self.gateway = RecordingGateway({A, B, C}, self.events)
        self.log = EpochLog(folder / "epochs.db")
        self.commands = RecordingCommands(model, self.log, self.events)
        self.tasks = VitalTasks()
        gateway: Any = self.gateway
        addresses = {name: Address("127.0.0.1", 1) for name in config.node_names}
        self.view = ClusterView(config, model, addresses, gateway)
        self.deployment = Deployment(self.view, self.commands, self.log, self.tasks)
