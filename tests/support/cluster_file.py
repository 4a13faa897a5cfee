"""A cluster file of two nodes, as text that tests change."""

from __future__ import annotations

from pathlib import Path

from resplit.config import ClusterConfig, load_cluster

CLUSTER = """\
name: test
source: hub
trusted: [hub]
nodes:
  - name: hub
    memory: 64 MiB
    emulate:
      decode_per_token: { embed: 1 ms, layer: 2 ms, head: 3 ms }
      prefill_per_token: { embed: 1 ms, layer: 2 ms, head: 3 ms }
  - name: far
    memory: 64 MiB
links:
  default: { latency: 1 ms, bandwidth: 100 Mbit/s }
  pairs:
    - { between: [hub, far], latency: 9 ms, bandwidth: 8 Mbit/s }
classes:
  - { name: chat, slo: 2 s, rate_rps: 1, prompt_tokens: 8, new_tokens: 8 }
kv_tokens: 64
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def cluster(folder: Path, old: str = "", new: str = "") -> ClusterConfig:
    assert old in CLUSTER
    return load_cluster(written(folder, CLUSTER.replace(old, new, 1)))
