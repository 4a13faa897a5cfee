"""Simulator against reality: the runs of a study, simulated with their own requests and placements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from resplit.comparison import MEASURES, SATURATED, run_label
from resplit.errors import ResplitError
from resplit.metrics import RunMetrics, summarise
from resplit.model import DEFAULT_MODEL
from resplit.records import RunRecord
from resplit.simulate.replay import replayed
from resplit.simulate.world import World

__all__ = ["REALITY", "reality_rows", "replays_of"]

REALITY = (
    "latency_mean_s", "latency_p95_s", "qos_met", "waited_mean_s", "computed_mean_s", "hops_mean_s",
)  # fmt: skip
_log = structlog.get_logger(__name__)


def replays_of(runs: Sequence[RunRecord], model: str, scenario: Path, cluster: Path) -> dict[str, RunRecord]:
    """Each run simulated, by its label. None is where the simulator does not know the hardware or the model."""
    if model != DEFAULT_MODEL:
        return {}
    try:
        world = World.load(scenario, cluster)
        return {run_label(run): replayed(world, run) for run in runs if run.scenario != SATURATED}
    except ResplitError as error:
        _log.info("the runs are not compared with the simulator", reason=str(error))
        return {}


def reality_rows(runs: Mapping[str, RunRecord], replays: Mapping[str, RunRecord]) -> list[tuple[str, ...]]:
    """For each run that was simulated, its label and for each measure of `REALITY` both values, with the difference."""
    return [
        (label, *(_cell(name, summarise(runs[label]), summarise(replays[label])) for name in REALITY))
        for label in runs
        if label in replays
    ]


def _cell(name: str, measured: RunMetrics, simulated: RunMetrics) -> str:
    measure = next(each for each in MEASURES if each.field == name)
    real, ours = getattr(measured, name), getattr(simulated, name)
    text = f"{measure.text(real)}, {measure.text(ours)}"
    if measure.unit == "%" or not real or math.isnan(real) or math.isnan(ours):
        return text
    return f"{text} ({(ours / real - 1) * 100:+.0f} %)"
