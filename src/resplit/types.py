"""The placement problem and its answer as values (docs/problem.md), shared by all other modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]
EngineName = Literal["onnx", "torch"]
EngineChoice = Literal["auto", "onnx", "torch"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Split = Literal["layer", "sublayer"]
Width = Literal["float32", "bfloat16", "float16", "int8", "int4"]


@dataclass(frozen=True)
class Block:
    """One block of the model's chain, the smallest unit that is placed on a node."""

    name: str
    weight_bytes: float
    kv_bytes_per_token: float
    activation_bytes_per_token: float
    private: bool
    sensitivity: float


@dataclass(frozen=True)
class BlockFeatures:
    """Properties of a block that follow from the model alone; the inputs of the cost model.

    `flops_per_token` counts the matrix products of one new token, `flops_per_context_token` those added by each
    cached token. `weight_bytes` is the size of the packaged block.
    """

    name: str
    kind: Literal["embed", "layer", "attention", "mlp", "head"]
    parameters: int
    flops_per_token: float
    flops_per_context_token: float
    weight_bytes: float
    kv_bytes_per_token: float
    activation_bytes_per_token: float
    private: bool
    sensitivity: float

    def block(self) -> Block:
        """The part of these features that the planner uses."""
        return Block(
            self.name,
            self.weight_bytes,
            self.kv_bytes_per_token,
            self.activation_bytes_per_token,
            self.private,
            self.sensitivity,
        )


@dataclass(frozen=True)
class Node:
    """A machine that can hold blocks.

    `background_utilization` is the share of it that other work uses. `load_share` (0 to 1) is the part of a request's
    node time that adds to the load, as sessions share the rest; `compute_w` the power above idle, in watts.
    """

    name: str
    memory_bytes: float
    background_utilization: float
    max_utilization: float
    trusted: bool
    load_share: float = 1.0
    compute_w: float = 0.0


@dataclass(frozen=True)
class RequestClass:
    """Requests of one kind; they arrive at the node `source` as a Poisson process of `rate_rps` per second."""

    name: str
    source: str
    rate_rps: float
    prompt_tokens: float
    new_tokens: float
    slo_s: float | None = None


@dataclass(frozen=True)
class Weights:
    """The weights of the objective (eq. 3): alpha, beta, gamma, and delta (per joule) for energy."""

    latency: float = 1.0
    balance: float = 0.0
    privacy: float = 0.0
    energy: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """One placement problem, with J blocks and N nodes.

    `prefill_s_per_token` and `decode_s_per_token` (J, N) are NaN, in both, where a node cannot run a block.
    `link_latency_s` and `link_bandwidth_bytes_per_s` (N, N), from row to column, are NaN, in both, where there is no
    link. If `allowed_cuts` is None, every boundary may be cut. `current` is the present placement, one node name per
    block.
    """

    blocks: tuple[Block, ...]
    nodes: tuple[Node, ...]
    classes: tuple[RequestClass, ...]
    prefill_s_per_token: FloatArray
    decode_s_per_token: FloatArray
    link_latency_s: FloatArray
    link_bandwidth_bytes_per_s: FloatArray
    kv_tokens: float
    weights: Weights
    token_bytes: float = 4.0
    allowed_cuts: frozenset[int] | None = None
    current: tuple[str, ...] | None = None

    def node_index(self, name: str) -> int:
        """Index of the node called `name`. Raises ValueError if the problem has no such node."""
        return [node.name for node in self.nodes].index(name)


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Temperature 0 is greedy; otherwise the draw depends only on `seed` and the position.

    Drawn is from the most likely tokens: those with probability `top_p` together, at most `top_k` of them (0: any
    number), and none less likely than `min_p` times the first.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0


@dataclass(frozen=True)
class LogitChange:
    """What changes the logits at one position before a token is chosen there.

    Of `allowed`, bit i % 8 of byte i // 8 says whether token i may be chosen; tokens beyond it may not. Empty: all may.
    `added` has values to add, by token.
    """

    allowed: bytes = b""
    added: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Logprobs:
    """The logarithm of the probability that the model gave one token, and the most likely tokens with theirs."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Segment:
    """The consecutive blocks `first` to `last`, both included, on one node."""

    first: int
    last: int
    node: str


@dataclass(frozen=True)
class Terms:
    """The unweighted terms of the objective.

    They are seconds per request, the highest utilisation, the share of exposed sensitivity, and joules per request.
    """

    latency_s: float
    balance: float
    privacy: float
    energy_j: float


@dataclass(frozen=True)
class Plan:
    """The answer to a `Problem`.

    If `status` is infeasible or unknown, `reason` says why, and all fields that describe a placement are None or empty.
    No placement of the problem has an objective below `lower_bound`.
    """

    status: Status
    solver: str
    solve_s: float
    placement: tuple[str, ...] | None = None
    segments: tuple[Segment, ...] = ()
    objective: float | None = None
    terms: Terms | None = None
    lower_bound: float | None = None
    gap: float | None = None
    class_latency_s: dict[str, float] = field(default_factory=dict)
    utilization: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    slo_shortfall_s: dict[str, float] = field(default_factory=dict)
    moved_bytes: float | None = None


def segments_of(placement: tuple[str, ...]) -> tuple[Segment, ...]:
    """The maximal runs of consecutive blocks on one node, in model order."""
    segments: list[Segment] = []
    for index, node in enumerate(placement):
        if segments and segments[-1].node == node:
            segments[-1] = Segment(segments[-1].first, index, node)
        else:
            segments.append(Segment(index, index, node))
    return tuple(segments)
