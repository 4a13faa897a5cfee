"""How fast the simulator is: an hour of many nodes, by policy.

    python -m benchmarks.simulator [--nodes 16] [--rps 5] [--hours 1] [--policy static]

The nodes are copies of those of data/clusters/home.yaml, so that requests take the same way through a small cluster and
a large one. One line of JSON: wall and processor seconds, and passes through segments.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from resplit.config import ClusterConfig, NodeConfig, SharedTime, load_cluster
from resplit.scenario import ScenarioConfig
from resplit.simulate.command import run_policy
from resplit.simulate.models import load_model
from resplit.simulate.world import World

HOME = Path("data/clusters/home.yaml")
MODEL = Path("data/models/SmolLM2-135M-Instruct-int4.yaml")
FASTER = 0.1  # the time of a pass on these nodes, relative to home's: they have to carry the whole load


def copied(nodes: int, rps: float) -> ClusterConfig:
    """A cluster of `nodes` faster copies of the nodes of home, with `rps` requests per second in all."""
    home = load_cluster(HOME)
    kept = [home.nodes[index % len(home.nodes)] for index in range(nodes)]
    names = [node.name if index < len(home.nodes) else f"{node.name}-{index}" for index, node in enumerate(kept)]
    return home.model_copy(
        update={
            "nodes": tuple(_faster(node, name) for node, name in zip(kept, names, strict=True)),
            "classes": (home.classes[0].model_copy(update={"rate_rps": rps}),),
            "limits": home.limits.model_copy(update={"sessions": 256, "queue": 512}),
            "kv_tokens": 8192,
        }
    )


def _faster(node: NodeConfig, name: str) -> NodeConfig:
    """The node with another name, more memory and shorter times."""
    assert node.emulate is not None
    decode, prefill = node.emulate.decode_per_token, node.emulate.prefill_per_token
    shared = {
        kind: SharedTime.model_construct(fixed=FASTER * fixed, per_session=FASTER * session)
        for kind, (fixed, session) in decode.parts().items()
    }
    emulate = node.emulate.model_copy(
        update={
            "decode_per_token": decode.model_copy(update=shared),
            "prefill_per_token": prefill.model_copy(
                update={kind: FASTER * seconds for kind, seconds in prefill.model_dump().items()}
            ),
        }
    )
    return node.model_copy(update={"name": name, "memory": 4 * node.memory, "emulate": emulate})


def main() -> None:
    """Simulate, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--rps", type=float, default=5.0)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--policy", default="static")
    given = parser.parse_args()
    cluster = copied(given.nodes, given.rps)
    scenario = ScenarioConfig.model_construct(name="hour", duration=3600 * given.hours)
    world = World(cluster, load_model(MODEL, cluster.private_layers), scenario)
    begun_s, begun_cpu_s = time.perf_counter(), time.process_time()
    record, found = run_policy(world, given.policy, 7)
    segments = len(set(str(record.epochs.placement.iloc[0]).split(",")))
    took = {
        "wall_s": round(time.perf_counter() - begun_s, 1),
        "processor_s": round(time.process_time() - begun_cpu_s, 1),
        "passes": len(record.tokens) * segments,
    }
    printed = found.to_json()
    kept = {key: printed[key] for key in ("policy", "simulated_s", "offered", "completed", "latency_mean_s", "qos_met")}
    sys.stdout.write(json.dumps(kept | took) + "\n")


if __name__ == "__main__":
    main()
