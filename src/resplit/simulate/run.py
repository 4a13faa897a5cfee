"""A simulated run: one cluster, one workload and one policy, from the first arrival to the end of the last request.

`simulate` reads as the model does: machines and links, the gateway in front of them, the reports that they make, the
loops that decide, and what the scenario does to all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from resplit.config import ClusterConfig
from resplit.control.rules import PlacementRules
from resplit.decide.state import Placement
from resplit.epochs import Proposal
from resplit.errors import ConfigError, InfeasibleError
from resplit.node.emulation import Hardware
from resplit.node.probe import ECHO_BYTES, PERIOD_S, probed
from resplit.phases import Phase, declared_phase, phases_of, problem_in
from resplit.planner.best_effort import solve_best_effort
from resplit.policies import Policy, make_policy
from resplit.policies.foresight import foresee
from resplit.process.garbage import rare_collections
from resplit.recording import Observed, run_record
from resplit.records import RunRecord
from resplit.scenario import ScenarioConfig
from resplit.simulate.agenda import Agenda
from resplit.simulate.control import Control
from resplit.simulate.cost import declared_cost_model
from resplit.simulate.deployment import Loading, SimulatedDeployment
from resplit.simulate.gateway import Caches, SimulatedGateway
from resplit.simulate.loop import Loop
from resplit.simulate.machines import Machine
from resplit.simulate.network import SimulatedNetwork
from resplit.simulate.noise import normals
from resplit.simulate.overheads import NO_OVERHEADS, Overheads
from resplit.simulate.reports import Noise, Reports
from resplit.types import BlockFeatures, Problem
from resplit.workload import Arrival

__all__ = ["Physics", "declared_problem", "simulate"]

_TOKEN_BYTES = 4.0
_SAMPLE_S = 1.0  # of the use of nodes


@dataclass(frozen=True)
class Physics:
    """What a cluster file does not say: the time that software takes, loading, and the noise of telemetry.

    `hop_s` is added to each message, `pass_s` to each pass at the gateway, `batch_error` is the relative deviation of
    the time of a batch, and `profile_error` that of the cost model with which a run begins. Batches take `batch_factor`
    times as long as declared: not 1 if a run is replayed whose nodes took longer. A node that comes back can be used
    `start_s` later. With `kv_transfer`, the caches of sessions follow a move; else they are computed again.
    `overheads` are what the processes of a cluster add.
    """

    hop_s: float = 0.001
    pass_s: float = 0.001
    batch_error: float = 0.01
    batch_factor: float = 1.0
    profile_error: float = 0.01
    start_s: float = 2.0
    kv_transfer: bool = True
    overheads: Overheads = NO_OVERHEADS
    loading: Loading = field(default_factory=Loading)
    noise: Noise = field(default_factory=Noise)


def simulate(
    cluster: ClusterConfig,
    features: Sequence[BlockFeatures],
    scenario: ScenarioConfig,
    arrivals: Sequence[Arrival],
    policy: Policy,
    *,
    name: str,
    seed: int,
    loop: Loop | None = None,
    physics: Physics | None = None,
    script: Sequence[tuple[float, Placement]] = (),
    free_moves: bool = False,
) -> RunRecord:
    """The record of one run of `policy`, called `name`, in the tables that a run on a cluster leaves.

    `features` has the private blocks marked; `arrivals` are the workload, in order of time. The same arguments give the
    same record. A `script` has placements with the times at which they become live, the first one at 0, whatever the
    policy says; with `free_moves` caches are there at once, too. InfeasibleError if the model has no first placement.
    """
    run = _SimulatedCluster(
        cluster, tuple(features), scenario, policy, seed, loop or Loop(), physics or Physics(), free_moves
    )
    with rare_collections():
        return run.record(arrivals, name, script)


def declared_problem(cluster: ClusterConfig, features: Sequence[BlockFeatures], scenario: ScenarioConfig) -> Problem:
    """The problem of the declared demand, nodes and links, as it truly is in the simulation."""
    run = _SimulatedCluster(
        cluster, tuple(features), scenario, make_policy("static"), 0, Loop(), Physics(profile_error=0.0)
    )
    return run.problem


class _SimulatedCluster:
    """One simulated cluster, with the state of the world beside it."""

    def __init__(
        self,
        cluster: ClusterConfig,
        features: tuple[BlockFeatures, ...],
        scenario: ScenarioConfig,
        policy: Policy,
        seed: int,
        loop: Loop,
        physics: Physics,
        free_moves: bool = False,
    ) -> None:
        self._cluster, self._features, self._scenario, self._seed = cluster, features, scenario, seed
        self._physics, overheads = physics, physics.overheads
        self._loop = loop
        self._agenda = agenda = Agenda()
        streams = [np.random.default_rng((seed, number)) for number in range(5)]
        network_rng, machine_rng, report_rng, profile_rng, policy_rng = streams
        self._network = network = SimulatedNetwork(
            cluster.link, network_rng, physics.hop_s, overheads.background_traffic
        )
        kinds = [feature.kind for feature in features]
        varies = physics.batch_error or physics.batch_factor != 1.0
        service = _noisy(machine_rng, physics.batch_error, physics.batch_factor) if varies else None
        self._machines = machines = {
            node.name: Machine(node.name, _hardware(node.name, cluster), kinds, agenda, service, overheads.batch_s)
            for node in cluster.nodes
        }
        caches: Caches = "free" if free_moves else "sent" if physics.kv_transfer else "recomputed"
        self._gateway = gateway = SimulatedGateway(
            cluster, features, machines, network, agenda, physics.pass_s, caches, overheads
        )
        rules = PlacementRules(cluster, features)
        self._deployment = SimulatedDeployment(rules, machines, gateway, network, agenda, physics.loading, _TOKEN_BYTES)
        reports = self._reports(report_rng) if policy.asked & {"tick", "change"} else None
        hardware = {name: machine.hardware for name, machine in machines.items()}
        cost = declared_cost_model(
            cluster, features, hardware, network.shape, physics.hop_s, physics.profile_error, profile_rng
        )
        self._control = Control(
            cluster, features, policy, loop, cost, self._deployment, gateway, reports, agenda, policy_rng
        )
        self.problem = self._control.first_problem()
        self._use: list[tuple[float, str, float, float]] = []
        self._sampled_busy_s = dict.fromkeys(machines, 0.0)

    def _reports(self, rng: np.random.Generator) -> Reports:
        """What the nodes report to the policy."""
        memory_bytes = {node.name: node.memory for node in self._cluster.nodes}
        noise, window_s = self._physics.noise, 2 * self._loop.window_s
        return Reports(self._machines, self._features, memory_bytes, self._network, self._agenda, rng, noise, window_s)

    def record(self, arrivals: Sequence[Arrival], name: str, script: Sequence[tuple[float, Placement]]) -> RunRecord:
        """Place the model, serve the workload while the scenario changes the cluster, and record what happened."""
        agenda, scenario = self._agenda, self._scenario
        problem = self.problem
        if script:
            for at_s, placement in script:
                agenda.at(at_s, self._switch, placement)
        else:
            self._place_first(problem)
        foreseen_s = () if script else self._foreseen_s()
        self._schedule_changes(problem)
        self._control.start()
        agenda.after(_SAMPLE_S, self._sample_use)
        if self._physics.overheads.background_traffic:
            agenda.after(PERIOD_S, self._probe_links, 0)
        self._arrive(iter(enumerate(arrivals)))
        agenda.run(scenario.duration)
        self._control.stop()
        while self._gateway.busy:  # the requests that are under way end; nothing new arrives
            agenda.run(agenda.now_s + 1.0)
        return self._recorded(name, foreseen_s)

    def _switch(self, placement: Placement) -> None:
        """A placement of the script becomes live."""
        live = self._deployment.live
        action = "scripted" if live else "initial"
        self._deployment.switch(Proposal(placement, action, live.epoch if live else 0))

    def _place_first(self, problem: Problem) -> None:
        """The first placement: the best plan for what a profile shows and for the declared demand."""
        found = solve_best_effort(problem, work_limit=self._loop.settings.work_limit)
        plan = found.plan
        if plan.placement is None or plan.terms is None:
            raise InfeasibleError(f"no placement: {plan.reason}")
        latency_s, bound = plan.terms.latency_s, plan.lower_bound
        self._deployment.switch(Proposal(plan.placement, "initial", 0, latency_s, bound, found.note))

    def _foreseen_s(self) -> tuple[float, ...]:
        """The changes at which a policy that knows the scenario moves: reactions to these count, as on a cluster.

        None for a scenario that no cluster can play: its traces may change something thousands of times.
        """
        scenario, live = self._scenario, self._deployment.live
        if live is None or scenario.simulated_only or len(phases_of(self._cluster, scenario)) == 1:
            return ()
        problem = replace(self.problem, current=live.placement)
        moves = foresee(problem, self._cluster, scenario, make_policy("clairvoyant"), self._loop.settings)
        return tuple(move.at_s for move in moves)

    def _arrive(self, arrivals: Iterator[tuple[int, Arrival]]) -> None:
        """The next request of the workload, and then those after it."""
        for number, arrival in arrivals:
            self._agenda.at(arrival.at_s, self._arrived, arrival, number, arrivals)
            return

    def _arrived(self, arrival: Arrival, number: int, arrivals: Iterator[tuple[int, Arrival]]) -> None:
        self._gateway.arrive(arrival, str(number))
        self._arrive(arrivals)

    # --- the scenario changes the cluster

    def _schedule_changes(self, problem: Problem) -> None:
        """Have each phase of the scenario begin at its time. `problem` is the one of the first placement."""
        declared, phases = declared_phase(self._cluster, self._scenario), phases_of(self._cluster, self._scenario)
        for number, phase in enumerate(phases):
            self._agenda.at(phase.at_s, self._change, phase, phases[number + 1 :])
            self._agenda.at(phase.at_s, self._control.scheduled, problem_in(problem, phase, declared))

    def _change(self, phase: Phase, later: Sequence[Phase]) -> None:
        """Nodes and links become what they are in a phase. The phases `later` say when a link is up again."""
        for name, node in phase.nodes.items():
            if name in phase.changed:
                self._machines[name].change(node.slowdown, node.background_utilization)
                self._set_up(name, node.up)
        for pair, link in phase.links.items():
            if pair in phase.changed:
                up_s = math.inf if link.up else next((each.at_s for each in later if each.links[pair].up), math.inf)
                self._network.change(*pair, link, up_s)

    def _set_up(self, name: str, up: bool) -> None:
        machine = self._machines[name]
        if machine.alive and not up:
            machine.fail()
            self._deployment.forget(name)
            self._control.lost(name)
        elif up and not machine.alive:
            machine.alive = True
            self._agenda.after(self._physics.start_s, self._control.returned, name)

    def _probe_links(self, turn: int) -> None:
        """Each machine sends a large message to one other, each time to the next one."""
        up = [name for name, machine in self._machines.items() if machine.alive]
        for name in up:
            peers = [other for other in self._machines if other != name]
            for peer in probed(peers, turn)[1]:
                if self._machines[peer].alive:
                    self._network.probe(name, peer, ECHO_BYTES[1], self._agenda.now_s)
        self._agenda.after(PERIOD_S, self._probe_links, turn + 1)

    # --- the record

    def _sample_use(self) -> None:
        for name, machine in self._machines.items():
            own = (machine.busy_s - self._sampled_busy_s[name]) / _SAMPLE_S
            self._sampled_busy_s[name] = machine.busy_s
            background = machine.hardware.background_utilization
            own = min(own, 1 - background)
            self._use.append((self._agenda.now_s, name, background + own, own))
        self._agenda.after(_SAMPLE_S, self._sample_use)

    def _recorded(self, name: str, foreseen_s: tuple[float, ...]) -> RunRecord:
        columns = ["time_s", "node", "cpu_utilization", "own_utilization"]
        observed = Observed(
            start_s=0.0,
            sessions=sorted(self._gateway.records, key=lambda record: record.arrival_s),
            failed_connections=(),
            node_reports=pd.DataFrame(self._use, columns=columns),
            epochs=self._deployment.history,
            decisions=self._control.log,
            blocks=tuple(feature.name for feature in self._features),
            nodes=(),
            foreseen_s=foreseen_s,
        )
        return run_record(observed, self._cluster, self._scenario, name, self._seed)


def _hardware(name: str, cluster: ClusterConfig) -> Hardware:
    """The hardware that a node of the cluster file declares. ConfigError for a node that declares none."""
    emulation = cluster.node(name).emulate
    if emulation is None:
        raise ConfigError(
            f"cluster {cluster.name}: nodes: {name}",
            "declares no `emulate`, so nothing says how fast it is; only clusters of emulated nodes can be simulated",
        )
    return Hardware.declared(emulation)


def _noisy(rng: np.random.Generator, deviation: float, factor: float = 1.0) -> Callable[[float], float]:
    """A function that multiplies times by `factor`, and varies them at random by a relative `deviation`."""
    drawn = normals(rng)
    return lambda seconds: factor * seconds * math.exp(deviation * next(drawn))
