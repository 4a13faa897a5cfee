"""What the simulated study says about one scenario, for the page of a live study: means, and the regret of policies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resplit.comparison import Measure
from tasks.plot_style import INK, MUTED, OTHER_COLOUR, RUN_COLOURS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SimulatedResults", "energy_figure", "regret_figure", "simulated_results"]

_ORACLE = "oracle"
Pair = tuple[float, float]  # a mean, and half of its interval; 0 if that is not known


@dataclass(frozen=True)
class SimulatedResults:
    """The metrics of each policy over the seeds, as `reports/simulated/metrics.json` has them: `NAME`, `NAME_ci95`."""

    policies: Mapping[str, Mapping[str, float | None]]

    def text(self, policy: str, measure: Measure) -> str:
        """The mean of a policy, as the page shows it; "-" where it is not known."""
        value = self.policies.get(policy, {}).get(measure.field)
        return measure.text(math.nan if value is None else value)

    @property
    def regrets(self) -> dict[str, tuple[float, float]]:
        """The regret of each policy with half of its interval (0 if that is not known), the least one first."""
        known = {
            policy: (float(metrics["regret"] or 0.0), float(metrics.get("regret_ci95") or 0.0))
            for policy, metrics in self.policies.items()
            if metrics.get("regret") is not None and policy != _ORACLE
        }
        return dict(sorted(known.items(), key=lambda entry: entry[1][0]))

    @property
    def energies(self) -> dict[str, tuple[Pair, Pair]]:
        """Of each policy the mean latency (s) and the energy of a request (J), each with half of its interval."""
        found = {policy: (_pair(m, "latency_mean_s"), _pair(m, "energy_j_per_request")) for policy, m in self._known()}
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
        return [(policy, metrics) for policy, metrics in self.policies.items() if policy != _ORACLE]


def simulated_results(path: Path, scenario: str) -> SimulatedResults | None:
    """What the file at `path` says about a scenario; None if nobody simulated it."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8")).get(scenario)
    return SimulatedResults(found) if found else None


@styled
def regret_figure(results: SimulatedResults) -> Figure:
    """The mean latency of each policy relative to that of the oracle, with 95 % intervals over the seeds."""
    regrets = results.regrets
    figure, (axes,) = new_figure(1, 0.7 + 0.27 * len(regrets))
    places = range(len(regrets))
    colours = [_colour(policy) for policy in regrets]
    means = [mean for mean, _ in regrets.values()]
    axes.barh(places, means, color=colours, height=0.66)
    axes.errorbar(
        means, places, xerr=[half for _, half in regrets.values()], fmt="none", ecolor=MUTED, elinewidth=1.2, capsize=2
    )
    axes.set_yticks(list(places), list(regrets))
    axes.invert_yaxis()
    axes.axvline(1.0, color=MUTED, linewidth=1, linestyle=(0, (4, 2)))
    if max(means) > 5:
        axes.set_xscale("log")
    axes.set_xlabel("mean latency over that of the oracle")
    axes.grid(visible=False, axis="y")
    return figure


@styled
def energy_figure(results: SimulatedResults) -> Figure:
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
        axes.annotate(policy, (latency_s, energy_j), xytext=(6, 4), textcoords="offset points", fontsize=8, color=INK)
    latencies_s = [latency_s for (latency_s, _), _ in energies.values()]
    if max(latencies_s) > 5 * min(latencies_s):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    axes.set_xlabel("mean latency, s")
    axes.set_ylabel("energy of a request, J")
    axes.set_ylim(bottom=0)
    return figure


def _pair(metrics: Mapping[str, float | None], name: str) -> Pair:
    mean, half = metrics.get(name), metrics.get(f"{name}_ci95")
    return (math.nan if mean is None else float(mean), float(half or 0.0))


def _colour(policy: str) -> str:
    """The colour of the live runs for the two policies that run live; others have one of their own."""
    return {"static": RUN_COLOURS["static"], "resplit": RUN_COLOURS["adaptive"]}.get(policy, OTHER_COLOUR)
