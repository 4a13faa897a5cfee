"""Checks, before a cluster starts, whether this machine can emulate the nodes of its file.

Padding can only make a pass longer, and all emulated nodes share the cores of this machine. If the file declared faster
hardware, or more work than the cores can do, results would be wrong and nothing would show it.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any

from resplit.config import ClassConfig, ClusterConfig
from resplit.errors import SlowMachineError
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.source import StoredModel
from resplit.node.emulation import Hardware, Load

_REPEATS = 24
# A block that is measured alone has its weights in the processor's cache; in a pass through many blocks it has not.
HEADROOM = 1.1
# Of the cores. The gateway, the controller and the load generator use the rest.
_USABLE_SHARE = 0.8
_SESSION = "emulation check"


@dataclass(frozen=True)
class PassShape:
    """A pass of `tokens` new tokens on top of `context` cached ones."""

    tokens: int
    context: int

    @property
    def decoding(self) -> bool:
        """Whether this is a decode step, not a prefill."""
        return self.context > 0

    @property
    def load(self) -> Load:
        """The pass as emulated hardware counts it."""
        return Load(1, 0) if self.decoding else Load(0, self.tokens)

    def __str__(self) -> str:
        return f"a decode step after {self.context} tokens" if self.decoding else f"a prefill of {self.tokens} tokens"


CoreSeconds = dict[tuple[str, PassShape], float]  # of one block in one pass, by the block's kind and the pass


def check_emulation(cluster: ClusterConfig, model: StoredModel, cores: int | None = None) -> None:
    """Measure one block of each kind on this machine, and compare the times with those that the cluster file declares.

    `cores` defaults to the number of cores that this process may use. SlowMachineError if an emulated node declares
    less time than a block needs here, or if the declared demand needs more than 80 % of the cores. Without emulated
    nodes nothing is measured.
    """
    if any(node.emulate for node in cluster.nodes):
        work_s = measure_work(cluster, model)
        _ensure_time(cluster, work_s)
        _ensure_cores(cluster, model, work_s, cores or len(os.sched_getaffinity(0)))


def measure_work(cluster: ClusterConfig, model: StoredModel) -> CoreSeconds:
    """Core seconds of one block of each kind in each pass of the cluster's request classes.

    They are the thread time of the shortest of several passes, so that other load on this machine does not count.
    """
    engine = open_engine(model.spec)
    shapes = {shape for demand in cluster.classes for shape in _passes(demand)}
    work_s: CoreSeconds = {}
    for kind in dict.fromkeys(engine.kinds):
        block = engine.kinds.index(kind)
        engine.load(block, model.content(engine.features[block].name))
        work_s |= {(kind, shape): min(_pass_s(engine, block, shape) for _ in range(_REPEATS)) for shape in shapes}
        engine.drop(block)
    return work_s


def _passes(demand: ClassConfig) -> dict[PassShape, float]:
    """The passes of one request of a class and their numbers; decode steps count at their mean context."""
    prompt, steps = round(demand.prompt_tokens), demand.new_tokens - 1
    return {PassShape(prompt, 0): 1.0, PassShape(1, prompt + round(steps / 2)): steps}


def _pass_s(engine: Engine[Any], block: int, shape: PassShape) -> float:
    """Core seconds of one pass through one block."""
    capacity = shape.context + shape.tokens
    if shape.context:
        prefix = engine.blank_input(block, shape.context)
        engine.run(block, block, [SessionRows(_SESSION, 0, capacity, prefix)])
    rows = SessionRows(_SESSION, shape.context, capacity, engine.blank_input(block, shape.tokens))
    begun_s = time.thread_time()
    engine.run(block, block, [rows])
    spent_s = time.thread_time() - begun_s
    engine.close(_SESSION)
    return spent_s


def _ensure_time(cluster: ClusterConfig, work_s: CoreSeconds) -> None:
    for node in cluster.nodes:
        hardware = Hardware.declared(node.emulate) if node.emulate else None
        for (kind, shape), true_s in work_s.items():
            if hardware and (declared_s := hardware.node_s(kind, shape.load)) < true_s * HEADROOM:
                raise SlowMachineError(
                    f"{cluster.name}: nodes.{node.name}.emulate",
                    f"{shape} takes {declared_s * 1e3:.3g} ms in one block of kind {kind!r} as declared, but this "
                    f"machine truly needs {true_s * 1e3:.3g} ms; declare at least {true_s * HEADROOM * 1e3:.3g} ms",
                    true_s * HEADROOM / declared_s if declared_s > 0 else math.inf,
                )


def _ensure_cores(cluster: ClusterConfig, model: StoredModel, work_s: CoreSeconds, cores: int) -> None:
    kinds = [block.kind for block in model.spec.blocks]
    needed = sum(
        demand.rate_rps * count * sum(work_s[kind, shape] for kind in kinds)
        for demand in cluster.classes
        for shape, count in _passes(demand).items()
    )
    if needed > _USABLE_SHARE * cores:
        raise SlowMachineError(
            f"{cluster.name}: classes",
            f"the declared demand needs {needed:.2g} cores, and the emulated nodes share "
            f"{_USABLE_SHARE * cores:.2g} of this machine's {cores}; lower rate_rps or use a smaller model",
            needed / (_USABLE_SHARE * cores),
        )
