"""False alarms: how often the detector of changes is alarmed in a calm cluster, from what it was shown.

    python -m benchmarks.false_alarms record calm.json [--seconds 120] [--streams 2]
    python -m benchmarks.false_alarms replay calm.json ...
    python -m benchmarks.false_alarms watch [--seconds 3600]
    python -m benchmarks.false_alarms runs [data/generated/study]

`record` runs the emulated home cluster under a load that does not change, with plans and blocks made ready and the fast
loop armed, and writes all passes, reports and probes that the detector was shown. `replay` shows recordings to the
detector of this version, and prints every alarm, and the alarms in an hour of exposure. Nothing changed, so each of
them is false. At its end, `record` also compares the estimate with what the cluster file declares. A controller keeps
what its detector was shown for some minutes only, so longer runs are watched: `watch` prints each alarm of a running
detector, and counts the moves.

`runs` counts the alarms in all runs of a study that no change of the scenario explains, and needs no cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from benchmarks.reaction import MODEL, streams
from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import running
from resplit.decide import Settings
from resplit.errors import DataError
from resplit.estimate import RECORDING, Recording
from resplit.estimate.error import EstimateErrors, estimate_errors
from resplit.reaction import false_alarms
from resplit.records import RunRecord

HOUR_S = 3600.0
SETTINGS = Settings(horizon_s=60.0, trial_s=30.0)


async def calm(url: str, count: int, seconds: float) -> None:
    """Keep `count` requests running for so long."""
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    await streams(url, count, stop, [])


@contextlib.contextmanager
def calm_cluster(cluster_file: Path, state: Path, count: int, seconds: float) -> Iterator[ControlClient]:
    """A cluster after so many seconds of a calm run with the fast loop armed."""
    with running(cluster_file, state, MODEL) as cluster, ControlClient(cluster.url, cluster.token) as client:
        first_plan(cluster)
        client.arm_fast_loop(SETTINGS, HOUR_S)
        asyncio.run(calm(cluster.url, count, seconds))
        yield client


def record(cluster_file: Path, state: Path, count: int, seconds: float) -> tuple[Recording, EstimateErrors]:
    """What the detector is shown in a calm run of a cluster, and the errors of the estimate at its end."""
    with calm_cluster(cluster_file, state, count, seconds) as client:
        recording = client.observations()
        cost = next(seen.cost for seen in reversed(recording.observations) if seen.cost)
        return recording, estimate_errors(client.cluster(), recording.features, cost, client.estimates())


def watched(cluster_file: Path, state: Path, count: int, seconds: float) -> str:
    """The alarms of a calm run, the moves, and how many alarms that are in an hour."""
    begun_s = time.time()
    with calm_cluster(cluster_file, state, count, seconds) as client:
        decisions = client.decisions()
    alarms = [(decision, seen) for decision in decisions for seen in decision.seen]
    lines = [f"{decision.at_s - begun_s:.1f} s: {seen} ({decision.action})" for decision, seen in alarms]
    moves = sum(decision.action != "keep" for decision in decisions)
    return "\n".join([*lines, f"{in_an_hour(len(alarms), seconds)}; {moves} moves"])


def read(path: Path) -> Recording:
    """A recording from a file. DataError if it is none."""
    try:
        return RECORDING.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: is no recording of this version: {error}; make one with `record`") from error


def replayed(paths: Sequence[Path]) -> str:
    """The alarms in recordings of calm runs, and how many that are in an hour."""
    lines, alarms, exposure_s = [], 0, 0.0
    for path in paths:
        recording = read(path)
        begun_s = recording.observations[0].at_s if recording.observations else 0.0
        changes = recording.changes()
        lines += [f"{path}, {change.at_s - begun_s:.1f} s: {change}" for change in changes]
        alarms += len(changes)
        exposure_s += recording.duration_s
    return "\n".join([*lines, in_an_hour(alarms, exposure_s)])


def in_an_hour(alarms: float, exposure_s: float) -> str:
    """So many alarms in a time, in words."""
    rate = HOUR_S * alarms / exposure_s if exposure_s else float("nan")
    return f"{alarms:.0f} alarms in {exposure_s:.0f} s: {rate:.1f} in an hour"


def in_runs(folder: Path) -> str:
    """The runs of studies below a folder that had false alarms, and how many that are in an hour of all runs."""
    paths = [each.parent for each in sorted(folder.rglob("run.json")) if each.parent.suffix != ".unfinished"]
    lines, alarms, exposure_s = [], 0.0, 0.0
    for path in paths:
        record = RunRecord.load(path)
        found, seconds = false_alarms(record)
        if math.isnan(found):  # its policy is not asked at alarms
            continue
        if found:
            lines.append(f"{record.scenario}, {record.policy}, seed {record.seed}: {found:.0f}")
        alarms += found
        exposure_s += seconds
    return "\n".join([*lines, in_an_hour(alarms, exposure_s)])


def main() -> None:
    """Record a calm run, or replay recordings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record")
    recorder.add_argument("file", type=Path)
    for each in (recorder, commands.add_parser("watch")):
        each.add_argument("--cluster", type=Path, default=Path("data/clusters/home.yaml"))
        each.add_argument("--state", type=Path, default=Path(".resplit/false_alarms"))
        each.add_argument("--seconds", type=float, default=120.0)
        each.add_argument("--streams", type=int, default=2)
    commands.add_parser("replay").add_argument("files", type=Path, nargs="+")
    commands.add_parser("runs").add_argument("folder", type=Path, nargs="?", default=Path("data/generated/study"))
    given = parser.parse_args()
    if given.command == "replay":
        sys.stdout.write(f"{replayed(given.files)}\n")
        return
    if given.command == "runs":
        sys.stdout.write(f"{in_runs(given.folder)}\n")
        return
    run = given.cluster, given.state, given.streams, given.seconds
    if given.command == "watch":
        sys.stdout.write(f"{watched(*run)}\n")
        return
    recording, errors = record(*run)
    given.file.write_bytes(RECORDING.dump_json(recording))
    sys.stdout.write(f"{replayed([given.file])}\n\n{errors}\n")


if __name__ == "__main__":
    main()
