"""Clusters of real, encrypted processes on this machine, each node with one thread, and what they cost."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from resplit.cluster.client import ControlClient
from resplit.cluster.local import Cluster, running, start_process
from resplit.epochs import Proposal
from resplit.security.identity import CONTROLLER

MODEL = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Setup:
    """A cluster to measure: `nodes` nodes that share the layers evenly, with weights of one width.

    `latency_ms` emulates the links between them; without it they are real. `copy_every` and `drafts` as in the cluster
    file.
    """

    nodes: int
    weights: str
    copy_every: int = 0
    latency_ms: float | None = None
    drafts: int = 0

    def content(self) -> dict[str, object]:
        """The cluster file."""
        names = [f"node-{number}" for number in range(self.nodes)]
        link = {"latency": f"{self.latency_ms} ms", "bandwidth": "1 Gbit/s"}
        return {
            "name": "benchmark",
            "source": names[0],
            "trusted": names,
            "nodes": [{"name": name, "memory": "3 GiB", "max_utilization": 0.99} for name in names],
            "links": None if self.latency_ms is None else {"default": link},
            "classes": [{"name": "default", "rate_rps": 0.01, "prompt_tokens": 64, "new_tokens": 64}],
            "limits": {
                "context_tokens": 2048, "sessions": 16, "queue": 64, "deadline": "600 s",
                "copy_every": self.copy_every, "drafts": self.drafts,
            },
            "kv_tokens": 16 * 2048,
            "weights": self.weights,
        }  # fmt: skip

    def placement(self, blocks: int) -> tuple[str, ...]:
        """Equal shares of the layers; embedding and head on the first node."""
        shares = [f"node-{block * self.nodes // blocks}" for block in range(blocks)]
        return ("node-0", *shares[1:-1], "node-0")


@contextlib.contextmanager
def serving(setup: Setup, models: Path) -> Iterator[Cluster]:
    """The cluster, with its placement live. Packaged models are kept in `models`."""
    with tempfile.TemporaryDirectory(prefix="resplit-bench-") as folder:
        state = Path(folder)
        (state / "models").symlink_to(models.resolve(), target_is_directory=True)
        (state / "file.yaml").write_text(yaml.safe_dump(setup.content()), encoding="utf-8")
        with running(state / "file.yaml", state, MODEL) as cluster:
            with ControlClient(cluster.url, cluster.token) as client:
                live = client.model()
                client.propose(Proposal(setup.placement(len(live.features)), "initial", live.epoch))
            yield cluster


@dataclass(frozen=True)
class Cost:
    """Processor seconds that the processes of a cluster have used, and resident bytes.

    `node_overhead_bytes` are those beside the blocks and caches that a node holds. Of nodes, the largest bytes count.
    """

    gateway_s: float
    nodes_s: float
    node_bytes: float
    node_overhead_bytes: float

    @classmethod
    def of(cls, cluster: Cluster) -> Cost:
        """What they have used up to now."""
        seconds, resident = {}, {}
        for name, process in cluster.processes.items():
            seen = psutil.Process(process.pid)
            seconds[name] = sum(seen.cpu_times()[:2])
            resident[name] = seen.memory_info().rss
        nodes = [name for name in seconds if name != CONTROLLER]
        with ControlClient(cluster.url, cluster.token) as client:
            held = {node.node: node.held_bytes for node in client.status().nodes}
        return cls(
            seconds[CONTROLLER],
            sum(seconds[name] for name in nodes),
            max(float(resident[name]) for name in nodes),
            max(resident[name] - held[name] for name in nodes),
        )


def restart_s(cluster: Cluster, name: str, command: Sequence[str] | None = None) -> float:
    """Kill a node. Returns seconds from the start of its new process until it serves the live epoch again."""
    cluster.processes[name].kill()
    cluster.processes[name].wait()
    with ControlClient(cluster.url, cluster.token) as client:
        while name not in client.model().lost:
            time.sleep(0.01)
        begun_s = time.monotonic()
        start_process(cluster, name, command)
        while client.status().ready != "yes":
            time.sleep(0.01)
        return time.monotonic() - begun_s
