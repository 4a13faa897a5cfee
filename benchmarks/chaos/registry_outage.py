"""The registry is out of reach during a change: it is refused with the reason, the old placement serves on, and the
same change succeeds once the registry is back.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.controller_crashes import FIRST, SECOND
from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ProposalRefusedError
from resplit.model.source import obtain
from tests.support.cluster import load_unsplit, make_model, reference

ROUNDS = 5


async def run(scale: float, folder: Path) -> list[Finding]:
    """5 times: the folder is renamed, a change proposed, the folder renamed back, the change proposed again."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    rounds = max(1, round(ROUNDS * scale))
    shards, away = folder / "registry", folder / "away"
    reasons, wrong = [], []
    async with trial(obtain(str(stored), folder / "models"), expected, folder) as tried:
        for number in range(rounds):
            live = tried.controller.live
            shards.rename(away)
            try:
                await tried.deploy((SECOND, FIRST)[number % 2])
            except ProposalRefusedError as error:
                reasons.append(str(error))
            if tried.controller.live != live:
                wrong.append("what is live has changed")
            wrong += await tried.check()
            away.rename(shards)
            await tried.deploy((SECOND, FIRST)[number % 2])
            wrong += await tried.check()
    named = sum("registry" in reason for reason in reasons)
    return [
        Finding(
            "registry_outage",
            "changes refused with the reason",
            f"{named} of {rounds}",
            str(rounds),
            met=named == rounds,
        ),
        Finding("registry_outage", "wrong before or after", f"{len(wrong)} {wrong[:1] or ''}", "0", met=not wrong),
        Finding("registry_outage", "the reason, as it is told", reasons[0] if reasons else "none"),
    ]
