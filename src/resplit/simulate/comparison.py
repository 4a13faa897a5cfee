"""Simulated runs side by side: the results of `resplit simulate` over seeds, with intervals and paired ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from resplit.intervals import Interval, interval
from resplit.simulate.oracle import ORACLE
from resplit.simulate.result import SimulatedResult

__all__ = ["compared_runs", "table_of"]

_RATIOS = {"regret": ORACLE, "latency_over_resplit": "resplit"}  # of mean latencies: to which policy
_SHOWN = ("latency_mean_s", "latency_p95_s", "qos_met", "regret", "reconfigurations", "energy_j_per_request")


def compared_runs(runs: Iterable[SimulatedResult]) -> dict[str, dict[str, dict[str, Interval]]]:
    """By scenario and policy, each metric over the seeds: its mean, and half of its 95 % interval.

    `regret` is the mean latency of a run over that of the oracle with the same seed, `latency_over_resplit` over that
    of `resplit`: what an ablation loses. They are NaN where the other policy was not run.
    """
    by_key = {(found.scenario, found.policy, found.seed): found for found in runs}
    values: dict[tuple[str, str], list[dict[str, float]]] = {}
    for (scenario, policy, seed), found in sorted(by_key.items()):
        ratios = {name: _ratio(found, by_key.get((scenario, other, seed))) for name, other in _RATIOS.items()}
        values.setdefault((scenario, policy), []).append(found.figures() | ratios)
    compared: dict[str, dict[str, dict[str, Interval]]] = {}
    for (scenario, policy), seeds in values.items():
        names = list(dict.fromkeys(name for each in seeds for name in each))
        compared.setdefault(scenario, {})[policy] = {
            name: interval([each.get(name, math.nan) for each in seeds]) for name in names
        }
    return compared


def table_of(compared: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> str:
    """The most important metrics as a table in Markdown, best policy of each scenario first."""
    lines = ["| scenario | policy | " + " | ".join(_SHOWN) + " |", "| --- " * (2 + len(_SHOWN)) + "|"]
    for scenario, policies in compared.items():
        for policy in sorted(policies, key=lambda name: policies[name]["latency_mean_s"][0]):
            cells = [_text(policies[policy].get(name, (math.nan, math.nan))) for name in _SHOWN]
            lines.append(f"| {scenario} | {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _ratio(found: SimulatedResult, other: SimulatedResult | None) -> float:
    if other is None or not other.metrics.latency_mean_s:
        return math.nan
    return found.metrics.latency_mean_s / other.metrics.latency_mean_s


def _text(pair: Interval) -> str:
    mean, half = pair
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")
