"""The registry is unreachable during a change, in one process.

The change must be refused with the reason, and the old placement must still serve. The change must succeed once the
registry is back.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.chaos.controller_crashes import FIRST, SECOND
from benchmarks.chaos.crashing_controller import NEW_TOKENS, PROMPT, running_trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ProposalRefusedError
from resplit.model.source import obtain
from tests.support.cluster import load_unsplit, make_model, reference

ROUNDS = 5


async def run(scale: float, folder: Path) -> list[Finding]:
    """5 times: rename the folder, propose a change, rename the folder back, propose the change again."""
    stored = make_model(folder)
    expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    rounds = max(1, round(ROUNDS * scale))
    shards, away = folder / "registry", folder / "away"
    reasons, wrong = [], []
    async with running_trial(obtain(str(stored), folder / "models"), expected, folder) as trial:
        for number in range(rounds):
            live = trial.controller.live
            shards.rename(away)
            try:
                await trial.deploy((SECOND, FIRST)[number % 2])
            except ProposalRefusedError as error:
                reasons.append(str(error))
            if trial.controller.live != live:
                wrong.append("the live epoch changed")
            wrong += await trial.check()
            away.rename(shards)
            await trial.deploy((SECOND, FIRST)[number % 2])
            wrong += await trial.check()
    named = sum("registry" in reason for reason in reasons)
    return [
        Finding(
            "registry_outage",
            "changes refused with the reason",
            f"{named} of {rounds}",
            str(rounds),
            met=named == rounds,
        ),
        Finding("registry_outage", "violations before or after", f"{len(wrong)} {wrong[:1] or ''}", "0", met=not wrong),
        Finding("registry_outage", "the reason given", reasons[0] if reasons else "none"),
    ]
