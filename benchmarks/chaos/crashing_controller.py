"""A controller that crashes at a chosen event, and connections that lose, repeat and delay its commands.

The nodes are real. A crashed controller stays in memory, but its log and connections do nothing any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from resplit.config import ClusterConfig
from resplit.control.controller import Controller
from resplit.control.log import Detail, EpochLog, EpochStep
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import NodeLostError, ResplitError
from resplit.gateway.engine import GenerationRequest
from resplit.model.source import StoredModel
from resplit.status import ReportedState
from resplit.types import Sampling
from resplit.wire.commands import Reply
from resplit.wire.peers import Peer
from tests.support.cluster import TRUSTED
from tests.support.in_process import InProcessCluster, until

NODES = ("alpha", "beta", "gamma")
PROMPT = (5, 17, 40, 200, 31, 8, 99)
NEW_TOKENS = 6
_KV_TOKENS = 256
_CONSISTENT_WITHIN_S = 15.0

# lost: the command never arrives; unanswered: it arrives, its answer is lost; late: it arrives at the end; twice: it
# arrives two times; slow: it arrives after the others. Where there is no answer, the connection breaks.
Fault = Literal["lost", "unanswered", "late", "twice", "slow"]


class CrashedError(BaseException):
    """The controller crashed here. Not an `Exception`, so that no handler in the controller catches it."""


class CrashPoint:
    """Records the events of a controller. Raises CrashedError from event number `crash_at` on, if that is set."""

    def __init__(self) -> None:
        self.crash_at: int | None = None
        self.events: list[str] = []
        self.crashed = False

    def event(self, what: str) -> None:
        """Record an event just before or after it happens; CrashedError if the controller crashes here."""
        if not self.crashed:
            self.events.append(what)
            self.crashed = len(self.events) - 1 == self.crash_at
        if self.crashed:
            raise CrashedError(what)


class CrashingLog(EpochLog):
    """The durable log of a controller that may crash before or after each step."""

    def __init__(self, path: Path, crash_point: CrashPoint) -> None:
        super().__init__(path)
        self._crash_point = crash_point

    def append(self, epoch: int, step: EpochStep, detail: Detail | None = None) -> None:
        """Append, with a chance to crash before and after."""
        self._crash_point.event(f"before {step}")
        super().append(epoch, step, detail)
        self._crash_point.event(f"after {step}")


class FaultyPeer:
    """The connection of a controller to one node, with the faults of a trial."""

    def __init__(self, peer: Peer, trial: Trial) -> None:
        self._peer = peer
        self._trial = trial

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)

    async def command(self, kind: str, signed: str, timeout_s: float = 60.0) -> Reply:
        """Send a command, subject to the fault that the trial holds for it."""
        trial, name = self._trial, self._peer.name
        crash_point = trial.crash_point
        crash_point.event(f"before {kind} to {name}")
        fault = trial.faults.pop((kind, name), None)
        if fault == "slow":
            await asyncio.sleep(0.1)
        if fault == "late":
            trial.held_back.append((name, kind, signed))
        if fault not in ("lost", "late"):
            answer = await self._peer.command(kind, signed, timeout_s)
        if fault == "twice":
            with contextlib.suppress(ResplitError):
                await self._peer.command(kind, signed, timeout_s)
                trial.violations.append(f"{name} accepted one {kind} twice")
        if fault in ("lost", "late", "unanswered"):
            trial.nodes.break_connections(name)
            raise NodeLostError(f"{name}: {kind} {fault}")
        crash_point.event(f"after {kind} to {name}")
        return answer


class FaultyPeers(Mapping[str, Peer]):
    """Faulty connections to all nodes."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    def __getitem__(self, name: str) -> Peer:
        return cast(Peer, FaultyPeer(self._trial.nodes.router.peers[name], self._trial))

    def __iter__(self) -> Iterator[str]:
        return iter(self._trial.nodes.router.peers)

    def __len__(self) -> int:
        return len(self._trial.nodes.router.peers)


