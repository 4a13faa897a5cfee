"""Demo: an emulated cluster, a load and the control loop, to be watched on the live page until Ctrl-C."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import itertools
import os
import sys
import threading
import time
from pathlib import Path

import structlog

from flows import STATE
from flows.adapt import adapt
from flows.command import run_command
from flows.params import Params, load_params
from resplit.cluster.client import ControlClient
from resplit.cluster.first_plan import first_plan
from resplit.cluster.local import Cluster, running
from resplit.cluster.supervision import supervised
from resplit.errors import ResplitError
from resplit.process.logs import log_errors_only
from resplit.scenario import ScenarioConfig, load_scenario
from resplit.workload import schedule_requests
from tasks.changes import reset
from tasks.workload import load_words, send

_log = structlog.get_logger(__name__)
_AGAIN_AFTER_S = 2.0
_FIRST_TICK_WITHIN_S = 120.0


def demo(params: Params, port: int, undisturbed: bool, state: Path = STATE) -> None:
    """Run the cluster of `params`, and its scenario again and again, until interrupted. Prints the page's address.

    `undisturbed`: the load of the scenario, without its changes of nodes and links.
    """
    scenario = load_scenario(params.scenario)
    if undisturbed:
        scenario = scenario.model_copy(update={"nodes": (), "links": (), "load": (), "traces": ()})
    with running(params.cluster, state, params.model, port) as cluster, supervised(cluster, cluster.processes):
        first_plan(cluster)
        with ControlClient(cluster.url, cluster.token) as control:  # the fast loop need not wait for the first tick
            control.arm_fast_loop(params.adapt.settings(), _FIRST_TICK_WITHIN_S)
        sys.stdout.write(f"\nThe live page: {cluster.url}/#token={cluster.token}\n(Ctrl-C stops it all)\n\n")
        sys.stdout.flush()
        # It ends with this process: a thread that waits for answers of a cluster cannot be interrupted.
        threading.Thread(target=_serve, args=(cluster, params, scenario), name="load", daemon=True).start()
        os.nice(10)  # real machines do not share their cores with the control loop
        try:
            _adapt(cluster, params, state)
        finally:
            sys.stderr.write("stopping\n")
            log_errors_only()  # requests are under way
            threading.excepthook = lambda broken: None  # so is the thread of the load


def _serve(cluster: Cluster, params: Params, scenario: ScenarioConfig) -> None:
    """Send the workload round after round, each with other requests, and set back what the scenario changed."""
    words = load_words(params.prompts)
    with ControlClient(cluster.url, cluster.token) as control:
        for seed in itertools.count(params.seed):
            requests = schedule_requests(cluster.config, scenario, seed, words)
            try:
                send(cluster, control.model().name, requests, scenario)
                reset(control, cluster, cluster.config, scenario)
            except ResplitError as error:  # somebody killed what the scenario was about to change
                _log.warning("the scenario begins again", reason=str(error))
                time.sleep(_AGAIN_AFTER_S)


def _adapt(cluster: Cluster, params: Params, state: Path) -> None:
    """Run the control loop. It begins again after an error: supervision restarts what was killed."""
    loop = params.adapt
    while True:
        try:
            adapt(cluster.url, state, loop.period_s, float("inf"), loop.window_s, loop.settings())
        except (ResplitError, RuntimeError) as error:  # the latter is Prefect's, if its server starts too slowly
            _log.warning("the control loop begins again", reason=str(error))
            time.sleep(_AGAIN_AFTER_S)


def main() -> None:
    """`python -m flows.demo`: the cluster, the scenario and the control loop of `params.yaml`, and the live page."""
    parser = argparse.ArgumentParser(description=demo.__doc__)
    parser.add_argument("--port", type=int, default=8080, help="port of the page; 0 takes a free one")
    parser.add_argument("--undisturbed", action="store_true", help="load without changes of nodes and links")
    given = parser.parse_args()
    run_command(lambda: demo(load_params(), given.port, given.undisturbed))


if __name__ == "__main__":
    main()
