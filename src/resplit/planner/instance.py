"""A problem as the arrays on which all solvers work; weights and rates are folded into the costs.

Blocks between two allowed cuts share a node in every legal placement. They are merged into one *atom*, so that
solvers may cut between any two atoms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from resplit.planner.evaluate import SLACK, block_bytes
from resplit.types import FloatArray, Problem

__all__ = ["Instance", "IntArray"]

IntArray = NDArray[np.intp]


@dataclass(frozen=True, eq=False)
class Instance:
    """The arrays of a problem with A atoms and N nodes. Costs are in units of the objective.

    - `first` (A,): the first block of each atom.
    - `load` (A, N): the utilisation that an atom adds to a node; inf if it may not run there (its times are null, or
      it is private and the node is not trusted). `load_share` (N,): the factor rho_i in it.
    - `memory` (A,), `memory_limit` (N,): bytes.
    - `fixed` (A, N): privacy and energy cost, both of which add up over atoms.
    - `start`, `end` (N,): transfer cost from the sources to the first node, and from the last node to the sources.
    - `hops[hop_of[b]]` (N, N): transfer cost at boundary b = 1..A-1; inf on the diagonal and without a link.
    - `latency_weight`: alpha / L. `balance_weight`: beta.
    - `background` (N,): utilisation by other work.
    - `headroom` (N,): the load that a node may take; negative if its background exceeds the ceiling.
    """

    problem: Problem
    first: IntArray
    load: FloatArray
    load_share: FloatArray
    memory: FloatArray
    memory_limit: FloatArray
    fixed: FloatArray
    start: FloatArray
    end: FloatArray
    hops: tuple[FloatArray, ...]
    hop_of: IntArray
    latency_weight: float
    background: FloatArray
    headroom: FloatArray
    balance_weight: float

    @classmethod
    def of(cls, problem: Problem) -> Instance:
        """Make the arrays of `problem`."""
        cuts = range(1, len(problem.blocks)) if problem.allowed_cuts is None else sorted(problem.allowed_cuts)
        first = np.array([0, *cuts], dtype=np.intp)
        block_load = _block_load(problem)
        fixed = _privacy_cost(problem) + _energy_cost(problem, block_load)
        hops, hop_of = _hops(problem, first)
        start, end = _ends(problem)
        background = np.array([node.background_utilization for node in problem.nodes])
        ceiling = np.array([node.max_utilization for node in problem.nodes])
        return cls(
            problem=problem,
            first=first,
            load=np.add.reduceat(block_load, first, axis=0),
            load_share=_load_share(problem),
            memory=np.add.reduceat(block_bytes(problem), first),
            memory_limit=np.array([node.memory_bytes for node in problem.nodes]) * (1 + SLACK),
            fixed=np.add.reduceat(fixed, first, axis=0),
            start=start,
            end=end,
            hops=hops,
            hop_of=hop_of,
            latency_weight=problem.weights.latency / _total_rate(problem),
            background=background,
            headroom=ceiling - background + SLACK,
            balance_weight=problem.weights.balance,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(atoms, nodes)."""
        return self.load.shape[0], self.load.shape[1]

    @cached_property
    def queue_weight(self) -> FloatArray:
        """The weight alpha / (L rho_i) of the queueing term of each node (N,)."""
        weight: FloatArray = self.latency_weight / self.load_share
        return weight

    @cached_property
    def load_prefix(self) -> FloatArray:
        """Prefix sums of the load (A + 1, N); atoms that may not run count 0 (see `blocked_prefix`)."""
        finite = np.where(np.isfinite(self.load), self.load, 0)
        return np.vstack([np.zeros(finite.shape[1]), finite.cumsum(axis=0)])

    @cached_property
    def memory_prefix(self) -> FloatArray:
        """Prefix sums of the memory, in bytes (A + 1,)."""
        return np.concatenate(([0.0], self.memory.cumsum()))

    @cached_property
    def fixed_prefix(self) -> FloatArray:
        """Prefix sums of the privacy and energy cost (A + 1, N)."""
        return np.vstack([np.zeros(self.fixed.shape[1]), self.fixed.cumsum(axis=0)])

    @cached_property
    def blocked_prefix(self) -> IntArray:
        """Prefix counts of the atoms that may not run on a node (A + 1, N)."""
        blocked = ~np.isfinite(self.load)
        return np.vstack([np.zeros(blocked.shape[1], dtype=np.intp), blocked.cumsum(axis=0)])

    def hop(self, boundary: int | np.integer) -> FloatArray:
        """Transfer cost from row to column at `boundary` (1..A-1), (N, N)."""
        return self.hops[int(self.hop_of[boundary])]

    def queue_cost(self, load: FloatArray) -> FloatArray:
        """Queueing cost (alpha / (L rho_i)) load / (1 - b_i - load) of a `load` (..., N) within the headroom."""
        cost: FloatArray = self.queue_weight * load / (1 - self.background - load)
        return cost

    def alone_cost(self) -> FloatArray:
        """Queueing cost of an atom alone on a node, as its load tends to 0 (A, N); inf if it may not run."""
        load = np.where(np.isfinite(self.load), self.load, 0)
        cost = self.queue_weight * load / (1 - self.background)
        return np.where(np.isfinite(self.load), cost, np.inf)

    def loads(self, nodes_of: IntArray) -> FloatArray:
        """Load of each node (N,) if atom a is on node `nodes_of[a]`."""
        atoms = np.arange(len(nodes_of))
        load: FloatArray = np.bincount(nodes_of, self.load[atoms, nodes_of], self.shape[1]).astype(float)
        return load

    def cost(self, nodes_of: IntArray) -> float:
        """Objective of the placement `nodes_of` (A,); inf if it violates a constraint."""
        load = self.loads(nodes_of)
        memory = np.bincount(nodes_of, self.memory, self.shape[1])
        used = np.unique(nodes_of)
        if not (load[used] <= self.headroom[used]).all() or (memory > self.memory_limit).any():
            return float("inf")
        return float(
            self.path_cost(nodes_of)
            + self.queue_cost(load)[used].sum()
            + self.balance_weight * (self.background + load).max()
        )

    def excess(self, nodes_of: IntArray) -> float:
        """Sum of the excesses over memory limits (as a share of the model's memory) and over headrooms.

        It is inf if the placement needs a missing link.
        """
        over_memory = np.bincount(nodes_of, self.memory, self.shape[1]) - self.memory_limit
        load = self.loads(nodes_of)
        over_load = (load - self.headroom)[load > 0]
        needed = max(float(self.memory.sum()), 1e-300)
        broken = 0.0 if np.isfinite(self.path_cost(nodes_of)) else float("inf")
        return float(broken + over_memory.clip(min=0).sum() / needed + over_load.clip(min=0).sum())

    def path_cost(self, nodes_of: IntArray) -> float:
        """Transfer, privacy and energy cost of a placement (A,); inf if a link is missing."""
        atoms = np.arange(len(nodes_of))
        total = self.start[nodes_of[0]] + self.end[nodes_of[-1]] + self.fixed[atoms, nodes_of].sum()
        for b in np.flatnonzero(nodes_of[1:] != nodes_of[:-1]) + 1:
            total += self.hop(b)[nodes_of[b - 1], nodes_of[b]]
        return float(total)

    def placement(self, nodes_of: IntArray) -> tuple[str, ...]:
        """The node name of each block if atom a is on node `nodes_of[a]`."""
        atom_of = np.searchsorted(self.first, np.arange(len(self.problem.blocks)), side="right") - 1
        return tuple(self.problem.nodes[i].name for i in nodes_of[atom_of])

    def nodes_of(self, placement: Sequence[str]) -> IntArray:
        """The node of each atom (A,), given one node name per block; -1 if the node is gone or cannot run the atom.

        If a placement changes node inside an atom, the atom's first block decides.
        """
        index = {node.name: i for i, node in enumerate(self.problem.nodes)}
        nodes_of = np.array([index.get(placement[j], -1) for j in self.first], dtype=np.intp)
        runs = np.isfinite(self.load[np.arange(len(nodes_of)), nodes_of])
        return np.where(runs, nodes_of, -1)


