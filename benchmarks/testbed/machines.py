"""Runs a cluster in the testbed: the ordinary commands for separate machines, each in its namespace and group."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import yaml

from benchmarks.testbed.groups import Groups, remove_groups
from benchmarks.testbed.layout import Shape, cluster_of_real_machines, cores_of, faster, links_of, namespace, shares
from benchmarks.testbed.network import Network, remove_namespaces
from benchmarks.testbed.relay import enter
from benchmarks.testbed.tools import require, within
from resplit.cluster.local import Cluster, last_error, start_process
from resplit.cluster.state_folder import in_use
from resplit.config import ClusterConfig, parse_cluster, read_cluster
from resplit.errors import ResplitError
from resplit.files import write_atomically
from resplit.model.engines import open_engine
from resplit.model.engines.base import SessionRows
from resplit.model.source import StoredModel, obtain
from resplit.phases import LinkState, NodeState
from resplit.security.authority import keys_command
from resplit.security.identity import CONTROLLER

__all__ = ["LOCK", "Pace", "Testbed", "running"]

_log = structlog.get_logger(__name__)
_HTTP_PORT = 8080
LOCK = Path("/run/resplit-testbed")
_READY_WITHIN_S = 300.0
_CONTEXT, _STEPS = 64, 32  # cached tokens, and decode steps, by which a token is timed
_STALE = ("ready", "latest_problem.json", "history.json", "desired_state.json", "cost.json")


@dataclass(frozen=True)
class Pace:
    """Factors on the declared speed of nodes, and on load and the deadlines of requests.

    The speed is the greater one: what resplit itself does for a token takes about as long here as the small model does.
    """

    speed: float
    load: float


@dataclass
class Testbed:
    """A cluster that runs in the testbed. Its nodes compute `speed` times as fast as `declared` says."""

    cluster: Cluster
    declared: ClusterConfig
    speed: float
    network: Network
    groups: Groups
    token_s: float  # of a decode step through the whole model, on a whole core
    shares: dict[str, float] = field(default_factory=dict)
    cores: dict[str, int] = field(default_factory=dict)

    def limit(self, kinds: tuple[str, ...]) -> None:
        """Give each node the quota with which a token takes 1 / `speed` of its declared time; see `layout.shares`."""
        self.shares = shares(self.declared, kinds, self.token_s, self.speed)
        self.cores = cores_of(self.shares, os.cpu_count() or 1)
        for name in self.shares:
            self.set_node(name, NodeState())
            pin(self.cluster.processes[name].pid, self.cores[name])
        _log.info("quotas", **{name: f"{share:.3f}" for name, share in self.shares.items()})

    def set_node(self, name: str, state: NodeState) -> None:
        """Have a node be as a phase of a scenario says."""
        share = self.shares[name] / state.slowdown
        self.groups.limit(name, share, state.background_utilization, self.cores[name])

    def set_link(self, between: tuple[str, str], state: LinkState) -> None:
        """Have a link be as a phase of a scenario says."""
        i, j = sorted(self.declared.node_names.index(name) for name in between)
        names = self.declared.node_names
        self.network.shape((names[i], names[j]), Shape(state.latency_s, state.bandwidth_bytes_per_s, loss=state.loss))


@contextlib.contextmanager
def running(cluster_file: Path, state: Path, model: str, pace: Pace) -> Iterator[Testbed]:
    """Run the cluster in the testbed until the end of the block, then remove everything. Nodes have no quotas yet.

    This process enters the namespace of the source, where its clients reach the gateway on the loopback address, and
    returns. So it must not have started threads that need the network. ConfigError if the testbed cannot run here.
    """
    require()
    with in_use(LOCK):  # the testbed's names are those of the whole machine
        yield from _running(cluster_file, state, model, pace)


def _running(cluster_file: Path, state: Path, model: str, pace: Pace) -> Iterator[Testbed]:
    _remove_all()  # what a run that was killed has left
    content = faster(read_cluster(cluster_file), pace.load)
    declared = parse_cluster(content, str(cluster_file))
    config = _prepare(content, state)
    # Before: the namespaces have no way to the package index.
    stored = obtain(model, state / "models", config.weights, config.split, config.engine)
    # Before the nodes share the cores.
    token_s = decode_step_s(stored)
    _log.info("a token on a whole core", seconds=round(token_s, 4))
    network, groups = Network(declared.node_names, links_of(declared)), Groups()
    cluster = Cluster(f"http://127.0.0.1:{_HTTP_PORT}", state, config, model)
    outside = f"/proc/{os.getpid()}/ns/net"
    home = os.open(outside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        groups.make(declared.node_names)
        network.start()
        for name in declared.node_names:
            start_process(cluster, name, within(namespace(name), _command(cluster, name)))
            groups.join(f"{name}/node", cluster.processes[name].pid)
        start_process(cluster, CONTROLLER, within(namespace(declared.source), _command(cluster, CONTROLLER)))
        enter(f"/run/netns/{namespace(declared.source)}")
        _await_ready(cluster)
        yield Testbed(cluster, declared, pace.speed, network, groups, token_s)
    finally:
        enter(f"/proc/self/fd/{home}")
        os.close(home)
        groups.stop()
        cluster.stop()
        network.stop()
        remove_groups()


def decode_step_s(model: StoredModel) -> float:
    """Processor time of a decode step of one session through all blocks: the median over some steps."""
    engine = open_engine(model.spec)
    for block, feature in enumerate(engine.features):
        engine.load(block, model.content(feature.name))

    def step_s(start: int, tokens: int) -> float:
        rows = SessionRows("a session", start, _CONTEXT + _STEPS, engine.blank_input(0, tokens))
        begun_s = time.thread_time()
        engine.run(0, len(engine.kinds) - 1, [rows])
        return time.thread_time() - begun_s

    step_s(0, _CONTEXT)
    return statistics.median(step_s(_CONTEXT + step, 1) for step in range(_STEPS))


def pin(process: int, core: int) -> None:
    """Have all threads of a process run on one core."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def _remove_all() -> None:
    remove_groups()
    remove_namespaces()


