"""What the simulated study says about one scenario, for the page of a live study: means, and the regret of policies."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resplit.comparison import Measure
from tasks.plot_style import MUTED, OTHER_COLOUR, RUN_COLOURS, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SimulatedResults", "regret_figure", "simulated_results"]

_ORACLE = "oracle"


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


def _colour(policy: str) -> str:
    """The colour of the live runs for the two policies that run live; others have one of their own."""
    return {"static": RUN_COLOURS["static"], "resplit": RUN_COLOURS["adaptive"]}.get(policy, OTHER_COLOUR)
