"""Experiments on machines with real links and processors: namespaces and control groups of this one. Needs root.

    python -m benchmarks.testbed home-day               # on the testbed: seven minutes
    python -m benchmarks.testbed home-day --emulated    # the same on emulated hardware
    python -m benchmarks.testbed disturbed              # ten minutes of jitter, loss and stalls
    python -m benchmarks.testbed clean                  # removes what a run that was killed has left

Prints tables; home-day also writes reports/testbed/. docs/emulation.md explains the results.
"""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.testbed import disturbed, home_day
from benchmarks.testbed.groups import remove_groups
from benchmarks.testbed.machines import Pace
from benchmarks.testbed.network import remove_namespaces
from benchmarks.testbed.tools import require
from flows.command import run_command
from flows.params import load_params
from resplit.comparison import summaries
from resplit.scenario import load_scenario

REPORTS = Path("reports/testbed")
SHOWN = (
    "offered",
    "latency_mean_s",
    "latency_p95_s",
    "first_token_mean_s",
    "time_per_token_s",
    "waited_mean_s",
    "computed_mean_s",
    "hops_mean_s",
    "qos_met",
    "downtime_incidents",
    "reconfigurations",
    "reaction_noticed_p50_s",
    "reaction_live_p50_s",
    "false_alarms",
)


def table(metrics: dict[str, dict[str, float]]) -> str:
    """The metrics by run, as Markdown."""
    lines = [f"| | {' | '.join(metrics)} |", "| --- |" + " --- |" * len(metrics)]
    for name in SHOWN:
        values = " | ".join(f"{each[name]:.3f}".rstrip("0").rstrip(".") for each in metrics.values())
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.testbed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("home-day", "disturbed", "clean"))
    parser.add_argument("--emulated", action="store_true", help="home-day on emulated hardware instead; needs no root")
    parser.add_argument("--state", type=Path, default=Path(".resplit/testbed"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600.0, help="of disturbed (default: %(default)s)")
    parser.add_argument("--speed", type=float, default=5.0, help="factor on that of nodes (default: %(default)s)")
    parser.add_argument("--load", type=float, default=2.0, help="factor on load and deadlines (default: %(default)s)")
    run_command(lambda: run(parser.parse_args()))


def run(given: argparse.Namespace) -> None:
    """Run the experiment that was asked for, and print its table."""
    params, pace = load_params(), Pace(given.speed, given.load)
    if not given.emulated:
        require()
    if given.experiment == "clean":
        remove_groups()
        remove_namespaces()
    elif given.experiment == "disturbed":
        sys.stdout.write(disturbed.disturb(params, given.state, given.seconds, pace).text() + "\n")
    else:
        _home_day(given)


def _home_day(given: argparse.Namespace) -> None:
    params = load_params()
    scenario = load_scenario(params.scenario)
    load_before = os.getloadavg()[0]
    if given.emulated:
        records = home_day.on_emulation(params, scenario, given.state / "emulated")
    else:
        records = home_day.on_testbed(params, scenario, given.state / "machines", Pace(given.speed, given.load))
    metrics = {label: asdict(each) for label, each in summaries(records).items()}
    path = REPORTS / f"home-day-{'emulated' if given.emulated else 'testbed'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    loads = f"load of the machine before and after: {load_before:.1f} and {os.getloadavg()[0]:.1f}"
    sys.stdout.write(f"{table(metrics)}\n\n{loads}\n{path}\n")


if __name__ == "__main__":
    main()
