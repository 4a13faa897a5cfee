"""A client of the control API: flows and the command line observe a cluster with it, and propose placements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from resplit.config import ClusterConfig, parse_cluster
from resplit.decide.decision import Decision
from resplit.decide.state import History, PastMove, Ready, Settings
from resplit.epochs import LiveEpoch, Proposal
from resplit.errors import DataError, NodeLostError, ProposalRefusedError, ResplitError
from resplit.estimate.cluster import Estimates
from resplit.estimate.observation import RECORDING, Recording
from resplit.pass_times import TimeSpent
from resplit.problem import problem_from_json, problem_to_json
from resplit.session_records import SessionRecord
from resplit.status import ClusterStatus, ModelStatus, NodeStatus, wrong_clock
from resplit.telemetry.rows import LinkRow
from resplit.types import Problem, RequestClass

if TYPE_CHECKING:
    from resplit.cost.model import CostModel
    from resplit.telemetry.tables import Telemetry

_Answer = TypeVar("_Answer")
_STATUS = TypeAdapter(ClusterStatus)
_MODEL = TypeAdapter(ModelStatus)
_LINKS = TypeAdapter(tuple[LinkRow, ...])
_DEMAND = TypeAdapter(list[RequestClass])
_RECORDS = TypeAdapter(list[SessionRecord])
_EPOCH = TypeAdapter(LiveEpoch)
_EPOCHS = TypeAdapter(list[LiveEpoch])
_DECISIONS = TypeAdapter(list[Decision])
_ESTIMATES = TypeAdapter(Estimates)
_READY = TypeAdapter(Ready)
_MOVES = TypeAdapter(History)
_CHANGES = TypeAdapter(dict[str, list[str]])


class ControlClient:
    """Calls of one controller. Every call raises NodeLostError if the controller does not answer."""

    def __init__(self, url: str, token: str, timeout_s: float = 120.0) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=f"{url}/control", headers={"Authorization": f"Bearer {token}"}, timeout=timeout_s
        )

    @classmethod
    def from_state(cls, url: str, state: Path) -> ControlClient:
        """A client with the token in a state folder; ResplitError if there is none."""
        try:
            return cls(url, (state / "control.token").read_text(encoding="utf-8").strip())
        except OSError as error:
            raise ResplitError(
                f"no control token in {state} ({error.strerror}); is the cluster running there?"
            ) from None

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def status(self) -> ClusterStatus:
        """The live epoch and its placement, the state of each node, and the sessions."""
        return self._get("/status", _STATUS)

    def model(self) -> ModelStatus:
        """The model's name and block features, the live epoch and placement, and the nodes that are not in use."""
        return self._get("/model", _MODEL)

    def cluster(self) -> ClusterConfig:
        """The cluster in its desired state: its file, with the changes that operators made by command."""
        return parse_cluster(self._send("GET", "/cluster").json(), f"the cluster of {self._url}")

    def apply(self, content: Mapping[str, Any]) -> list[str]:
        """Apply a changed cluster file. Returns the changes in words; ProposalRefusedError if it is refused."""
        return self._operate("PUT", "/cluster", content)

    def drain(self, node: str) -> list[str]:
        """Move everything off a node and stop using it. Returns the changes in words."""
        return self._operate("POST", f"/nodes/{node}/drain", {})

    def join(self, node: str) -> list[str]:
        """Use a drained node again. Returns the changes in words."""
        return self._operate("POST", f"/nodes/{node}/join", {})

    def trust(self, node: str, on: bool) -> list[str]:
        """Allow private blocks on a node, or forbid them. Returns the changes in words."""
        return self._operate("POST", f"/nodes/{node}/trust", {"on": on})

    def telemetry(self, since_s: float) -> Telemetry:
        """Telemetry not older than `since_s` (seconds since 1970)."""
        from resplit.telemetry.tables import (
            Telemetry,  # imported here: pandas takes long, and most commands do not need it
        )

        return Telemetry.from_rows(self._send("GET", "/telemetry", params={"since_s": since_s}).json())

    def links(self) -> tuple[LinkRow, ...]:
        """The messages between nodes that were timed in the last minutes."""
        rows = self._send("GET", "/telemetry", params={"since_s": 0.0}).json()
        return _LINKS.validate_python(rows["links"])

    def demand(self, window_s: float) -> list[RequestClass]:
        """The demand of each class: arrivals of the last `window_s` seconds, blended with the declared demand."""
        return self._get("/demand", _DEMAND, window_s=window_s)

    def records(self, skip: int = 0) -> list[SessionRecord]:
        """The records of all requests that ended, without the first `skip`."""
        return self._get("/records", _RECORDS, skip=skip)

    def epochs(self) -> list[LiveEpoch]:
        """Every placement that was live since the controller started, in order."""
        return self._get("/epochs", _EPOCHS)

    def decisions(self, since: int = 0) -> list[Decision]:
        """The decisions numbered above `since`."""
        return self._get("/decisions", _DECISIONS, since=since)

    def last_decision(self) -> int:
        """The number of the last decision; 0 if there is none."""
        return max((decision.id or 0 for decision in self.decisions()), default=0)

    def log_decision(self, decision: Decision) -> None:
        """Append to the decision log."""
        self._send("POST", "/decisions", body=decision.to_json())

    def profile(self) -> None:
        """Have every node time its blocks and links."""
        self._send("POST", "/profile", body={})

    def set_problem(self, problem: Problem, cost: CostModel | None = None) -> None:
        """Give the controller the latest problem, with which it plans on its own, and the model that posed it."""
        body = {"problem": problem_to_json(problem), "cost": json.loads(cost.to_json()) if cost else None}
        self._send("POST", "/problem", body=body)

    def problem_of(self, epoch: int) -> Problem | None:
        """The problem for which the fast loop deployed an epoch; None if it did not, or long ago."""
        posed = self._send("GET", f"/problems/{epoch}").json()["problem"]
        return problem_from_json(posed) if posed else None

    def estimates(self) -> Estimates:
        """The controller's estimate of each node and link now, relative to the cost model of the latest problem."""
        return self._get("/estimates", _ESTIMATES)

    def ready(self) -> Ready:
        """The placements that were planned for likely changes, and the blocks that stand by for them."""
        return self._get("/ready", _READY)

    def observations(self) -> Recording:
        """What the detector of changes was shown in the last minutes."""
        return self._get("/observations", RECORDING)

    def arm_fast_loop(self, settings: Settings, for_s: float, policy: str = "resplit") -> None:
        """Have the controller ask a policy about detected changes for so many seconds from now; 0 stops that.

        `policy` is one of `resplit.policies.POLICIES`.
        """
        self._send("PUT", "/fast_loop", body={"settings": settings, "for_s": for_s, "policy": policy})

    def moves(self) -> History:
        """The history of moves."""
        return self._get("/moves", _MOVES)

    def set_moves(self, history: History) -> None:
        """Replace the history of moves."""
        self._send("PUT", "/moves", body=history)

    def add_move(self, move: PastMove, settings: Settings) -> None:
        """Add a move that was deployed to the history; moves that the fast loop adds meanwhile stay."""
        self._send("POST", "/moves", body={"move": move, "settings": settings})

    def propose(self, proposal: Proposal) -> LiveEpoch:
        """Have a placement deployed; ProposalRefusedError if the controller refuses it."""
        return self._parsed(_EPOCH, self._send("POST", "/proposals", body=proposal))

    def emulate_node(
        self, node: str, slowdown: float | None = None, background_utilization: float | None = None
    ) -> None:
        """Change the emulated hardware of a node; None leaves a value as it is."""
        body = {"node": node, "slowdown": slowdown, "background_utilization": background_utilization}
        self._send("POST", "/emulation/node", body=body)

    def emulate_link(
        self, one: str, other: str, latency_s: float | None = None, bandwidth_bytes_per_s: float | None = None
    ) -> None:
        """Change an emulated link in both directions; None sets what the cluster file declares."""
        body = {"between": [one, other], "latency_s": latency_s, "bandwidth_bytes_per_s": bandwidth_bytes_per_s}
        self._send("POST", "/emulation/link", body=body)

    def _operate(self, method: str, path: str, body: Mapping[str, object]) -> list[str]:
        return self._parsed(_CHANGES, self._send(method, path, body=body))["changes"]

    def _get(self, path: str, adapter: TypeAdapter[_Answer], **query: float) -> _Answer:
        return self._parsed(adapter, self._send("GET", path, params=query))

    def _parsed(self, adapter: TypeAdapter[_Answer], response: httpx.Response) -> _Answer:
        try:
            return adapter.validate_json(response.content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(
                f"the controller at {self._url} answered {response.url.path} with {place}: {first['msg']}; "
                "is it of the same version?"
            ) from None

    def _send(
        self, method: str, path: str, body: object = None, params: Mapping[str, float] | None = None
    ) -> httpx.Response:
        """Send a request; `body` becomes JSON, in which an infinite number is null."""
        content = None if body is None else to_json(body, inf_nan_mode="null")
        headers = {"Content-Type": "application/json"} if content else {}
        try:
            response = self._http.request(method, path, content=content, headers=headers, params=params)
        except httpx.HTTPError as error:
            raise NodeLostError(f"the controller at {self._url} does not answer ({error})") from error
        if response.status_code == 409:
            raise ProposalRefusedError(_reason(response))
        if response.is_error:
            raise ResplitError(f"the controller refused {method} {path}: {response.status_code} {_reason(response)}")
        return response


def _reason(response: httpx.Response) -> str:
    """What an answer says of an error; the beginning of its text if it is not one of the controller's."""
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:500]