def _prepare(declared: Mapping[str, Any], state: Path) -> ClusterConfig:
    """Keys, and the cluster file for real machines; nothing else is left of an earlier run but the packaged model."""
    (state / "log").mkdir(parents=True, exist_ok=True)
    for stale in (*(state / name for name in _STALE), *state.glob("epochs.db*"), *(state / "log").glob("*.log")):
        stale.unlink(missing_ok=True)
    content = cluster_of_real_machines(declared)
    config = parse_cluster(content, str(state / "cluster.yaml"))
    keys_command(state / "keys", config.node_names)
    write_atomically(state / "cluster.yaml", yaml.safe_dump(content, sort_keys=False), 0o600)
    return config


def _command(cluster: Cluster, name: str) -> list[str]:
    file, state = str(cluster.state / "cluster.yaml"), str(cluster.state)
    arguments = (
        ["serve", file, "--port", str(_HTTP_PORT), "--model", cluster.model]
        if name == CONTROLLER
        else ["node", file, "--name", name, "--keys", str(cluster.state / "keys" / name)]
    )
    shared = ["--registry", str(cluster.state / "registry"), "--state", state, "--end-with-parent"]
    return [sys.executable, "-m", "resplit.cli", *arguments, *shared]


def _await_ready(cluster: Cluster) -> None:
    until_s = time.monotonic() + _READY_WITHIN_S
    while not (cluster.state / "ready").exists():
        if dead := cluster.dead():
            status = cluster.processes[dead[0]].returncode
            raise ResplitError(f"{dead[0]} ended with status {status}: {last_error(cluster.state, dead[0])}")
        if time.monotonic() > until_s:
            raise ResplitError(f"not ready within {_READY_WITHIN_S:.0f} s; see {cluster.state / 'log'}")
        time.sleep(0.1)
