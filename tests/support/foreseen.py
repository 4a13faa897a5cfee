"""A scenario in which the fast one of three devices throttles, and the moves that are foreseen for it."""

from __future__ import annotations

from typing import Any

from resplit.config import parse_cluster
from resplit.policies import make_policy
from resplit.policies.foresight import ForeseenMove, foresee
from resplit.scenario import ScenarioConfig
from tests.support.decisions import FAST, SETTINGS, SLOW, halves, problem
from tests.support.three_devices import THREE_DEVICES

START = halves(FAST, SLOW, 6)
CLUSTER = parse_cluster(THREE_DEVICES, "three.yaml")


def slowed(*changes: dict[str, Any]) -> ScenarioConfig:
    return ScenarioConfig.model_validate({"name": "day", "duration": "60 s", "nodes": changes})


def moves() -> list[ForeseenMove]:
    scenario = slowed(
        {"at": "5 s", "node": FAST, "slowdown": 9, "label": "throttles"},
        {"at": "9 s", "node": FAST, "background_utilization": 0.001, "label": "no matter"},
        {"at": "20 s", "node": FAST, "slowdown": 1, "label": "cools down"},
    )
    return foresee(problem(START), CLUSTER, scenario, make_policy("clairvoyant"), SETTINGS)
