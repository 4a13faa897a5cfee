"""What the simulated study says, for the page of a live study: means, regret of policies, worth of parts, energy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resplit.comparison import Measure
from resplit.policies import ABLATIONS
from tasks.plot_style import INK, MUTED, OTHER_COLOUR, RUN_COLOURS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SimulatedResults", "simulated_figures", "simulated_results"]

_ORACLE = "oracle"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)  # of a logarithmic axis
_NEAR = 0.1  # points that are relatively nearer to each other have one label, because two would overlap
Pair = tuple[float, float]  # a mean, and half of its interval; 0 if that is not known


@dataclass(frozen=True)
class SimulatedResults:
    """The metrics of each policy in one scenario over the seeds: each mean, and half of its interval as `NAME_ci95`."""

    policies: Mapping[str, Mapping[str, float | None]]

    def text(self, policy: str, measure: Measure) -> str:
        """The mean of a policy, as the page shows it; "-" where it is not known."""
        value = self.policies.get(policy, {}).get(measure.field)
        return measure.text(math.nan if value is None else value)

    @property
    def regrets(self) -> dict[str, Pair]:
        """The regret of each whole policy, the least one first."""
        known = {policy: _pair(metrics, "regret") for policy, metrics in self._known()}
        return dict(sorted(_finite(known).items(), key=lambda entry: entry[1][0]))

    @property
    def ablations(self) -> dict[str, Pair]:
        """The latency without each part of `resplit` over that of the whole; always in the same order."""
        known = {
            policy.removeprefix("resplit-").replace("-", " "): _pair(self.policies[policy], "latency_over_resplit")
            for policy in ABLATIONS
            if policy in self.policies
        }
        return _finite(known)

    @property
    def energies(self) -> dict[str, tuple[Pair, Pair]]:
        """Of each whole policy the mean latency (s) and the energy of a request (J), with halves of their intervals."""
        found = {
            policy: (_pair(metrics, "latency_mean_s"), _pair(metrics, "energy_j_per_request"))
            for policy, metrics in self._known()
        }
        return {policy: pairs for policy, pairs in found.items() if all(math.isfinite(mean) for mean, _ in pairs)}

    @property
    def front(self) -> list[str]:
        """The policies that no other one beats in both latency and energy, the fastest one first."""
        best: list[str] = []
        least_j = math.inf
        for policy, (_, (energy_j, _)) in sorted(self.energies.items(), key=lambda entry: entry[1]):
            if energy_j < least_j:
                best.append(policy)
                least_j = energy_j
        return best

    def _known(self) -> list[tuple[str, Mapping[str, float | None]]]:
        """The metrics of all policies but the limit, and `resplit` without a part."""
        left_out = {_ORACLE, *ABLATIONS}
        return [(policy, metrics) for policy, metrics in self.policies.items() if policy not in left_out]


def simulated_results(path: Path) -> dict[str, SimulatedResults]:
    """What the file at `path` says about each scenario; nothing if nobody simulated any."""
    if not path.exists():
        return {}
    return {name: SimulatedResults(found) for name, found in json.loads(path.read_text(encoding="utf-8")).items()}


def simulated_figures(results: Mapping[str, SimulatedResults], scenario: str) -> dict[str, Figure]:
    """The figures of a study by name: of the regrets and ablations of all scenarios, and the energy of one of them."""
    found = {}
    if regrets := {name: each.regrets for name, each in _first(results, scenario).items() if each.regrets}:
        found["regret"] = _regret_figure(regrets)
    if parts := {name: each.ablations for name, each in _first(results, scenario).items() if each.ablations}:
        found["ablation"] = _ablation_figure(parts)
    if scenario in results and results[scenario].energies:
        found["energy"] = _energy_figure(results[scenario])
    return found


def _first(results: Mapping[str, SimulatedResults], scenario: str) -> dict[str, SimulatedResults]:
    """The results with those of `scenario` before the others."""
    return dict(sorted(results.items(), key=lambda entry: entry[0] != scenario))


@styled
def _regret_figure(regrets: Mapping[str, Mapping[str, Pair]]) -> Figure:
    """By scenario, the mean latency of each policy over that of the oracle, with 95 % intervals over the seeds."""
    figure, panels = _panels(regrets, 2)
    for axes, (scenario, pairs) in zip(panels, regrets.items(), strict=True):
        means = [mean for mean, _ in pairs.values()]
        _with_intervals(axes, scenario, pairs)
        axes.barh(range(len(pairs)), means, color=[_colour(policy) for policy in pairs], height=0.66)
        if max(means) > 5:
            _logarithmic(axes, 0.9, 1.15 * max(mean + half for mean, half in pairs.values()))
        else:
            axes.set_xlim(left=0)
    figure.supxlabel("mean latency over that of the oracle", fontsize=9.5, color=MUTED)
    return figure


@styled
def _ablation_figure(parts: Mapping[str, Mapping[str, Pair]]) -> Figure:
    """By scenario, the mean latency without each part over that of the whole `resplit`, with 95 % intervals."""
    figure, panels = _panels(parts, 2)
    for axes, (scenario, pairs) in zip(panels, parts.items(), strict=True):
        _with_intervals(axes, scenario, pairs)
        axes.plot([mean for mean, _ in pairs.values()], range(len(pairs)), "o", color=RUN_COLOURS["adaptive"])
    figure.supxlabel("mean latency over that of the whole resplit", fontsize=9.5, color=MUTED)
    return figure


def _panels(scenarios: Mapping[str, Mapping[str, Pair]], columns: int) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each scenario, whose height suits the one with the most rows."""
    columns = min(columns, len(scenarios))
    rows = math.ceil(len(scenarios) / columns)
    height_in = 0.55 + 0.25 * max(len(pairs) for pairs in scenarios.values())
    figure, panels = new_figure(rows, 0.3 + rows * height_in, columns)
    for unused in panels[len(scenarios) :]:
        unused.set_visible(False)
    return figure, panels[: len(scenarios)]


