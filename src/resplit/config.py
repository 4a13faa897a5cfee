"""Cluster files: their schema, parsed once, with errors that name file, line, key and rule."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NewType

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_validator

from resplit.api_keys import ApiKeySource, hidden
from resplit.errors import ConfigError
from resplit.host_port import checked_host_port
from resplit.types import Device, EngineChoice, Split, Weights, Width
from resplit.units import Bytes, BytesPerSecond, Count, Number, Seconds, Watts
from resplit.yaml_files import Strict, first_error, known, load_file, unique


class BlockTimes(Strict):
    """Declared time of one prompt token of a block, by kind of block."""

    embed: Seconds
    layer: Seconds
    head: Seconds


class SharedTime(Strict):
    """Declared time of a decode step that sessions share: a fixed part, and a part for each session in the pass."""

    fixed: Seconds
    per_session: Seconds


# Of a decode step of one session in a layer or the head: what it would spend once for any number of sessions, because
# the weights are read once. The real engine's share at 4 bits (docs/performance.md); a table lookup shares nothing.
_SHARED_PART = {"embed": 0.0, "layer": 0.7, "head": 0.7}


class DecodeTimes(Strict):
    """Declared time of a decode step through a block, by kind of block.

    One number is the step of one session alone. It is divided into the two parts as the real engine's is.
    """

    embed: Seconds | SharedTime
    layer: Seconds | SharedTime
    head: Seconds | SharedTime

    def parts(self) -> dict[str, tuple[float, float]]:
        """The fixed part and the part for each session, in seconds, by kind of block."""
        return {kind: _parts(getattr(self, kind), shared) for kind, shared in _SHARED_PART.items()}


def _parts(time: float | SharedTime, shared: float) -> tuple[float, float]:
    return (time.fixed, time.per_session) if isinstance(time, SharedTime) else (shared * time, (1 - shared) * time)


class Emulation(Strict):
    """The hardware that a node emulates: its compute is padded to these times."""

    decode_per_token: DecodeTimes
    prefill_per_token: BlockTimes
    background_utilization: Annotated[Number, Field(ge=0, lt=1)] = 0.0


class NodeConfig(Strict):
    """One node. `memory` limits its weights and caches together; it listens at `address` (host:port).

    Its engine computes with `threads` threads on `device`: "auto" is a GPU where the torch engine finds one, else the
    processor. `compute_w` is its power above idle while it computes.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    address: Annotated[str, AfterValidator(checked_host_port)] | None = None
    memory: Bytes
    max_utilization: Annotated[Number, Field(gt=0, lt=1)] = 0.95
    compute_w: Watts | None = None
    threads: Annotated[Count, Field(ge=1)] = 1
    device: Device = "auto"
    emulate: Emulation | None = None


class LinkShape(Strict):
    """An emulated link, one way: propagation delay and bandwidth."""

    latency: Seconds
    bandwidth: Annotated[BytesPerSecond, Field(gt=0)]


class LinkConfig(LinkShape):
    """The link between two nodes, the same in both directions."""

    between: tuple[str, str]


class LinksConfig(Strict):
    """Emulated links: `default` for every pair that `pairs` does not name. Without this key, links are real."""

    default: LinkShape
    pairs: tuple[LinkConfig, ...] = ()

    @cached_property
    def of_pairs(self) -> Mapping[frozenset[str], LinkConfig]:
        """The link of each pair that is named, by its two nodes: the last one, where a pair is named twice."""
        return {frozenset(pair.between): pair for pair in self.pairs}


