"""A cluster file of two nodes, as text that tests change, and the keys that such a file may have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

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


def keys_of(schema: type[BaseModel], place: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of a part of the cluster file, with dots between levels."""
    for name, field in schema.model_fields.items():
        yield place + name, field
        for section in sections(field):
            yield from keys_of(section, f"{place}{name}.")


def sections(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a key holds, in a list or as a choice."""
    parts, found = [field.annotation], []
    while parts:
        part = parts.pop()
        parts += get_args(part)
        found += [part] if isinstance(part, type) and issubclass(part, BaseModel) else []
    return found