def _with_intervals(axes: Axes, scenario: str, pairs: Mapping[str, Pair]) -> None:
    """The frame of a panel: a named row for each mean with its value and interval, and a line at 1."""
    places = range(len(pairs))
    means, halves = zip(*pairs.values(), strict=True)
    # The left end stays above 0, so that it can be drawn on a logarithmic axis.
    left = [min(half, 0.95 * mean) for mean, half in pairs.values()]
    axes.errorbar(means, places, xerr=[left, halves], fmt="none", ecolor=INK, elinewidth=0.9, capsize=2, zorder=3)
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    axes.set_yticks(list(places), [f"{name}  {_ratio_text(pair)}" for name, pair in pairs.items()])
    axes.invert_yaxis()
    axes.set_title(scenario)
    axes.grid(visible=False, axis="y")


def _ratio_text(pair: Pair) -> str:
    mean, half = pair
    return f"{mean:.2f}" + (f" ± {half:.2f}" if half else "")


@styled
def _energy_figure(results: SimulatedResults) -> Figure:
    """The mean latency of each policy against the energy of a request, and the front of those that nobody beats."""
    energies, front = results.energies, results.front
    figure, (axes,) = new_figure(1, 4.2)
    axes.plot(
        [energies[policy][0][0] for policy in front],
        [energies[policy][1][0] for policy in front],
        color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), zorder=1,
    )  # fmt: skip
    for policy, ((latency_s, its_half_s), (energy_j, its_half_j)) in energies.items():
        colour = _colour(policy)
        axes.errorbar(
            latency_s, energy_j, xerr=its_half_s, yerr=its_half_j,
            fmt="o", color=colour, ecolor=MUTED, elinewidth=0.8, markersize=5,
        )  # fmt: skip
    for point, policies in _alike(energies).items():
        label = ", ".join(policies)
        axes.annotate(label, point, xytext=(6, 4), textcoords="offset points", fontsize=8, color=INK)
    latencies_s = [latency_s for (latency_s, _), _ in energies.values()]
    if max(latencies_s) > 5 * min(latencies_s):
        _logarithmic(axes, 0.8 * min(latencies_s), 1.8 * max(latencies_s))
    axes.set_xlabel("mean latency, s")
    axes.set_ylabel("energy of a request, J")
    axes.set_ylim(bottom=0)
    return figure


def _alike(energies: Mapping[str, tuple[Pair, Pair]]) -> dict[Pair, list[str]]:
    """The policies at each point, in order of energy. One that is within a few per cent of another stands with it."""
    points: dict[Pair, list[str]] = {}
    for policy, ((latency_s, _), (energy_j, _)) in sorted(energies.items(), key=lambda entry: entry[1][1]):
        near = (point for point in points if abs(math.log(latency_s / point[0])) + abs(energy_j / point[1] - 1) < _NEAR)
        points.setdefault(next(near, (latency_s, energy_j)), []).append(policy)
    return points


def _logarithmic(axes: Axes, left: float, right: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_xticks([tick for tick in _TICKS if left <= tick <= right])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")


def _pair(metrics: Mapping[str, float | None], name: str) -> Pair:
    mean, half = metrics.get(name), metrics.get(f"{name}_ci95")
    return (math.nan if mean is None else float(mean), float(half or 0.0))


def _finite(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    return {name: pair for name, pair in pairs.items() if math.isfinite(pair[0])}


def _colour(policy: str) -> str:
    """The colour of the live runs for the two policies that run live; others have one of their own."""
    return {"static": RUN_COLOURS["static"], "resplit": RUN_COLOURS["adaptive"]}.get(policy, OTHER_COLOUR)
