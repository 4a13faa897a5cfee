"""The desired state of a cluster: its cluster file, and the changes that operators have made by command.

`changes` lists how two states differ, and refuses a change that a running cluster cannot follow. `operations` applies
the changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from resplit.config import ClusterConfig, ClusterFile, NodeConfig, parse_cluster, without_clear_keys
from resplit.errors import ConfigError
from resplit.files import NOTHING_WRITTEN, write_atomically

# Nodes and gateway read these keys only when they start.
_FIXED = ("name", "source", "weights", "engine", "split", "kv_tokens", "limits", "http", "allow_special_tokens")
_RESTART = "cannot change on a running cluster; restart `resplit serve` and the nodes with the changed file"


@dataclass(frozen=True)
class DesiredState:
    """The `content` of the cluster file as parsed from YAML, the nodes that are drained, and trust set by command."""

    content: ClusterFile
    drained: frozenset[str] = frozenset()
    trust: Mapping[str, bool] = field(default_factory=dict)

    @cached_property
    def cluster(self) -> ClusterConfig:
        """The cluster under this state; ConfigError if the content is not a valid cluster file."""
        file = parse_cluster(self.content, "cluster file")
        trusted = tuple(name for name in file.node_names if self.trust.get(name, name in file.trusted))
        return file.model_copy(update={"trusted": trusted})

    @property
    def effective(self) -> ClusterFile:
        """The content of a cluster file with the same meaning, except for drained nodes."""
        return ClusterFile({**self.content, "trusted": list(self.cluster.trusted)})

    def with_drained(self, node: str) -> DesiredState:
        """With a node that may run no block; ConfigError for an unknown node."""
        return replace(self, drained=self.drained | {self._known(node)})

    def with_joined(self, node: str) -> DesiredState:
        """With a node that may run blocks again; ConfigError for an unknown node."""
        return replace(self, drained=self.drained - {self._known(node)})

    def with_trust(self, node: str, on: bool) -> DesiredState:
        """With a node trusted or not, regardless of the file; ConfigError for an unknown node."""
        return replace(self, trust={**self.trust, self._known(node): on})

    def with_file(self, content: Mapping[str, Any]) -> DesiredState:
        """With another cluster file. A node without an address in it keeps its current one.

        Drains and trust removed by command stay. Trust given by command ends: the file decides.
        ConfigError if the content is not a valid cluster file.
        """
        known = {node.name: node.address for node in self.cluster.nodes if node.address}
        parse_cluster(content, "cluster file")
        file = without_clear_keys(content)
        nodes = [
            {"address": known[node["name"]], **node} if node["name"] in known else dict(node) for node in file["nodes"]
        ]
        names = {node["name"] for node in nodes}
        distrusted = {name: False for name, on in self.trust.items() if not on and name in names}
        return DesiredState(ClusterFile({**file, "nodes": nodes}), self.drained & names, distrusted)

    def _known(self, node: str) -> str:
        if node not in self.cluster.node_names:
            raise ConfigError(
                repr(node),
                f"not in this cluster; it has {', '.join(self.cluster.node_names)}. To add a node, put it into the "
                "cluster file and run `resplit apply`",
            )
        return node


def changes(old: DesiredState, new: DesiredState) -> list[str]:
    """How two states differ, one sentence for each change. ConfigError if a key cannot change on a running cluster."""
    before, after = old.cluster, new.cluster
    for key in _FIXED:
        if getattr(before, key) != getattr(after, key):
            raise ConfigError(key, _RESTART)
    _refuse_other_links(before, after)
    found = [f"{name} is added" for name in after.node_names if name not in before.node_names]
    found += [f"{name} is removed" for name in before.node_names if name not in after.node_names]
    for node in after.nodes:
        if node.name in before.node_names:
            found += _node_changes(before.node(node.name), node)
    for name in after.node_names:
        if (name in after.trusted) != (name in before.trusted):
            found.append(f"{name} is {'trusted' if name in after.trusted else 'not trusted any more'}")
        if (name in new.drained) != (name in old.drained):
            found.append(f"{name} is {'drained' if name in new.drained else 'used again'}")
    if before.private_layers != after.private_layers:
        found.append(f"private_layers is {after.private_layers}")
    return found + _demand_changes(before, after)


def _refuse_other_links(before: ClusterConfig, after: ClusterConfig) -> None:
    """ConfigError if an emulated link between two nodes that stay differs. The control API changes such links."""
    both = [name for name in after.node_names if name in before.node_names]
    pairs = [(one, other) for one in both for other in both if one < other]
    if other := next((pair for pair in pairs if before.link(*pair) != after.link(*pair)), None):
        raise ConfigError(f"links: {' - '.join(other)}", _RESTART)


def _node_changes(before: NodeConfig, after: NodeConfig) -> list[str]:
    found = []
    if before.address != after.address:
        found.append(f"{after.name} is at {after.address}")
    if before.max_utilization != after.max_utilization:
        found.append(f"{after.name}: max_utilization is {after.max_utilization}")
    if before.compute_w != after.compute_w:
        power = "not known any more" if after.compute_w is None else f"{after.compute_w:g} W"
        found.append(f"{after.name}: compute_w is {power}")
    other = [key for key in ("memory", "emulate", "threads", "device") if getattr(before, key) != getattr(after, key)]
    found += [f"{after.name}: {key} changed; restart the node with the file to apply it" for key in other]
    return found


def _demand_changes(before: ClusterConfig, after: ClusterConfig) -> list[str]:
    keys = [
        {(source, each.name) for each in cluster.classes for source in each.api_keys} for cluster in (before, after)
    ]
    if keys[0] != keys[1]:
        raise ConfigError("classes: api_keys", _RESTART)
    found = [] if before.classes == after.classes else ["classes are changed"]
    return found if before.objective == after.objective else [*found, "the objective is changed"]


def load_desired_state(path: Path, content: ClusterFile) -> DesiredState:
    """The state saved at `path`, for a controller that starts with a cluster file of this content.

    A cluster file that differs from the saved one is applied (`DesiredState.with_file`). ConfigError if the file at
    `path` cannot be read.
    """
    if not path.exists():
        return DesiredState(content)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        # Before 0.1.0 the file held API keys in clear.
        kept_content, started_with = without_clear_keys(kept["content"]), without_clear_keys(kept["started_with"])
        desired = DesiredState(kept_content, frozenset(kept["drained"]), dict(kept["trust"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            str(path), f"cannot be read ({error}); it holds the changes that operators made by command"
        ) from None
    return desired if content in (desired.content, started_with) else desired.with_file(content)


def save_desired_state(desired: DesiredState, started_with: ClusterFile, path: Path) -> None:
    """Save a state; a crash leaves the previous one. ConfigError if the file cannot be written."""
    kept = {
        "content": desired.content,
        "drained": sorted(desired.drained),
        "trust": desired.trust,
        "started_with": started_with,
    }
    try:
        write_atomically(path, json.dumps(kept, indent=1), 0o600)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror}); {NOTHING_WRITTEN}") from None
