"""The changes of a scenario are made in the cluster, and taken back."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from resplit.config import parse_cluster
from resplit.phases import phases_of
from resplit.scenario import ScenarioConfig
from tasks.changes import play, reset
from tests.support.decisions import FAR, FAST, SLOW
from tests.support.three_devices import THREE_DEVICES

DECLARED = parse_cluster(THREE_DEVICES, "three.yaml")
DAY = ScenarioConfig.model_validate(
    {
        "name": "day",
        "duration": "1 s",
        "nodes": [
            {"at": "0.01 s", "node": FAR, "up": False, "label": "lost"},
            {"at": "0.02 s", "node": SLOW, "slowdown": 4, "label": "throttles"},
            {"at": "0.04 s", "node": FAR, "up": True, "label": "back"},
        ],
        "links": [{"at": "0.02 s", "between": [FAST, FAR], "latency": "50 ms", "label": "far away"}],
    }
)


@dataclass
class Playground:
    """Stands in for a cluster and its control API; `events` are the calls that change something, in order."""

    config: Any = DECLARED
    held_down: set[str] = field(default_factory=set)
    events: list[Any] = field(default_factory=list)

    def hold_down(self, name: str) -> None:
        self.held_down.add(name)
        self.events.append(("down", name))

    def start_again(self, name: str) -> None:
        self.held_down.discard(name)
        self.events.append(("up", name))

    def status(self) -> Any:
        nodes = [SimpleNamespace(node=name, answers=name not in self.held_down) for name in DECLARED.node_names]
        return SimpleNamespace(nodes=nodes)

    def emulate_node(self, node: str, slowdown: float, background_utilization: float) -> None:
        assert node not in self.held_down
        self.events.append((node, slowdown, background_utilization))

    def emulate_link(self, one: str, other: str, latency_s: float, _bandwidth_bytes_per_s: float) -> None:
        assert not self.held_down & {one, other}
        self.events.append((one, other, pytest.approx(latency_s)))


async def test_changes_are_made_in_order_and_a_node_that_returns_learns_what_it_missed() -> None:
    ground: Any = Playground()
    await play(ground, ground, phases_of(DECLARED, DAY), time.monotonic())
    assert ground.events == [
        ("down", FAR),
        (SLOW, 4, 0.0),
        ("up", FAR),
        (FAR, 1.0, 0.0),
        (FAR, FAST, 0.05),
    ]


async def test_afterwards_everything_is_as_declared_again() -> None:
    ground: Any = Playground()
    await play(ground, ground, phases_of(DECLARED, DAY)[:3], time.monotonic())
    ground.events.clear()
    reset(ground, ground, DECLARED, DAY)
    assert ground.events == [("up", FAR), (FAR, 1.0, 0.0), (SLOW, 1.0, 0.0), (FAR, FAST, 0.002)]