def describe_status(status: ClusterStatus) -> str:
    """A status as text for people."""
    epoch = f"epoch {status.epoch} ({status.action})" if status.action else "no epoch yet"
    lines = [
        f"cluster {status.cluster}, model {status.model}, {epoch}, "
        f"{status.sessions} sessions, {status.waiting} waiting, ready: {status.ready}"
    ]
    lines += [f"  {line}" for line in (status.plan_note, status.emulation_warning, _describe_spent(status)) if line]
    spent = status.spent.nodes
    nodes = (_describe_node(node, status.blocks) + _describe_time(spent.get(node.node)) for node in status.nodes)
    return "\n".join([*lines, *nodes])


def _describe_spent(status: ClusterStatus) -> str:
    spent = status.spent
    total_s = spent.waited_s + spent.computed_s + spent.hops_s
    if not total_s:
        return ""
    return (
        f"{spent.passes} passes: {spent.waited_s / total_s:.0%} of their time in queues, "
        f"{spent.computed_s / total_s:.0%} in batches, {spent.hops_s / total_s:.0%} between nodes"
    )


def _describe_time(spent: TimeSpent | None) -> str:
    return f"  waited {spent.waited_s:.1f} s, computed {spent.computed_s:.1f} s" if spent else ""


def _describe_node(node: NodeStatus, names: tuple[str, ...]) -> str:
    marks = {"trusted": node.trusted, "drained": node.drained, "emulated": node.emulated}
    shown = " ".join(mark for mark, on in marks.items() if on)
    ready = node.standby
    shown += f" +{len(ready.blocks)} ready ({ready.memory_bytes / 2**20:.0f} MiB)" if ready.blocks else ""
    if node.cores is not None and node.throttled:
        shown += f"  waits {node.throttled:.0%} for its quota of {node.cores:.2f} cores"
    answers = "" if node.answers else f"  LOST: {node.fault}" if node.fault else "  DOES NOT ANSWER"
    wrong = wrong_clock(node.clock_ahead_s)
    clock = f"  {wrong}" if wrong and "clock" not in answers else ""  # where it is lost for its clock, that is said
    return f"  {node.node:10} pid {node.pid}  {node.address}  {_runs(names, node.blocks)}  {shown}{answers}{clock}"


def _runs(names: tuple[str, ...], blocks: tuple[int, ...]) -> str:
    """The runs of consecutive blocks that a node holds, as `first..last` each."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return ", ".join(f"{names[a]}..{names[b]}" for a, b in zip(starts, ends, strict=True)) or "no blocks"