class Trial:
    """Three nodes and a controller under test. `expected` are the unsplit model's tokens for PROMPT."""

    def __init__(self, nodes: InProcessCluster, expected: list[int]) -> None:
        self.nodes = nodes
        self.expected = expected
        self.faults: dict[tuple[str, str], Fault] = {}
        self.held_back: list[tuple[str, str, str]] = []
        self.violations: list[str] = []
        self.highest_epoch = 0
        self.crash_point = CrashPoint()
        self._new_controller()

    async def deploy(self, placement: tuple[str, ...]) -> LiveEpoch:
        """Deploy a placement, planned against the live epoch."""
        live = self.controller.live
        return await self.controller.deploy(Proposal(placement, "re-split", live.epoch if live else 0))

    async def crash(self) -> None:
        """End controller and gateway as if they were killed, and start new ones."""
        self.crash_point.crash_at, self.crash_point.crashed = None, True
        await self.controller.stop()
        await self.nodes.router.disconnect()
        self.controller.log.close()
        self.crash_point = CrashPoint()
        self.nodes.start_gateway()
        self._new_controller()
        self.nodes.router.connect(self.nodes.addresses)

    async def resume(self) -> None:
        """Do what a controller does when it starts."""
        await self.nodes.router.wait_for(set(NODES), 10)
        await self.controller.start()

    async def deliver_held_back(self) -> None:
        """Deliver the commands that were held back, in reverse order."""
        while self.held_back:
            name, kind, signed = self.held_back.pop()
            with contextlib.suppress(ResplitError):
                await self.nodes.peer(name).command(kind, signed)

    async def check(self) -> list[str]:
        """Wait until the cluster is settled. Returns the guarantees of an epoch change that are violated."""
        try:
            await until(self._is_settled, _CONSISTENT_WITHIN_S)
        except TimeoutError:
            self.violations.append(f"not settled: {await self._describe_state()}")
        else:
            await self._check_service()
        live = self.controller.live
        if live and live.epoch < self.highest_epoch:
            self.violations.append(f"epoch {live.epoch} after {self.highest_epoch}")
        self.highest_epoch = live.epoch if live else self.highest_epoch
        found, self.violations = self.violations, []
        return found

    async def tokens(self) -> list[int]:
        """The tokens that the cluster returns for PROMPT."""
        wanted = GenerationRequest(PROMPT, NEW_TOKENS, Sampling(), "chat", frozenset(), None)
        return [token.token_id async for token in self.nodes.sessions.generate(wanted)]

    def _new_controller(self) -> None:
        log = CrashingLog(self.nodes.folder / "epochs.db", self.crash_point)
        self.controller: Controller = self.nodes.controller(log, FaultyPeers(self))

    async def _is_settled(self) -> bool:
        """Whether all nodes hold exactly the controller's live epoch, and the log says that it was committed."""
        live, log = self.controller.live, self.controller.log
        if live is None or log.epochs.live != live.epoch or log.unfinished() or self.nodes.sessions.ready():
            return False
        states = await self._states()
        self._check_privacy(states)
        return all(
            (state.epochs == (live.epoch,) or (name not in live.placement and not state.epochs))
            and not state.prepared
            and sorted(state.blocks) == list(live.blocks_of(name))
            and state.sessions == 0
            for name, state in states.items()
        )

    async def _states(self) -> dict[str, ReportedState]:
        try:
            return {name: await self.nodes.state(name) for name in NODES}
        except NodeLostError:  # its connection was just broken
            return {name: ReportedState(name, pid=None) for name in NODES}

    def _check_privacy(self, states: dict[str, ReportedState]) -> None:
        for name, state in states.items():
            if name not in TRUSTED and self.nodes.private & set(state.blocks):
                self.violations.append(f"{name} holds private blocks")

    async def _check_service(self) -> None:
        tokens = await self.tokens()
        if tokens != self.expected:
            self.violations.append(f"tokens {tokens}, not {self.expected}")
        epochs = self.nodes.sessions.records(0)[-1].epochs
        log = self.controller.log
        if any("committed" not in [entry.step for entry in log.steps(epoch)] for epoch in epochs):
            self.violations.append(f"served by epochs {epochs}, not all of them committed")

    async def _describe_state(self) -> str:
        live, log = self.controller.live, self.controller.log.epochs
        keys = ("epochs", "prepared", "blocks", "sessions")
        states = {name: {key: getattr(state, key) for key in keys} for name, state in (await self._states()).items()}
        return f"controller {live and live.epoch}, log {log}, {self.nodes.sessions.ready() or 'ready'}, nodes {states}"


@contextlib.asynccontextmanager
async def running_trial(model: StoredModel, expected: list[int], folder: Path) -> AsyncIterator[Trial]:
    """Three real nodes on this event loop, and a controller under test that has deployed a first placement."""
    config = ClusterConfig.model_validate(
        {
            "name": "test",
            "source": "alpha",
            "trusted": TRUSTED,
            "nodes": [{"name": name, "memory": "8 MiB"} for name in NODES],
            "classes": [{"name": "chat", "rate_rps": 1, "prompt_tokens": 8, "new_tokens": 8}],
            "limits": {"context_tokens": _KV_TOKENS, "sessions": 8, "queue": 4, "deadline": "20 s"},
            "kv_tokens": _KV_TOKENS,
        }
    )
    nodes = InProcessCluster(config, model, folder)
    try:
        await asyncio.gather(*(nodes.start(name) for name in NODES))
        trial = Trial(nodes, expected)
        await trial.resume()
        await trial.deploy(("alpha", "alpha", "beta", "beta", "gamma", "gamma", "beta", "alpha"))
        yield trial
        await trial.controller.stop()
    finally:
        await nodes.stop_all()
