"""Simulated runs side by side: the objects of `resplit simulate` over seeds, with intervals and regret."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from resplit.intervals import Interval, interval
from resplit.simulate.oracle import ORACLE

__all__ = ["Found", "compared_runs", "table_of"]

Found = Mapping[str, Any]  # one object of `resplit simulate`
_SHOWN = ("latency_mean_s", "latency_p95_s", "qos_met", "regret", "reconfigurations", "energy_j_per_request")
_NOT_COMPARED = ("policy", "scenario", "seed", "wall_s")


def compared_runs(runs: Iterable[Found]) -> dict[str, dict[str, dict[str, Interval]]]:
    """By scenario and policy, each metric over the seeds: its mean, and half of its 95 % interval.

    `regret` is the mean latency of a run over that of the oracle with the same seed; NaN without an oracle.
    """
    by_key = {(found["scenario"], found["policy"], found["seed"]): found for found in runs}
    values: dict[tuple[str, str], list[dict[str, float]]] = {}
    for (scenario, policy, seed), found in sorted(by_key.items()):
        best = by_key.get((scenario, ORACLE, seed))
        values.setdefault((scenario, policy), []).append(_numbers(found) | {"regret": _regret(found, best)})
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


def _numbers(found: Found) -> dict[str, float]:
    numbers = {name: math.nan if value is None else value for name, value in found.items()}
    return {
        name: float(value)
        for name, value in numbers.items()
        if isinstance(value, int | float) and name not in _NOT_COMPARED
    }


def _regret(found: Found, best: Found | None) -> float:
    if best is None or not best["latency_mean_s"] or found["latency_mean_s"] is None:
        return math.nan
    return float(found["latency_mean_s"]) / float(best["latency_mean_s"])


def _text(pair: Interval) -> str:
    mean, half = pair
    if not math.isfinite(mean):
        return "-"
    return f"{mean:.3g}" + (f" ± {half:.2g}" if math.isfinite(half) else "")
