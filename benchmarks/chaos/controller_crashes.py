"""The controller crashes at every step of an epoch change, and again at every step of its restart.

Afterwards all nodes must serve the live epoch of the log, return correct tokens, and hold no other blocks.
Nodes, gateway and controller share this process.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, CrashedError, Trial, running_trial
from benchmarks.chaos.findings import Finding
from resplit.model.source import obtain
from tests.support.cluster import load_unsplit, make_model, reference

A, B, C = "alpha", "beta", "gamma"
FIRST = (A, A, B, B, C, C, B, A)
SECOND = (B, B, C, A, A, C, C, B)

_SETTLES_WITHIN_S = 20.0


async def run(scale: float, folder: Path) -> list[Finding]:
    """Crash at every step, then at every pair of a step and a step of the restart. `scale` below 1 skips some."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    async with running_trial(obtain(str(stored), folder / "models"), expected, folder) as trial:
        once = await every_step(trial, stride=max(1, round(0.3 / scale)))
        pairs = await every_pair(trial, stride=max(1, round(2 / scale)))
    return [
        _finding("crashes of the controller, one at every step of a change", once),
        _finding("crashes at a step of a change, each with a second one during the restart", pairs),
    ]


async def every_step(trial: Trial, stride: int) -> dict[str, list[str]]:
    """Crash at every `stride`-th step of a deployment. Returns the violations found after each crash."""
    wrong: dict[str, list[str]] = {}
    number = 0
    while await change_and_crash(trial, number):
        name = f"{number} {trial.crash_point.events[-1]}"
        await trial.crash()
        await trial.resume()
        wrong[name] = await trial.check()
        number += stride
    wrong["none"] = await trial.check()
    return wrong


async def every_pair(trial: Trial, stride: int) -> dict[str, list[str]]:
    """Crash at every `stride`-th step of a deployment, then at every `stride`-th step of the restart."""
    wrong: dict[str, list[str]] = {}
    first, second = 0, 0
    while await change_and_crash(trial, first):
        name = f"{first} {trial.crash_point.events[-1]}"
        await trial.crash()
        again = await restart_and_crash(trial, second)
        name += f", then {trial.crash_point.events[-1]}"
        if again:
            await trial.crash()
            await trial.resume()
        wrong[name] = await trial.check()
        first, second = (first, second + stride) if again else (first + stride, first % stride)
    return wrong


async def change_and_crash(trial: Trial, crash_at: int) -> bool:
    """Deploy the other placement and wait until it settles. Returns whether the controller crashed at `crash_at`."""
    live = trial.controller.live
    assert live is not None
    trial.crash_point.events, trial.crash_point.crash_at = [], crash_at
    try:
        await trial.deploy(SECOND if live.placement == FIRST else FIRST)
        await trial.controller.deployment.settle(_SETTLES_WITHIN_S)
    except CrashedError:
        return True
    trial.crash_point.crash_at = None
    return trial.crash_point.crashed


async def restart_and_crash(trial: Trial, crash_at: int) -> bool:
    """Resume the live epoch. Returns whether the controller crashed at event `crash_at`."""
    trial.crash_point.events, trial.crash_point.crash_at = [], crash_at
    try:
        await trial.resume()
        await trial.controller.deployment.settle(_SETTLES_WITHIN_S)
    except (CrashedError, BaseExceptionGroup):
        return True
    trial.crash_point.crash_at = None
    return trial.crash_point.crashed


def _finding(what: str, wrong: dict[str, list[str]]) -> Finding:
    broken = {name: found for name, found in wrong.items() if found}
    first = f"; first: {next(iter(broken.items()))}" if broken else ""
    return Finding(
        "controller_crashes", what, f"{len(wrong)}, {len(broken)} ended wrongly{first}", "0 wrong", met=not broken
    )
