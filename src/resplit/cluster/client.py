"""A client of the control API: what flows and the command line use to observe a cluster and to propose."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from resplit.config import ClusterConfig, parse_cluster
from resplit.errors import NodeLostError, ProposalRefusedError, ResplitError
from resplit.problem import problem_to_json
from resplit.types import Problem


class ControlClient:
    """Calls of one controller. Every call raises NodeLostError where it does not answer."""

    def __init__(self, url: str, token: str, timeout_s: float = 120.0) -> None:
        self._url = url
        self._http = httpx.Client(
            base_url=f"{url}/control", headers={"Authorization": f"Bearer {token}"}, timeout=timeout_s
        )

    @classmethod
    def from_state(cls, url: str, state: Path) -> ControlClient:
        """With the token in a state folder; ResplitError if there is none."""
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

    def status(self) -> dict[str, Any]:
        """What is live: epoch, placement, nodes, sessions."""
        answer: dict[str, Any] = self._get("/status")
        return answer

    def model(self) -> dict[str, Any]:
        """The model's name, its block features, and the live epoch and placement."""
        answer: dict[str, Any] = self._get("/model")
        return answer

    def cluster(self) -> ClusterConfig:
        """The cluster as it is to be now: its file, and what was changed since by command."""
        return parse_cluster(self._get("/cluster"), f"the cluster of {self._url}")

    def apply(self, content: Mapping[str, Any]) -> list[str]:
        """Have the cluster follow a changed cluster file; what changes, in words."""
        return self._changes("PUT", "/cluster", dict(content))

    def drain(self, node: str) -> list[str]:
        """Have everything moved off a node, and use it no more; what changes, in words."""
        return self._changes("POST", f"/nodes/{node}/drain", {})

    def join(self, node: str) -> list[str]:
        """Let a drained node serve again; what changes, in words."""
        return self._changes("POST", f"/nodes/{node}/join", {})

    def trust(self, node: str, on: bool) -> list[str]:
        """Let private blocks be on a node, or not; what changes, in words."""
        return self._changes("POST", f"/nodes/{node}/trust", {"on": on})

    def telemetry(self, since_s: float) -> dict[str, list[dict[str, Any]]]:
        """Telemetry rows by table, not older than `since_s` (seconds since 1970)."""
        answer: dict[str, list[dict[str, Any]]] = self._get("/telemetry", since_s=since_s)
        return answer

    def demand(self, window_s: float) -> list[dict[str, Any]]:
        """The fields of `RequestClass` for each class, as seen lately."""
        answer: list[dict[str, Any]] = self._get("/demand", window_s=window_s)
        return answer

    def records(self, skip: int = 0) -> list[dict[str, Any]]:
        """What became of every request that ended."""
        answer: list[dict[str, Any]] = self._get("/records", skip=skip)
        return answer

    def epochs(self) -> list[dict[str, Any]]:
        """Every placement that was live."""
        answer: list[dict[str, Any]] = self._get("/epochs")
        return answer

    def decisions(self, since: int = 0) -> list[dict[str, Any]]:
        """The decision log after entry `since`."""
        answer: list[dict[str, Any]] = self._get("/decisions", since=since)
        return answer

    def log_decision(self, decision: dict[str, Any]) -> None:
        """Append to the decision log."""
        self._post("/decisions", decision)

    def profile(self) -> None:
        """Have every node time blocks and links."""
        self._post("/profile", {})

    def set_problem(self, problem: Problem) -> None:
        """Give the controller the newest problem of the cluster, to plan with where it must on its own."""
        self._post("/problem", problem_to_json(problem))

    def propose(self, proposal: dict[str, Any]) -> dict[str, Any]:
        """Have a placement deployed; ProposalRefusedError where the controller does not."""
        answer: dict[str, Any] = self._post("/proposals", proposal)
        return answer

    def emulate_node(self, change: dict[str, Any]) -> None:
        """Change what an emulated node plays."""
        self._post("/emulation/node", change)

    def emulate_link(self, change: dict[str, Any]) -> None:
        """Change what an emulated link plays."""
        self._post("/emulation/link", change)

    def _changes(self, method: str, path: str, body: dict[str, Any]) -> list[str]:
        changes: list[str] = self._answer(method, path, json=body)["changes"]
        return changes

    def _get(self, path: str, **query: float) -> Any:
        return self._answer("GET", path, params=query)

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return self._answer("POST", path, json=body)

    def _answer(self, method: str, path: str, **how: Any) -> Any:
        try:
            response = self._http.request(method, path, **how)
        except httpx.HTTPError as error:
            raise NodeLostError(f"the controller at {self._url} does not answer ({error})") from error
        if response.status_code == 409:
            raise ProposalRefusedError(response.json()["error"]["message"])
        if response.is_error:
            raise ResplitError(f"the controller refused {method} {path}: {response.status_code} {response.text[:500]}")
        return response.json()


def describe_status(status: dict[str, Any]) -> str:
    """A status as people read it."""
    lines = [
        f"cluster {status['cluster']}, model {status['model']}, epoch {status['epoch']} ({status['action']}), "
        f"{status['sessions']} sessions, {status['waiting']} waiting, ready: {status['ready']}"
    ]
    for node in status["nodes"]:
        held = _held(status["blocks"], node.get("blocks", []))
        marks = [mark for mark in ("trusted", "drained", "emulated") if node.get(mark)]
        answers = "" if node["answers"] else "  DOES NOT ANSWER"
        lines.append(
            f"  {node['node']:10} pid {node.get('pid')}  {node['address']}  {held}  {' '.join(marks)}{answers}"
        )
    return "\n".join(lines)


def _held(names: list[str], blocks: list[int]) -> str:
    """The runs of blocks that a node holds, as `first..last` each."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return ", ".join(f"{names[a]}..{names[b]}" for a, b in zip(starts, ends, strict=True)) or "no blocks"