class ClassConfig(Strict):
    """A class of requests: its service objective `slo`, and the demand to expect before any is observed.

    `shed_late`: refuse a request at once if it could not be answered within `slo`.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    slo: Seconds | None = None
    shed_late: bool = False
    rate_rps: Annotated[Number, Field(gt=0)]
    prompt_tokens: Annotated[Number, Field(ge=1)]
    new_tokens: Annotated[Number, Field(ge=1)]
    api_keys: tuple[ApiKeySource, ...] = ()

    @model_validator(mode="after")
    def _shed_late_needs_slo(self) -> ClassConfig:
        if self.shed_late and self.slo is None:
            raise ValueError("shed_late needs an slo: a request is late after it")
        return self


class LimitsConfig(Strict):
    """Limits of the gateway. `context_tokens` bounds one session's cache, `sessions` the sessions that run at once.

    `connections` bounds the open connections at the port of the gateway.

    A running session's caches are replicated to stand-by nodes every `copy_every` positions; 0 turns this off.
    A pass verifies at most `drafts` tokens that were guessed, where that pays; 0 turns speculation off.
    """

    context_tokens: Annotated[Count, Field(ge=1)] = 512
    sessions: Annotated[Count, Field(ge=1)] = 16
    queue: Annotated[Count, Field(ge=0)] = 64
    body: Bytes = 2**20
    deadline: Seconds = 120.0
    copy_every: Annotated[Count, Field(ge=0)] = 16
    drafts: Annotated[Count, Field(ge=0, le=63)] = 15
    connections: Annotated[Count, Field(ge=1)] = 512


class HttpConfig(Strict):
    """Which browsers the gateway answers: `hosts` are names by which it may be called, `origins` are other sites.

    An origin is `http://host:port` or `https://host`. Without API keys, loopback names are always among the hosts and
    all others are refused. With API keys, other hosts are refused only if `hosts` names some.
    """

    hosts: tuple[Annotated[str, Field(pattern=r"^[^/@\s\[\]]+$")], ...] = ()
    origins: tuple[Annotated[str, Field(pattern=r"^https?://[^/\s]+$")], ...] = ()


class ObjectiveConfig(Strict):
    """alpha, beta, gamma and delta (per joule) of the planning objective."""

    latency: Annotated[Number, Field(ge=0)] = 1.0
    balance: Annotated[Number, Field(ge=0)] = 0.0
    privacy: Annotated[Number, Field(ge=0)] = 0.0
    energy: Annotated[Number, Field(ge=0)] = 0.0

    def values(self) -> Weights:
        """These weights as the type that the planner uses."""
        return Weights(self.latency, self.balance, self.privacy, self.energy)


class ClusterConfig(Strict):
    """A cluster file. The first class is the default one; `source` is the node at which the gateway runs.

    With `allow_special_tokens`, prompts of /v1/completions may contain special tokens.
    """

    name: Annotated[str, Field(min_length=1, max_length=100)]
    source: str
    nodes: Annotated[tuple[NodeConfig, ...], Field(min_length=1)]
    trusted: tuple[str, ...]
    classes: Annotated[tuple[ClassConfig, ...], Field(min_length=1)]
    links: LinksConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    http: HttpConfig = HttpConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    kv_tokens: Annotated[Count, Field(ge=1)]
    weights: Width = "float32"
    engine: EngineChoice = "auto"
    split: Split = "layer"
    allow_special_tokens: bool = False
    private_layers: Annotated[Count, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _names_are_known(self) -> ClusterConfig:
        names = self.node_names
        unique("nodes", names)
        unique("classes", [c.name for c in self.classes])
        known("source", [self.source], names)
        known("trusted", self.trusted, names)
        for pair in self.links.pairs if self.links else ():
            known("links.pairs.between", pair.between, names)
        if self.links is None and any(node.emulate for node in self.nodes):
            raise ValueError("links: emulated nodes need emulated links; add `links: {default: ...}`")
        return self

    @model_validator(mode="after")
    def _energy_is_known(self) -> ClusterConfig:
        if self.objective.energy and (unknown := [node.name for node in self.nodes if node.compute_w is None]):
            raise ValueError(
                f"objective.energy: needs the compute_w of every node, and {unknown[0]!r} has none: its energy would "
                "count as 0"
            )
        return self

    @property
    def node_names(self) -> list[str]:
        """Names in file order."""
        return [node.name for node in self.nodes]

    def node(self, name: str) -> NodeConfig:
        """The node called `name`; KeyError if there is none."""
        return next(node for node in self.nodes if node.name == name)

    def request_class(self, name: str) -> ClassConfig:
        """The class called `name`; KeyError if there is none."""
        return next(each for each in self.classes if each.name == name)

    def objective_s(self, name: str) -> float:
        """The service objective of the class called `name`; without one, the longest that any class has, or 0."""
        objectives_s = [each.slo for each in self.classes if each.slo is not None]
        return self.request_class(name).slo or max(objectives_s, default=0.0)

    def classes_by_key(self) -> dict[bytes, str]:
        """The class of each API key, by the key's digest. Reads variables and files; ConfigError if one has no key."""
        return {
            key: each.name
            for each in self.classes
            for source in each.api_keys
            for key in source.digests(f"classes: {each.name}: api_keys")
        }

    def link(self, one: str, other: str) -> LinkShape | None:
        """The emulated link between two nodes, None where links are not emulated or the nodes are the same."""
        if self.links is None or one == other:
            return None
        return self.links.of_pairs.get(frozenset((one, other)), self.links.default)


# The content of a valid cluster file as it was written, but with API keys as their SHA-256.
ClusterFile = NewType("ClusterFile", Mapping[str, Any])


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster file; ConfigError names file, line, key and rule."""
    return load_file(path, ClusterConfig)


def read_cluster(path: Path) -> ClusterFile:
    """The content of a cluster file, checked, without API keys in clear; ConfigError as `load_cluster`."""
    load_cluster(path)
    return without_clear_keys(yaml.safe_load(path.read_text(encoding="utf-8")))


def without_clear_keys(content: Mapping[str, Any]) -> ClusterFile:
    """The content of a valid cluster file with the same meaning, in which API keys stand as their SHA-256."""
    classes = [
        {**each, "api_keys": list(map(hidden, each["api_keys"]))} if "api_keys" in each else each
        for each in content["classes"]
    ]
    return ClusterFile({**content, "classes": classes})


def parse_cluster(content: object, place: str) -> ClusterConfig:
    """A cluster from the content of its file; ConfigError names `place`, key and rule."""
    try:
        return ClusterConfig.model_validate(content)
    except ValidationError as error:
        location, rule = first_error(error, ClusterConfig)
        raise ConfigError(": ".join([place, *([".".join(map(str, location))] if location else [])]), rule) from None
