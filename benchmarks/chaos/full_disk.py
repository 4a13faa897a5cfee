"""The controller's disk is full: a change is refused with the reason, the old placement serves on, nothing half-written
is taken for whole, and all goes on once there is room.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.controller_crashes import FIRST, SECOND
from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ResplitError
from resplit.model.source import obtain
from resplit.shards.keyring import Keyring
from resplit.shards.packaging import package
from resplit.shards.registry import Registry
from tests.support.cluster import load_unsplit, make_model, reference


async def run(scale: float, folder: Path) -> list[Finding]:
    """With no byte to be written: the epoch log, keyring and registry; `scale` changes nothing."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    model = obtain(str(stored), folder / "models")
    said: dict[str, str] = {}
    wrong: list[str] = []
    async with trial(model, expected, folder) as tried:
        await tried.check()
        live = tried.controller.live
        with full_disk():
            try:
                await tried.deploy(SECOND)
            except ResplitError as error:
                said["epoch log"] = str(error)
        if tried.controller.live != live:
            wrong.append("what is live has changed")
        wrong += await tried.check()
        await tried.deploy(SECOND)
        wrong += await tried.check()
        await tried.crash()
        await tried.resume()
        wrong += await tried.check()
        await tried.deploy(FIRST)
        wrong += await tried.check()
    keys = folder / "other.json"
    with full_disk():
        try:
            package(model, Registry(str(folder / "other")), Keyring(keys))
        except (ResplitError, OSError) as error:
            said["registry and keyring"] = f"{type(error).__name__}: {error}"
    if keys.exists():
        json.loads(keys.read_text())
    package(model, Registry(str(folder / "other")), Keyring(keys))
    return [
        Finding("full_disk", "writes refused with a reason", f"{len(said)} of 2", "2", met=len(said) == 2),
        Finding("full_disk", "wrong before or after", f"{len(wrong)} {wrong[:1] or ''}", "0", met=not wrong),
        *(Finding("full_disk", f"what is said, {what}", message) for what, message in said.items()),
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