def _total_rate(problem: Problem) -> float:
    return sum(request_class.rate_rps for request_class in problem.classes)


def _load_share(problem: Problem) -> FloatArray:
    return np.array([node.load_share for node in problem.nodes])


def _block_load(problem: Problem) -> FloatArray:
    """rho_i sum_r lambda_r s[r, j, i] (J, N); inf if block j may not run on node i."""
    prompts = sum(c.rate_rps * c.prompt_tokens for c in problem.classes)
    tokens = sum(c.rate_rps * c.new_tokens for c in problem.classes)
    load = _load_share(problem) * (prompts * problem.prefill_s_per_token + tokens * problem.decode_s_per_token)
    private = np.array([block.private for block in problem.blocks])
    trusted = np.array([node.trusted for node in problem.nodes])
    return np.where(np.isnan(load) | np.outer(private, ~trusted), np.inf, load)


def _privacy_cost(problem: Problem) -> FloatArray:
    sensitivity = np.array([block.sensitivity for block in problem.blocks]) / len(problem.blocks)
    untrusted = np.array([not node.trusted for node in problem.nodes])
    return problem.weights.privacy * np.outer(sensitivity, untrusted)


def _energy_cost(problem: Problem, load: FloatArray) -> FloatArray:
    """(delta / L) P_i load[j, i] (J, N); 0 if block j may not run on node i."""
    price = problem.weights.energy / _total_rate(problem) * np.array([node.compute_w for node in problem.nodes])
    return price * np.where(np.isfinite(load), load, 0)


