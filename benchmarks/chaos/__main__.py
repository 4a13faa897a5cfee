"""`python -m benchmarks.chaos [--only NAME ...] [--scale S]`: runs experiments, writes reports/chaos.md and .json."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from benchmarks.chaos import EXPERIMENTS, experiment
from benchmarks.chaos.findings import ChaosReport, Finding

REPORTS = Path(__file__).parents[2] / "reports"


def main() -> int:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM, too, must end the clusters' processes
    report = ChaosReport(arguments.scale, time.strftime("%Y-%m-%d %H:%M"))
    for name in arguments.only or EXPERIMENTS:
        print(f"{name} ...", flush=True)
        begun_s = time.monotonic()
        report.add(name, _findings(name, arguments.scale, arguments.reports), time.monotonic() - begun_s)
        report.write(arguments.reports)  # after each one: Ctrl-C loses only the one that runs
        for finding in report.findings:
            if finding.experiment == name:
                print(f"  {_mark(finding)} {finding.what}: {finding.measured}", flush=True)
    print(f"wrote {arguments.reports / 'chaos.md'}")
    return 1 if any(finding.met is False for finding in report.findings) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--scale", type=float, default=1.0, help="how many repeats, relative to the full length")
    parser.add_argument("--reports", type=Path, default=REPORTS, help="where tables, plots and logs go")
    return parser.parse_args()


def _findings(name: str, scale: float, reports: Path) -> list[Finding]:
    """Run one experiment. An exception becomes a finding, so that the other experiments still run."""
    folder = reports / "chaos" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        return asyncio.run(experiment(name)(scale, folder))
    except Exception as error:
        traceback.print_exc()
        return [Finding(name, "ran to its end", f"{type(error).__name__}: {error}", "no error", met=False)]


def _mark(finding: Finding) -> str:
    return {True: "ok ", False: "NOT", None: "   "}[finding.met]


if __name__ == "__main__":
    sys.exit(main())
