"""The decisions of a simulated cluster: asks the policy, keeps the log, and deploys what was decided."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import numpy as np

from resplit.decide import Decision, DecisionOutcome, History, Settings
from resplit.epochs import LiveEpoch
from resplit.errors import ProposalRefusedError, ResplitError
from resplit.policies import Policy, Situation
from resplit.simulate.agenda import Agenda
from resplit.simulate.deployment import SimulatedDeployment
from resplit.simulate.gateway import SimulatedGateway

__all__ = ["SimulatedDecisions"]


class SimulatedDecisions:
    """The decisions of one policy. `log` has all of them, `history` the moves among them.

    `on_live` is called when a decided placement has become live. Passes that began before `disturbed_until_s` ran while
    blocks were loaded.
    """

    def __init__(
        self,
        policy: Policy,
        deployment: SimulatedDeployment,
        gateway: SimulatedGateway,
        agenda: Agenda,
        rng: np.random.Generator,
    ) -> None:
        self.log: list[Decision] = []
        self.history = History()
        self.on_live: Callable[[], None] = lambda: None
        self.disturbed_until_s = -math.inf
        self._policy = policy
        self._deployment = deployment
        self._gateway = gateway
        self._agenda = agenda
        self._rng = rng

    def ask(self, situation: Situation, took_s: float) -> None:
        """Ask the policy. Its answer is deployed after the time that planning takes."""
        decision, live = self.choose(situation), self._deployment.live
        if decision is None:
            return
        if decision.action == "keep" or live is None:
            self.keep(decision, took_s)
        else:
            self._agenda.after(took_s, self.deploy, decision, live.epoch, situation.settings, took_s)

    def choose(self, situation: Situation) -> Decision | None:
        """What the policy answers; None, and an entry in the log, after an error."""
        try:
            decision = self._policy.decide(situation, self._rng)
        except ResplitError as error:
            self.log.append(Decision(situation.now_s, "keep", str(error)))
            return None
        return replace(decision, seen=tuple(map(str, situation.changes)))

    def keep(self, decision: Decision, took_s: float) -> None:
        """Log a decision that changes nothing."""
        self.log.append(replace(decision, outcome=DecisionOutcome(plan_s=took_s)))

    def deploy(
        self, decision: Decision, based_on: int, settings: Settings, took_s: float, slowed: Collection[str] = ()
    ) -> bool:
        """Begin to deploy a decision; False if it is refused. Passes that wait at `slowed` nodes move at once."""
        begun_s, place = self._agenda.now_s, len(self.log)
        self.log.append(decision)

        def live(epoch: LiveEpoch) -> None:
            self.disturbed_until_s = self._agenda.now_s
            self.history = self.history.moved(decision.move(self._agenda.now_s), settings)
            self._gateway.recall(slowed, epoch.epoch)
            self.on_live()
            self.log[place] = replace(
                decision, outcome=DecisionOutcome(epoch.epoch, None, took_s, self._agenda.now_s - begun_s)
            )

        try:
            self._deployment.deploy(decision.proposal(based_on), live)
        except ProposalRefusedError as error:
            self.log[place] = replace(decision, outcome=DecisionOutcome(refused=str(error), plan_s=took_s))
            return False
        self.disturbed_until_s = math.inf
        return True
