"""The controller's disk is full, in one process.

A change must be refused with the reason, and the old placement must still serve. No partial file may be read as
complete, and changes must succeed once there is room.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.controller_crashes import FIRST, SECOND
from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, running_trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ResplitError
from resplit.model.source import obtain
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from tests.support.cluster import load_unsplit, make_model, reference


async def run(scale: float, folder: Path) -> list[Finding]:
    """Write to the epoch log, then to keyring and registry, while no byte can be written. `scale` has no effect."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    model = obtain(str(stored), folder / "models")
    messages: dict[str, str] = {}
    wrong: list[str] = []
    async with running_trial(model, expected, folder) as trial:
        await trial.check()
        live = trial.controller.live
        with full_disk():
            try:
                await trial.deploy(SECOND)
            except ResplitError as error:
                messages["epoch log"] = str(error)
        if trial.controller.live != live:
            wrong.append("the live epoch changed")
        wrong += await trial.check()
        await trial.deploy(SECOND)
        wrong += await trial.check()
        await trial.crash()
        await trial.resume()
        wrong += await trial.check()
        await trial.deploy(FIRST)
        wrong += await trial.check()
    keys = folder / "other.json"
    with full_disk():
        try:
            package(model, Registry(str(folder / "other")), Keyring(keys))
        except (ResplitError, OSError) as error:
            messages["registry and keyring"] = f"{type(error).__name__}: {error}"
    if keys.exists():
        json.loads(keys.read_text())
    package(model, Registry(str(folder / "other")), Keyring(keys))
    return [
        Finding("full_disk", "writes refused with a reason", f"{len(messages)} of 2", "2", met=len(messages) == 2),
        Finding("full_disk", "violations before or after", f"{len(wrong)} {wrong[:1] or ''}", "0", met=not wrong),
        *(Finding("full_disk", f"the message, {what}", message) for what, message in messages.items()),
    ]


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process can grow, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
