"""Any order of changes, deaths of the controller, and commands that are lost, late, slow or doubled, at real nodes.

A hypothesis state machine; after each of its steps the promises of an epoch change must hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from pathlib import Path
from typing import ClassVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from benchmarks.chaos.crashing_controller import NEW_TOKENS, PLACES, PROMPT, Fault, KilledError, Trial, trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ResplitError
from resplit.model.source import StoredModel, obtain
from tests.support.cluster import load_unsplit, make_model, reference

EXAMPLES, STEPS = 60, 8
A, B, C = PLACES
PLACEMENTS = (
    (A, A, B, B, C, C, B, A),
    (B, B, C, A, A, C, C, B),
    (A, A, A, A, A, A, A, A),
    (B, A, C, C, C, B, A, B),
)
FAULTS = st.dictionaries(
    st.tuples(st.sampled_from(["prepare", "commit", "abort", "release", "connect"]), st.sampled_from(PLACES)),
    st.sampled_from(["lost", "unanswered", "late", "twice", "slow"]),
    max_size=3,
)
# More than a change has events: some of these deaths do not come.
DEATHS = st.integers(0, 30)


class OrdersMachine(RuleBasedStateMachine):
    """One cluster for each example. `steps` counts over all of them."""

    model: ClassVar[StoredModel]
    expected: ClassVar[list[int]]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.closing = contextlib.AsyncExitStack()
        self.folder = tempfile.TemporaryDirectory()
        self.tried: Trial = self.runner.run(
            self.closing.enter_async_context(trial(self.model, self.expected, Path(self.folder.name)))
        )

    def teardown(self) -> None:
        self.runner.run(self.closing.aclose())
        self.runner.close()
        self.folder.cleanup()

    @rule(placement=st.sampled_from(PLACEMENTS), faults=FAULTS)
    def change(self, placement: tuple[str, ...], faults: dict[tuple[str, str], Fault]) -> None:
        self.tried.faults = dict(faults)
        self.runner.run(self._change(placement))
        self._check()

    @rule(placement=st.sampled_from(PLACEMENTS), faults=FAULTS, death=DEATHS)
    def change_and_die(self, placement: tuple[str, ...], faults: dict[tuple[str, str], Fault], death: int) -> None:
        self.tried.faults = dict(faults)
        self.tried.fate.events, self.tried.fate.fatal = [], death
        self.runner.run(self._change(placement))
        self.runner.run(self._restart())
        self._check()

    @rule(faults=FAULTS)
    def die_at_rest(self, faults: dict[tuple[str, str], Fault]) -> None:
        self.tried.faults = {}
        self.runner.run(self._restart(faults))
        self._check()

    @rule()
    def late_commands_come(self) -> None:
        self.runner.run(self.tried.deliver_late())
        self._check()

    async def _change(self, placement: tuple[str, ...]) -> None:
        with contextlib.suppress(ResplitError, KilledError):
            await self.tried.deploy(placement)

    async def _restart(self, faults: dict[tuple[str, str], Fault] | None = None) -> None:
        await self.tried.crash()
        self.tried.faults = dict(faults or {})
        with contextlib.suppress(ResplitError):
            await self.tried.resume()

    def _check(self) -> None:
        type(self).steps += 1
        self.tried.faults = {}
        found = self.runner.run(self.tried.check())
        assert not found, found


async def run(scale: float, folder: Path) -> list[Finding]:
    """60 examples of up to 8 steps, the same ones each time."""
    stored = make_model(folder)
    OrdersMachine.model = obtain(str(stored), folder / "models")
    OrdersMachine.expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    OrdersMachine.steps = 0
    examples = max(2, round(EXAMPLES * scale))
    how = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # an example takes seconds: what fails is shown as it is
        suppress_health_check=list(HealthCheck),
    )
    try:
        await asyncio.to_thread(run_state_machine_as_test, OrdersMachine, settings=how)
    except AssertionError as error:
        (folder / "broken.txt").write_text("\n".join([str(error), *error.__notes__]))
        return [Finding("random_schedules", "promises of an epoch change", f"broken: {error}", "kept", met=False)]
    measured = f"kept through {OrdersMachine.steps} steps in {examples} random orders"
    return [Finding("random_schedules", "promises of an epoch change", measured, "kept", met=True)]
