"""What a simulated run came to: the object that `resplit simulate` prints, as a value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from pydantic import TypeAdapter

from resplit.metrics import RunMetrics, energy_j_per_request, summarise
from resplit.records import RunRecord
from resplit.simulate.world import World

__all__ = ["SimulatedResult"]

_NOT_COMPARED = ("policy", "scenario", "seed", "wall_s")


@dataclass(frozen=True)
class SimulatedResult:
    """One run in figures. `wall_s` is what it took to simulate; NaN where a figure is not known."""

    policy: str
    scenario: str
    seed: int
    simulated_s: float
    wall_s: float
    energy_j_per_request: float
    metrics: RunMetrics

    @classmethod
    def of(cls, world: World, record: RunRecord, wall_s: float) -> SimulatedResult:
        """The figures of a run of `world`."""
        power_w = {node.name: node.compute_w for node in world.cluster.nodes}
        return cls(
            record.policy,
            world.scenario.name,
            record.seed,
            world.scenario.duration,
            round(wall_s, 3),
            energy_j_per_request(record, power_w),
            summarise(record),
        )

    @classmethod
    def from_json(cls, content: str) -> SimulatedResult:
        """The result whose `to_json` is `content`, up to the rounding."""
        found = {name: math.nan if value is None else value for name, value in json.loads(content).items()}
        metrics = {each.name: found.pop(each.name) for each in fields(RunMetrics)}
        return _RESULT.validate_python(found | {"metrics": metrics})

    def to_json(self) -> dict[str, str | int | float | None]:
        """One flat object: rounded as in reports/metrics.json, null for NaN."""
        return {name: _plain(value) for name, value in self._flat().items()}

    def figures(self) -> dict[str, float]:
        """What can be compared over seeds, by name."""
        return {name: float(value) for name, value in self._flat().items() if name not in _NOT_COMPARED}

    def _flat(self) -> Mapping[str, str | int | float]:
        flat = asdict(self)
        metrics: dict[str, float] = flat.pop("metrics")
        return flat | metrics


_RESULT = TypeAdapter(SimulatedResult)


def _plain(value: str | float) -> str | int | float | None:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
