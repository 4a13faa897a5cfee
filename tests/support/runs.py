"""A synthetic run for tests: a small queue simulation that fills every table of a `RunRecord`.

Requests pass, token by token, over nodes with first-in-first-out queues and links with fixed delays. A node slows down,
a link degrades and the load rises on a schedule. `static` keeps its placement; `resplit` changes it a few seconds after
each change.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resplit.decide import Alternative, Decision, Measured
from resplit.decide.decision import NodeConditions
from resplit.decide.price import Action
from resplit.records import RunRecord, table
from resplit.types import segments_of

BLOCKS = ("embed", *(f"layer.{k}" for k in range(30)), "head")
LAYER_S = {"hub": 0.0022, "desk": 0.0016, "tv": 0.0030, "phone": 0.0036, "cloud": 0.0007}
SESSIONS = 16
QUEUE = 16


def _placement(**counts: int) -> tuple[str, ...]:
    """The embedding, the first layer and the head on the hub; the other layers in the order and number given."""
    middle = [node for node, count in counts.items() for _ in range(count)]
    return ("hub", "hub", *middle, "hub")


PLACEMENTS = (
    _placement(hub=3, desk=20, phone=6),
    _placement(hub=5, desk=4, tv=6, cloud=14),
    _placement(hub=7, desk=6, tv=10, phone=6),
    _placement(hub=5, desk=5, tv=5, cloud=14),
)
ACTIONS = ("initial", "re-split", "redistribute", "re-split")


@dataclass
class _World:
    """Node, link and load as functions of time."""

    duration_s: float
    disturbed: bool

    def since(self, share: float, at_s: float) -> bool:
        return self.disturbed and at_s >= share * self.duration_s

    def layer_s(self, node: str, at_s: float) -> float:
        return LAYER_S[node] * (2.3 if node == "desk" and self.since(0.25, at_s) else 1.0)

    def link_s(self, one: str, other: str, at_s: float) -> float:
        if "cloud" in (one, other):
            return 0.120 if self.since(0.5, at_s) and not self.since(0.72, at_s) else 0.025
        return 0.003

    def rate_rps(self, at_s: float) -> float:
        return 1.1 if self.since(0.72, at_s) else 0.7


@dataclass
class _Run:
    world: _World
    commits_s: list[float]
    free_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LAYER_S, 0.0))
    busy: list[tuple[str, float, float]] = field(default_factory=list)

    def placement(self, at_s: float) -> tuple[str, ...]:
        return PLACEMENTS[int(np.searchsorted(self.commits_s, at_s, side="right")) - 1]

    def hop(self, at_s: float, node: str, layers: int, tokens: int) -> float:
        """When `tokens` tokens leave `layers` layers of `node`. A token of a prefill costs a quarter."""
        at_s += self.world.link_s("hub", node, at_s) if node != "hub" else 0.0
        start_s = max(at_s, self.free_s[node])
        end_s = start_s + layers * self.world.layer_s(node, start_s) * max(1.0, tokens / 4)
        self.free_s[node] = end_s
        self.busy.append((node, start_s, end_s))
        return end_s


def synthetic_run(
    policy: str = "resplit", seed: int = 0, duration_s: float = 150.0, disturbed: bool = True
) -> RunRecord:
    """A run of `policy` (static or resplit) on a synthetic home cluster."""
    world = _World(duration_s, disturbed)
    adaptive = policy == "resplit" and disturbed
    commits_s = [0.0, *(share * duration_s + 4.0 for share in (0.25, 0.5, 0.72))] if adaptive else [0.0]
    run = _Run(world, commits_s)
    requests, tokens = _serve(run, np.random.default_rng(seed))
    return RunRecord(
        policy=policy,
        scenario="a-day-at-home" if disturbed else "undisturbed",
        seed=seed,
        duration_s=duration_s,
        requests=table("requests", requests),
        tokens=table("tokens", tokens),
        use=table("use", _use(run, duration_s)),
        events=table("events", _events(duration_s, disturbed, commits_s)),
        epochs=table("epochs", _epochs(commits_s)),
        decisions=_decisions(commits_s) if adaptive else (),
        blocks=BLOCKS,
        emulated_nodes=tuple(LAYER_S),
        emulation_error=0.012,
        estimate_errors={"estimate_error_speed": 0.021, "software_s": 0.0024},
    )


def _serve(run: _Run, random: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    requests, queue = _arrivals(run, random)
    tokens: list[dict[str, Any]] = []
    waiting: list[int] = []
    live = 0
    route: dict[int, list[tuple[str, int]]] = {}
    while queue:
        now_s, index, left = heapq.heappop(queue)
        row = requests[index]
        first = left == row["new_tokens"]
        if first and index not in route and live >= SESSIONS:
            if len(waiting) >= QUEUE:
                row |= {"status": 429, "end_s": now_s + 0.002}
            else:
                waiting.append(index)
            continue
        live += first and index not in route
        if not route.get(index):
            route[index] = [(s.node, s.last - s.first + 1) for s in segments_of(run.placement(now_s))]
        node, layers = route[index].pop(0)
        end_s = run.hop(now_s, node, layers, int(row["prompt_tokens"]) if first else 1)
        if not route[index]:
            tokens.append({"time_s": end_s, "request": index})
            row["first_token_s"] = end_s if first else row["first_token_s"]
            left -= 1
        if left:
            heapq.heappush(queue, (end_s, index, left))
            continue
        row |= {"status": 200, "end_s": end_s, "epochs": _epochs_between(run, row["arrival_s"], end_s)}
        live -= 1
        if waiting:
            after = waiting.pop(0)
            heapq.heappush(queue, (end_s, after, requests[after]["new_tokens"]))
    return requests, tokens


def _arrivals(run: _Run, random: np.random.Generator) -> tuple[list[dict[str, Any]], list[tuple[float, int, int]]]:
    requests: list[dict[str, Any]] = []
    at_s = float(random.exponential(1 / 0.7))
    while at_s < run.world.duration_s:
        chat = random.random() < 0.7
        requests.append(
            {
                "request_class": "chat" if chat else "summary",
                "arrival_s": at_s,
                "first_token_s": float("nan"),
                "end_s": float("nan"),
                "prompt_tokens": int(random.integers(8, 24) if chat else random.integers(32, 64)),
                "new_tokens": int(random.integers(8, 20)),
                "status": 504,
                "slo_s": 4.0 if chat else 8.0,
                "private_ok": True,
                "epochs": 0,
                "waited_s": 0.1,
                "computed_s": 0.5,
                "hops_s": 0.05,
            }
        )
        at_s += float(random.exponential(1 / run.world.rate_rps(at_s)))
    queue = [(float(row["arrival_s"]), index, int(row["new_tokens"])) for index, row in enumerate(requests)]
    heapq.heapify(queue)
    return requests, queue


def _epochs_between(run: _Run, from_s: float, until_s: float) -> int:
    first, last = np.searchsorted(run.commits_s, [from_s, until_s], side="right")
    return int(last - first + 1)


def _use(run: _Run, duration_s: float) -> list[dict[str, Any]]:
    ticks = int(duration_s)
    own_s = {node: [0.0] * ticks for node in LAYER_S}  # seconds of work in each second
    for node, start_s, end_s in run.busy:
        for tick in range(int(start_s), min(ticks, math.ceil(end_s))):
            own_s[node][tick] += min(end_s, tick + 1) - max(start_s, tick)
    rows: list[dict[str, Any]] = []
    for node, busy_s in own_s.items():
        background = 0.15 if node == "tv" else 0.05
        for tick, own in enumerate(busy_s):
            total = min(1.0, own + background)
            rows.append({"time_s": tick + 1.0, "node": node, "utilization": total, "own_utilization": min(own, 1.0)})
    return rows


def _events(duration_s: float, disturbed: bool, commits_s: list[float]) -> list[dict[str, Any]]:
    changes = [(0.25, "desk slows to a third"), (0.5, "uplink to the cloud degrades"), (0.72, "load x 1.7")]
    rows = [{"time_s": at * duration_s, "kind": "change", "label": label} for at, label in changes if disturbed]
    rows += [
        {"time_s": at_s, "kind": "reconfiguration", "label": f"epoch {epoch}"}
        for epoch, at_s in enumerate(commits_s, 1)
        if epoch > 1
    ]
    return sorted(rows, key=lambda row: float(row["time_s"]))


def _epochs(commits_s: list[float]) -> list[dict[str, Any]]:
    return [
        {
            "epoch": index + 1,
            "time_s": at_s,
            "action": ACTIONS[index],
            "placement": ",".join(PLACEMENTS[index]),
            "predicted_latency_s": (1.5, 1.45, 1.9, 1.7)[index],
            "lower_bound": (1.42, 1.36, 1.78, 1.61)[index],
            "moved_bytes": 0.0 if index == 0 else 14.2e6 * (3 - index % 2),
            "pause_s": float("nan") if index == 0 else 0.018 * (1 + index),
        }
        for index, at_s in enumerate(commits_s)
    ]


def _decisions(commits_s: list[float]) -> tuple[Decision, ...]:
    """One decision every five seconds: a move before each commit, keep otherwise."""
    return tuple(
        _decision(5.0 * tick, [e for e, at_s in enumerate(commits_s) if e and 0 <= at_s - 5.0 * tick < 5.0])
        for tick in range(1, 29)
    )


def _decision(at_s: float, moved: list[int]) -> Decision:
    action = ACTIONS[moved[0]] if moved else "keep"
    prices: tuple[tuple[Action, float, float, float], ...] = (
        ("keep", 4.8 if moved else 1.5, 0.0, 0.0),
        ("redistribute", 3.1, 9.4, 42e6),
        ("re-split", 1.6, 31.5, 28e6),
    )
    alternatives = tuple(
        Alternative(
            name,
            PLACEMENTS[0],
            latency_s=latency_s,
            net_gain=gain if moved else -abs(gain) / 9,
            weight_bytes=moved_bytes,
            pause_s=0.03,
        )
        for name, latency_s, gain, moved_bytes in prices
    )
    return Decision(
        at_s=at_s,
        action=action,
        reason=f"{action} gains 0.81 per request" if moved else "no alternative gains more than its move costs",
        urgent="chat misses its objective" if moved else "",
        chosen=next(option for option in alternatives if option.action == action),
        alternatives=alternatives,
        nodes=tuple(NodeConditions(node, True, 1e9, 0.15 if node == "tv" else 0.05, node == "hub") for node in LAYER_S),
        rates_rps={"chat": 0.5, "summary": 0.21},
        measured=Measured(4.6 if moved else 1.7, 12, ("chat",) if moved else ()),
    )
