"""The policy `learned`: a contextual bandit, trained in the simulator on other scenarios and seeds (flows/learn.py).

At each tick it chooses between two arms, keep and the best plan. Each arm has a linear model of its reward, which is
minus the logarithm of the mean latency in the seconds after, and the arm with the higher value is taken.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from resplit.decide import Decision
from resplit.policies.base import Occasion, Situation, best_placement, keep, move, utilization
from resplit.records import RunRecord

__all__ = ["ARMS", "FEATURES", "Bandit", "Learned", "Pull", "Rewarded", "rewards_of"]

ARMS = ("keep", "best plan")
FEATURES = (
    "log latency measured",
    "log latency predicted",
    "log gain",
    "transfer over horizon",
    "most busy",
    "objective missed",
)
_TRAINED = Path(__file__).with_name("learned.json")
_REWARDED_S = 12.0  # requests that arrive within this time show what a choice was worth
_LOG_LIMIT = 3.0  # of the logarithms, which are infinite where nothing can serve


@dataclass(frozen=True)
class Bandit:
    """The linear models: `weights` (arms, features) and `intercepts` (arms,)."""

    weights: tuple[tuple[float, ...], ...]
    intercepts: tuple[float, ...]

    def best_arm(self, context: tuple[float, ...]) -> int:
        """The arm with the highest value; keep where they are equal."""
        return int(np.argmax(np.array(self.weights) @ np.array(context) + np.array(self.intercepts)))

    @classmethod
    def load(cls, path: Path = _TRAINED) -> Bandit:
        """Read what `save` wrote; the shipped one by default."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(map(tuple, content["weights"])), tuple(content["intercepts"]))

    def save(self, path: Path = _TRAINED) -> None:
        """Write the models, with the names of arms and features."""
        content = {"arms": ARMS, "features": FEATURES, "weights": self.weights, "intercepts": self.intercepts}
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Pull:
    """An arm that was taken at `at_s`, and in which context."""

    at_s: float
    context: tuple[float, ...]
    arm: int


@dataclass(frozen=True)
class Rewarded:
    """A pull with its reward: minus the logarithm of the mean latency afterwards."""

    pull: Pull
    reward: float


def rewards_of(record: RunRecord, pulls: Sequence[Pull]) -> list[Rewarded]:
    """The pulls after which requests arrived and were served."""
    done = record.requests[record.requests.status == 200]
    rewarded = []
    for pull in pulls:
        after = done[done.arrival_s.between(pull.at_s, pull.at_s + _REWARDED_S)]
        if len(after):
            rewarded.append(Rewarded(pull, -math.log((after.end_s - after.arrival_s).mean())))
    return rewarded


class Learned:
    """Takes the arm that its models value most; with probability `explore` any. `pulls` are what it took."""

    asked: ClassVar[frozenset[Occasion]] = frozenset({"tick"})

    def __init__(self, bandit: Bandit | None = None, explore: float = 0.0) -> None:
        self._bandit = bandit or Bandit.load()
        self._explore = explore
        self.pulls: list[Pull] = []

    def decide(self, situation: Situation, rng: np.random.Generator) -> Decision:
        """Keep, or the best plan. Shortly after a move it always keeps."""
        last = situation.history.last
        if last is not None and situation.now_s < last.at_s + situation.settings.cooldown_s:
            return keep(situation, f"the last move was {situation.now_s - last.at_s:.0f} s ago")
        option = move(situation, best_placement(situation), "the bandit values the best plan more")
        if option.action == "keep":
            return keep(situation, "the best plan is today's placement")
        context = _context(situation, option)
        explores = rng.random() < self._explore
        arm = int(rng.integers(len(ARMS))) if explores else self._bandit.best_arm(context)
        self.pulls.append(Pull(situation.now_s, context, arm))
        return option if arm else keep(situation, "the bandit values keeping more")


def _context(situation: Situation, option: Decision) -> tuple[float, ...]:
    """The features of a choice between today's placement and `option`."""
    assert option.chosen is not None
    kept, measured = option.alternatives[0], situation.measured
    predicted = _log(kept.latency_s)
    return (
        _log(measured.latency_s) if measured else predicted,
        predicted,
        _log(kept.objective / option.chosen.objective) if math.isfinite(option.chosen.objective) else 0.0,
        min(1.0, option.chosen.transfer_s / situation.settings.horizon_s),
        min(1.0, max(utilization(situation).values())),
        float(bool(measured and measured.slo_missed)),
    )


def _log(value: float) -> float:
    return float(np.clip(math.log(value), -_LOG_LIMIT, _LOG_LIMIT)) if value > 0 else -_LOG_LIMIT
