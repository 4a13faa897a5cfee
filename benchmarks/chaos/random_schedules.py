"""Random schedules of epoch changes, controller crashes, and commands that are lost, late, slow or duplicated.

A hypothesis state machine over real nodes. After each of its steps the guarantees of an epoch change must hold.
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

from benchmarks.chaos.crashing_controller import NEW_TOKENS, NODES, PROMPT, CrashedError, Fault, Trial, running_trial
from benchmarks.chaos.findings import Finding
from resplit.errors import ResplitError
from resplit.model.source import StoredModel, obtain
from tests.support.cluster import load_unsplit, make_model, reference

EXAMPLES, STEPS = 60, 8
A, B, C = NODES
PLACEMENTS = (
    (A, A, B, B, C, C, B, A),
    (B, B, C, A, A, C, C, B),
    (A, A, A, A, A, A, A, A),
    (B, A, C, C, C, B, A, B),
)
FAULTS = st.dictionaries(
    st.tuples(st.sampled_from(["prepare", "commit", "abort", "release", "connect"]), st.sampled_from(NODES)),
    st.sampled_from(["lost", "unanswered", "late", "twice", "slow"]),
    max_size=3,
)
# A change has fewer events than this, so some crashes do not happen.
CRASHES = st.integers(0, 30)


class ScheduleMachine(RuleBasedStateMachine):
    """One cluster for each example. `steps` counts the steps of all examples."""

    model: ClassVar[StoredModel]
    expected: ClassVar[list[int]]
    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.closing = contextlib.AsyncExitStack()
        self.folder = tempfile.TemporaryDirectory()
        self.trial: Trial = self.runner.run(
            self.closing.enter_async_context(running_trial(self.model, self.expected, Path(self.folder.name)))
        )

    def teardown(self) -> None:
        self.runner.run(self.closing.aclose())
        self.runner.close()
        self.folder.cleanup()

    @rule(placement=st.sampled_from(PLACEMENTS), faults=FAULTS)
    def change(self, placement: tuple[str, ...], faults: dict[tuple[str, str], Fault]) -> None:
        self.trial.faults = dict(faults)
        self.runner.run(self._change(placement))
        self._check()

    @rule(placement=st.sampled_from(PLACEMENTS), faults=FAULTS, crash_at=CRASHES)
    def change_and_crash(self, placement: tuple[str, ...], faults: dict[tuple[str, str], Fault], crash_at: int) -> None:
        self.trial.faults = dict(faults)
        self.trial.crash_point.events, self.trial.crash_point.crash_at = [], crash_at
        self.runner.run(self._change(placement))
        self.runner.run(self._restart())
        self._check()

    @rule(faults=FAULTS)
    def crash_at_rest(self, faults: dict[tuple[str, str], Fault]) -> None:
        self.trial.faults = {}
        self.runner.run(self._restart(faults))
        self._check()

    @rule()
    def deliver_late_commands(self) -> None:
        self.runner.run(self.trial.deliver_held_back())
        self._check()

    async def _change(self, placement: tuple[str, ...]) -> None:
        with contextlib.suppress(ResplitError, CrashedError):
            await self.trial.deploy(placement)

    async def _restart(self, faults: dict[tuple[str, str], Fault] | None = None) -> None:
        await self.trial.crash()
        self.trial.faults = dict(faults or {})
        with contextlib.suppress(ResplitError):
            await self.trial.resume()

    def _check(self) -> None:
        type(self).steps += 1
        self.trial.faults = {}
        found = self.runner.run(self.trial.check())
        assert not found, found


async def run(scale: float, folder: Path) -> list[Finding]:
    """60 examples of up to 8 steps, the same in every run."""
    stored = make_model(folder)
    ScheduleMachine.model = obtain(str(stored), folder / "models")
    ScheduleMachine.expected = reference(load_unsplit(stored), list(PROMPT), NEW_TOKENS)
    ScheduleMachine.steps = 0
    examples = max(2, round(EXAMPLES * scale))
    how = settings(
        max_examples=examples,
        stateful_step_count=STEPS,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # no shrinking: an example takes seconds
        suppress_health_check=list(HealthCheck),
    )
    try:
        await asyncio.to_thread(run_state_machine_as_test, ScheduleMachine, settings=how)
    except AssertionError as error:
        (folder / "broken.txt").write_text("\n".join([str(error), *error.__notes__]))
        return [Finding("random_schedules", "guarantees of an epoch change", f"broken: {error}", "kept", met=False)]
    measured = f"kept through {ScheduleMachine.steps} steps in {examples} random schedules"
    return [Finding("random_schedules", "guarantees of an epoch change", measured, "kept", met=True)]
