"""The control loop: observe, validate, fit, decide and, where it pays, propose. One tick, or many in one run."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import structlog
from prefect import flow

from flows import STATE
from flows.command import run_command
from flows.params import load_params
from resplit.cluster.client import ControlClient
from resplit.decide import Settings
from resplit.errors import DataError, ProposalRefusedError
from resplit.types import Problem
from tasks.deploy import deploy_decision, deploy_plan
from tasks.fit import fit
from tasks.observe import observe
from tasks.plan import (
    choose,
    load_history,
    measured_since,
    plan,
    problem,
    registry_speed,
    save_configuration,
    save_history,
)
from tasks.validate import Need, validate

_log = structlog.get_logger(__name__)


@flow(name="adapt", log_prints=False)
def adapt(
    url: str = "http://127.0.0.1:8080",
    state: Path = STATE,
    period_s: float = 3.0,
    loop_for_s: float = 0.0,
    window_s: float = 8.0,
    settings: Settings | None = None,
    since_s: float = 0.0,
) -> int:
    """Tick once, now, or after every `period_s` for `loop_for_s` seconds; how many moves were deployed.

    A tick uses the telemetry of the last `window_s` seconds, none from before `since_s` (seconds since 1970). Where
    that says too little, today's placement stays.
    """
    begun_s, moves = time.monotonic(), 0
    due_s = begun_s + (period_s if loop_for_s else 0.0)
    with ControlClient.from_state(url, state) as client:
        while True:
            time.sleep(max(0.0, due_s - time.monotonic()))
            due_s = time.monotonic() + period_s
            moves += _tick(client, state, window_s, settings or Settings(), since_s)
            if due_s > begun_s + loop_for_s:
                return moves


def _tick(client: ControlClient, state: Path, window_s: float, settings: Settings, since_s: float) -> bool:
    """One decision; whether it moved anything."""
    cluster, now_s, history = client.cluster(), time.time(), load_history(state / "history.json")
    telemetry, live = observe(client, max(since_s, now_s - window_s))
    try:
        need = Need(reports=1)
        quarantine = state / "quarantine"
        valid = validate(telemetry, cluster.node_names, live.features, now_s, quarantine, live.unused, need)
        # The errors of the profile stand: a few seconds of service hold too little to judge by.
        cost = fit(valid.telemetry, live.features, state / "cost.json", judge=False)
    except DataError as error:
        _log.warning("keeping, for want of data", error=str(error))
        client.log_decision({"action": "keep", "reason": str(error), "at_s": now_s})
        return False
    posed = problem(client, cluster, cost, valid.telemetry, live, 2 * window_s)
    if live.placement is None:
        return _place_first(client, posed)
    moved_s = history.last.at_s if history.last else 0.0
    slo_s = {c.name: c.slo for c in cluster.classes}
    measured = measured_since(client.records(), slo_s, max(since_s, moved_s, now_s - 2 * window_s))
    settings = replace(settings, registry_bytes_per_s=registry_speed(client.epochs()))
    decision = choose(posed, cost, measured, history, settings, now_s)
    said = json.loads(decision.to_json())
    outcome: dict[str, object] = {"deployed": None}
    if decision.action != "keep":
        try:
            epoch = deploy_decision(client, decision, live.epoch)
        except ProposalRefusedError as error:
            outcome = {"deployed": None, "refused": str(error)}
        else:
            outcome = {"deployed": epoch}
            save_history(history.moved(decision.move(time.time()), settings), state / "history.json")
            save_configuration(state / "configurations" / str(epoch), posed, said, valid.telemetry)
    client.log_decision(said | {"outcome": outcome})
    _log.info("decided", action=decision.action, reason=decision.reason)
    return outcome["deployed"] is not None


def _place_first(client: ControlClient, posed: Problem) -> bool:
    """Deploy a plan where nothing is placed, as after the start of a controller: there is nothing to decide about."""
    epoch = deploy_plan(client, plan(posed), 0)
    outcome = {"deployed": epoch}
    client.log_decision({"action": "initial", "reason": "nothing is placed", "at_s": time.time(), "outcome": outcome})
    return True


def main() -> None:
    """`python -m flows.adapt`: one tick, or with --loop ticks until interrupted, by `params.yaml`."""
    parser = argparse.ArgumentParser(description=adapt.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=STATE, help="the cluster's state folder (default: %(default)s)")
    parser.add_argument("--loop", action="store_true", help="go on until Ctrl-C instead of one tick")
    given = parser.parse_args()

    def loop() -> None:
        params = load_params().adapt
        loop_for_s = float("inf") if given.loop else 0.0
        adapt(given.url, given.state, params.period_s, loop_for_s, params.window_s, params.settings())

    run_command(loop)


if __name__ == "__main__":
    main()
