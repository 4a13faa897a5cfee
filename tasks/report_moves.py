"""The report's table of moves: what each was predicted to cost and to bring, beside what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resplit.decide import Decision
from resplit.metrics import completed
from resplit.records import RunRecord

__all__ = ["MoveText", "move_rows"]

_AROUND_S = 20.0  # requests count that arrived so long before a move, or after it and before the next one


@dataclass(frozen=True)
class MoveText:
    """A move as a row. Each pair is predicted and measured; "-" is not known."""

    at_s: float
    action: str
    before: tuple[str, str]
    after: tuple[str, str]
    gain: tuple[str, str]
    moved: tuple[str, str]
    prepared: tuple[str, str]
    paused: tuple[str, str]


def move_rows(run: RunRecord) -> list[MoveText]:
    """The moves of a run that were chosen among alternatives and went live, in order of time."""
    by_epoch = {each.outcome.deployed: each for each in run.decisions if each.outcome and each.chosen}
    epochs = run.epochs.sort_values("time_s")
    times_s = [float(time_s) for time_s in epochs.time_s]
    live_s = zip([-math.inf, *times_s[:-1]], times_s, [*times_s[1:], math.inf], strict=True)
    costs = zip(epochs.moved_bytes, epochs.pause_s, strict=True)
    return [
        _row(run, by_epoch[int(epoch)], when_s, (float(moved_bytes), float(pause_s)))
        for epoch, when_s, (moved_bytes, pause_s) in zip(epochs.epoch, live_s, costs, strict=True)
        if int(epoch) in by_epoch
    ]


def _row(run: RunRecord, decision: Decision, when_s: tuple[float, float, float], cost: tuple[float, float]) -> MoveText:
    """A move. `when_s`: the placement before it went live, its own did, and the next one; `cost`: bytes and pause."""
    assert decision.chosen is not None
    (begin_s, live_s, end_s), (moved_bytes, pause_s) = when_s, cost
    chosen, keep = decision.chosen, decision.alternatives[0]
    before_s = _latency_s(run, max(begin_s, live_s - _AROUND_S), live_s)
    after_s = _latency_s(run, live_s, min(end_s, live_s + _AROUND_S))
    took_s = decision.outcome.prepare_s if decision.outcome else None
    return MoveText(
        live_s,
        decision.action,
        (_seconds(keep.latency_s), _seconds(before_s)),
        (_seconds(chosen.latency_s), _seconds(after_s)),
        (_seconds(keep.latency_s - chosen.latency_s), _seconds(before_s - after_s)),
        (_megabytes(chosen.weight_bytes + chosen.cache_bytes), _megabytes(moved_bytes)),
        (_seconds(chosen.transfer_s), _seconds(math.nan if took_s is None else took_s)),
        (_seconds(chosen.pause_s), _seconds(pause_s)),
    )


def _latency_s(run: RunRecord, from_s: float, until_s: float) -> float:
    """The mean latency of the requests that arrived in a time and completed; NaN if there are none."""
    done = run.requests[completed(run.requests)]
    done = done[(done.arrival_s >= from_s) & (done.arrival_s < until_s)]
    return float((done.end_s - done.arrival_s).mean())


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.2f} s" if math.isfinite(value) else "unbounded"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"
