"""The controller dies at every single step of an epoch change, and again at every step of its restart.

However it ends: one epoch on all nodes, the one that the log says, right tokens, nothing left over.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, KilledError, Trial, trial
from benchmarks.chaos.findings import Finding
from resplit.model.source import obtain
from tests.support.cluster import load_unsplit, make_model, reference

A, B, C = "alpha", "beta", "gamma"
FIRST = (A, A, B, B, C, C, B, A)
SECOND = (B, B, C, A, A, C, C, B)


async def run(scale: float, folder: Path) -> list[Finding]:
    """Every step once; then every pair of a step and one of the restart that follows. `scale` below 1 takes a part."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    async with trial(obtain(str(stored), folder / "models"), expected, folder) as tried:
        once = await every_step(tried, stride=max(1, round(0.3 / scale)))
        pairs = await every_pair(tried, stride=max(1, round(2 / scale)))
    return [
        _finding("deaths of the controller, one at every step of a change", once),
        _finding("deaths at a step of a change, and another one while it restarts", pairs),
    ]


async def every_step(tried: Trial, stride: int) -> dict[str, list[str]]:
    """Let it die at each step of a deployment, or at every `stride`th; what was wrong after each."""
    wrong: dict[str, list[str]] = {}
    number = 0
    while await change_and_die(tried, number):
        name = f"{number} {tried.fate.events[-1]}"
        await tried.crash()
        await tried.resume()
        wrong[name] = await tried.check()
        number += stride
    wrong["none"] = await tried.check()
    return wrong


async def every_pair(tried: Trial, stride: int) -> dict[str, list[str]]:
    """Let it die at every `stride`th step of a deployment, and while it restarts at every `stride`th step of that."""
    wrong: dict[str, list[str]] = {}
    first, second = 0, 0
    while await change_and_die(tried, first):
        name = f"{first} {tried.fate.events[-1]}"
        await tried.crash()
        again = await restart_and_die(tried, second)
        name += f", then {tried.fate.events[-1]}"
        if again:
            await tried.crash()
            await tried.resume()
        wrong[name] = await tried.check()
        first, second = (first, second + stride) if again else (first + stride, first % stride)
    return wrong


async def change_and_die(tried: Trial, fatal: int) -> bool:
    """Deploy the other placement and wait for rest; whether the controller died at its event number `fatal`."""
    live = tried.controller.live
    assert live is not None
    tried.fate.events, tried.fate.fatal = [], fatal
    try:
        await tried.deploy(SECOND if live.placement == FIRST else FIRST)
        await tried.controller.deployment.settle()
    except KilledError:
        return True
    tried.fate.fatal = None
    return tried.fate.dead


async def restart_and_die(tried: Trial, fatal: int) -> bool:
    """Resume what was live; whether the controller died at its event number `fatal`."""
    tried.fate.events, tried.fate.fatal = [], fatal
    try:
        await tried.resume()
        await tried.controller.deployment.settle()
    except (KilledError, BaseExceptionGroup):
        return True
    tried.fate.fatal = None
    return tried.fate.dead


def _finding(what: str, wrong: dict[str, list[str]]) -> Finding:
    broken = {name: found for name, found in wrong.items() if found}
    first = f"; first: {next(iter(broken.items()))}" if broken else ""
    return Finding(
        "controller_crashes", what, f"{len(wrong)}, {len(broken)} ended wrongly{first}", "0 wrong", met=not broken
    )
