"""The controller's disk is full, in one process.

A change must be refused with the reason, and the old placement must still serve. No partial file may be read as
complete, and changes must succeed once there is room.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.chaos.controller_crashes import FIRST, SECOND
from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, Trial, running_trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ResplitError
from resplit.model.source import StoredModel, obtain
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from tests.support.cluster import load_unsplit, make_model, reference
from tests.support.full_disk import full_disk


async def run(scale: float, folder: Path) -> list[Finding]:
    """Write to the epoch log, then to keyring and registry, while no byte can be written. `scale` has no effect."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    model = obtain(str(stored), folder / "models")
    async with running_trial(model, expected, folder) as trial:
        log_message, wrong = await change_on_full_disk(trial)
    refusals = {"epoch log": log_message, "registry and keyring": package_on_full_disk(model, folder)}
    messages = {what: message for what, message in refusals.items() if message}
    return [
        Finding("full_disk", "writes refused with a reason", f"{len(messages)} of 2", "2", met=len(messages) == 2),
        Finding("full_disk", "violations before or after", f"{len(wrong)} {wrong[:1] or ''}", "0", met=not wrong),
        *(Finding("full_disk", f"the message, {what}", message) for what, message in messages.items()),
    ]


async def change_on_full_disk(trial: Trial) -> tuple[str, list[str]]:
    """Change the placement on a full disk, then with room, and after a restart.

    Returns the message of the refusal ("" if there was none) and the violations found.
    """
    message, wrong = "", await trial.check()
    live = trial.controller.live
    with full_disk():
        try:
            await trial.deploy(SECOND)
        except ResplitError as error:
            message = str(error)
    if trial.controller.live != live:
        wrong.append("the live epoch changed")
    wrong += await trial.check()
    await trial.deploy(SECOND)
    wrong += await trial.check()
    await trial.crash()
    await trial.resume()
    wrong += await trial.check()
    await trial.deploy(FIRST)
    return message, wrong + await trial.check()


def package_on_full_disk(model: StoredModel, folder: Path) -> str:
    """Package a model on a full disk, then with room. Returns the message of the refusal, "" if there was none."""
    message, keys = "", folder / "other.json"
    with full_disk():
        try:
            package(model, Registry(str(folder / "other")), Keyring(keys))
        except (ResplitError, OSError) as error:
            message = f"{type(error).__name__}: {error}"
    if keys.exists():
        json.loads(keys.read_text())
    package(model, Registry(str(folder / "other")), Keyring(keys))
    return message
