"""Adapt: the control loop (Algorithm 1 of the paper). One tick, or many in one flow run."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported
    from flows.environment import prepare

    prepare()

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import structlog
from prefect import flow

from flows import STATE
from flows.command import is_disk_full, run_command
from flows.params import load_params
from resplit.cluster.client import ControlClient
from resplit.config import ClusterConfig
from resplit.decide import Decision, DecisionOutcome, Settings, measured_since, registry_bytes_per_s
from resplit.errors import DataError, NodeLostError, ProposalRefusedError
from resplit.estimate import ahead, speed_jumps
from resplit.policies import Situation, make_policy
from resplit.telemetry.tables import Telemetry
from resplit.types import Problem
from tasks.deploy import deploy_decision, deploy_plan
from tasks.fit import fit
from tasks.observe import observe
from tasks.plan import choose, plan, problem, save_configuration, save_fast_configurations
from tasks.validate import Need, validate

_log = structlog.get_logger(__name__)


@flow(name="adapt", log_prints=False)
def adapt(
    url: str = "http://127.0.0.1:8080",
    state: Path = STATE,
    period_s: float = 3.0,
    loop_for_s: float = 0.0,
    window_s: float = 20.0,
    settings: Settings | None = None,
    since_s: float = 0.0,
    fast_loop_for_s: float = 120.0,
    policy: str = "resplit",
) -> int:
    """Run one control tick now, or one every `period_s` for `loop_for_s` seconds; returns the number of moves.

    A tick uses the telemetry of the last `window_s` seconds, and none from before `since_s` (seconds since 1970). If
    that telemetry is not sufficient, the current placement is kept. After a tick, the controller's fast loop decides on
    changes for `fast_loop_for_s`. `policy` is one of `resplit.policies.POLICIES`. A loop without end outlives that the
    controller is away, or a disk is full.
    """
    ticking = _Ticking(policy, state, window_s, settings or Settings(), since_s, fast_loop_for_s)
    begun_s, moves, tolerant = time.monotonic(), 0, False
    due_s = begun_s + (period_s if loop_for_s else 0.0)
    with ControlClient.from_state(url, state) as client:
        while True:
            time.sleep(max(0.0, due_s - time.monotonic()))
            due_s = time.monotonic() + period_s
            with _later() if tolerant else contextlib.nullcontext():
                moves += _tick(client, ticking)
                ticking.seen = save_fast_configurations(client, state / "configurations", window_s, ticking.seen)
            tolerant = math.isinf(loop_for_s)  # an error of the first tick is one of the call
            if due_s > begun_s + loop_for_s:
                return moves


@contextlib.contextmanager
def _later() -> Iterator[None]:
    """Leave a tick to the next one if the controller is away or refuses it, or a disk is full."""
    try:
        yield
    except (NodeLostError, ProposalRefusedError, OSError) as error:
        if isinstance(error, OSError) and not is_disk_full(error):
            raise
        _log.warning("a tick failed, and the next one tries again", error=str(error))


class _Ticking:
    """What stays the same from tick to tick: how to decide. The policy of a run may remember its earlier answers."""

    def __init__(
        self, policy: str, state: Path, window_s: float, settings: Settings, since_s: float, fast_loop_for_s: float
    ) -> None:
        self.policy, self.policy_name = make_policy(policy), policy
        self.state, self.window_s, self.since_s = state, window_s, since_s
        self.settings, self.fast_loop_for_s = settings, fast_loop_for_s
        self.rng = np.random.default_rng(0)
        self.seen = 0  # entries of the decision log


def _tick(client: ControlClient, given: _Ticking) -> bool:
    """Algorithm 1 of the paper: observe, validate, fit, decide, propose. Returns whether a move was deployed.

    It also arms the controller's fast loop, which decides on changes that it detects until the next tick.
    """
    cluster, now_s, state = client.cluster(), time.time(), given.state
    telemetry, live = observe(client, max(given.since_s, now_s - given.window_s))
    try:
        valid = validate(
            telemetry, cluster.node_names, live.features, now_s, state / "quarantine", live.unused, Need(reports=1)
        )
        # The held-out errors of the profile are kept: a few seconds of service are too little to estimate them.
        jumps = speed_jumps(client.estimates(), time.time())
        cost = fit(valid.telemetry, live.features, state / "cost.json", hold_out=False, jumps=jumps)
    except DataError as error:
        return _keep(client, now_s, error)
    posed = problem(client, cluster, cost, valid.telemetry, live, 2 * given.window_s)
    if live.placement is None:
        return _place_first(client, posed)
    situation = _situation(client, given, cluster, now_s, posed, valid.telemetry, cost.uncertainty)
    decision = choose(given.policy, situation, given.rng)
    if "change" in given.policy.asked:
        client.arm_fast_loop(situation.settings, given.fast_loop_for_s, given.policy_name)
    outcome = DecisionOutcome()
    if decision.action != "keep":
        outcome = _deploy(client, decision, live.epoch, situation.settings)
    if outcome.deployed is not None:
        configuration = state / "configurations" / str(outcome.deployed)
        save_configuration(configuration, posed, decision, valid.telemetry)
    client.log_decision(replace(decision, outcome=outcome))
    _log.info("decided", action=decision.action, reason=decision.reason)
    return outcome.deployed is not None


def _situation(
    client: ControlClient,
    given: _Ticking,
    cluster: ClusterConfig,
    now_s: float,
    posed: Problem,
    telemetry: Telemetry,
    uncertainty: float,
) -> Situation:
    """What the policy is told at a tick: the problem, and what else was measured, prepared and is expected."""
    history = client.moves()
    moved_s = history.last.at_s if history.last else 0.0
    slo_s = {declared.name: declared.slo for declared in cluster.classes}
    return Situation(
        now_s,
        posed,
        replace(given.settings, registry_bytes_per_s=registry_bytes_per_s(client.epochs())),
        history,
        uncertainty,
        measured=measured_since(client.records(), slo_s, max(given.since_s, moved_s, now_s - 2 * given.window_s)),
        busy=telemetry.busy_shares(),
        ready=client.ready(),
        ahead=ahead(posed, client.estimates()),
    )


def _keep(client: ControlClient, now_s: float, error: DataError) -> bool:
    """Log that too little is known to move. Returns False: nothing was deployed."""
    _log.warning("telemetry is not sufficient; the current placement is kept", error=str(error))
    client.log_decision(Decision(now_s, "keep", str(error)))
    return False


def _deploy(client: ControlClient, decision: Decision, based_on: int, settings: Settings) -> DecisionOutcome:
    try:
        epoch = deploy_decision(client, decision, based_on)
    except ProposalRefusedError as error:
        return DecisionOutcome(refused=str(error))
    client.add_move(decision.move(epoch.committed_s), settings)
    return DecisionOutcome(deployed=epoch.epoch)


def _place_first(client: ControlClient, posed: Problem) -> bool:
    """Deploy a plan if nothing is placed yet, for example after a start of the controller."""
    found = plan(posed)
    epoch = deploy_plan(client, found, 0)
    reason = "; ".join(filter(None, ["nothing is placed", found.note]))
    decision = Decision(time.time(), "initial", reason, outcome=DecisionOutcome(deployed=epoch))
    client.log_decision(decision)
    return True


def main() -> None:
    """`python -m flows.adapt`: one tick, or ticks until interrupted with --loop, by `params.yaml`."""
    parser = argparse.ArgumentParser(description=adapt.__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the gateway (default: %(default)s)")
    parser.add_argument("--state", type=Path, default=STATE, help="the cluster's state folder (default: %(default)s)")
    parser.add_argument("--loop", action="store_true", help="run ticks until Ctrl-C instead of one")
    given = parser.parse_args()

    def loop() -> None:
        params = load_params().adapt
        loop_for_s = float("inf") if given.loop else 0.0
        adapt(given.url, given.state, params.period_s, loop_for_s, params.window_s, params.settings())

    run_command(loop)


if __name__ == "__main__":
    main()