def _ends(problem: Problem) -> tuple[FloatArray, FloatArray]:
    """Rate-weighted transfer costs from the sources to each node, and from each node to the sources, each (N,)."""
    start = np.zeros(len(problem.nodes))
    end = np.zeros(len(problem.nodes))
    for request_class in problem.classes:
        share = request_class.rate_rps / _total_rate(problem)
        source = problem.node_index(request_class.source)
        passes = request_class.prompt_tokens + request_class.new_tokens - 1
        there = _transfer(problem, request_class.new_tokens, passes * problem.token_bytes)[source]
        back = _transfer(problem, request_class.new_tokens, request_class.new_tokens * problem.token_bytes)[:, source]
        there[source] = back[source] = 0
        start += share * there
        end += share * back
    return _weighted(problem, start), _weighted(problem, end)


def _hops(problem: Problem, first: IntArray) -> tuple[tuple[FloatArray, ...], IntArray]:
    """Rate-weighted transfer costs (N, N), one matrix per activation size, and the index of the matrix per boundary."""
    rate = _total_rate(problem)
    messages = sum(c.rate_rps * c.new_tokens for c in problem.classes) / rate
    passes = sum(c.rate_rps * (c.prompt_tokens + c.new_tokens - 1) for c in problem.classes) / rate
    sizes = np.array([problem.blocks[j - 1].activation_bytes_per_token for j in first])
    distinct, hop_of = np.unique(sizes, return_inverse=True)
    hops = []
    for size in distinct:
        hop = _weighted(problem, _transfer(problem, messages, passes * float(size)))
        np.fill_diagonal(hop, np.inf)
        hops.append(hop)
    return tuple(hops), hop_of


def _transfer(problem: Problem, messages: float, size_bytes: float) -> FloatArray:
    """Seconds over each link (N, N); inf without a link."""
    seconds = messages * problem.link_latency_s + size_bytes / problem.link_bandwidth_bytes_per_s
    return np.where(np.isnan(seconds), np.inf, seconds)


def _weighted(problem: Problem, seconds: FloatArray) -> FloatArray:
    """alpha x seconds; inf stays inf if alpha is 0."""
    return np.where(np.isinf(seconds), np.inf, problem.weights.latency * np.nan_to_num(seconds, posinf=0))
