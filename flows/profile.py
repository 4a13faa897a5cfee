"""Profile a running cluster: time its blocks and links, validate the telemetry, fit the cost model and keep it."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import time
from pathlib import Path

from prefect import flow

from flows import STATE
from flows.command import run_command
from resplit.cluster.client import ControlClient
from resplit.cost import CostModel
from tasks.fit import fit
from tasks.observe import profile as time_blocks
from tasks.validate import Need, ValidTelemetry, validate


@flow(name="profile", validate_parameters=False)
def profile(url: str = "http://127.0.0.1:8080", state: Path = STATE) -> tuple[ValidTelemetry, CostModel]:
    """Profile the cluster and fit the cost model, which is kept in the state folder; returns both."""
    with ControlClient.from_state(url, state) as client:
        telemetry, nodes = time_blocks(client), client.cluster().node_names
        live = client.model()
        need, quarantine = Need(reports=1, messages=1), state / "quarantine"
        valid = validate(telemetry, nodes, live.features, time.time(), quarantine, live.unused, need)
    return valid, fit(valid.telemetry, live.features, state / "cost.json")


def main() -> None:
    """`python -m flows.profile`: one profile of a running cluster."""
    parser = argparse.ArgumentParser(description=profile.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=STATE, help="the cluster's state folder (default: %(default)s)")
    given = parser.parse_args()
    run_command(lambda: profile(given.url, given.state))


if __name__ == "__main__":
    main()
