"""Where the time of a decode step goes inside the engine.

`python -m benchmarks.serving.step_parts` runs the engine alone, in one thread, and prints the share of each kind of
graph, and of what is outside of graphs. It measures processor time, so other work on the machine matters less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving.clusters import MODEL
from resplit.model.activation import token_ids
from resplit.model.engines.base import SessionRows
from resplit.model.engines.onnx.runtime import Bound, Call, Graph
from resplit.model.source import obtain
from resplit.types import Width
from tests.support.engines import stored_engine

PROMPT_TOKENS, CAPACITY, WARM_STEPS = 128, 1024, 10
# The part that a graph computes, by its first output.
PARTS = {
    "hidden": "embedding",
    "qkv": "norm, queries, keys and values",
    "attended": "attention",
    "output": "output projection and MLP",
    "logits": "head",
}
OUTSIDE, COPY = "outside of graphs", "copy of the logits"
Parts = defaultdict[str, float]


@contextmanager
def timed_graphs(spent_s: Parts) -> Iterator[None]:
    """Within this, prepared runs of graphs add their processor time to their part."""
    original = Graph.call

    def call(graph: Graph, inputs: Iterable[Bound], outputs: Iterable[Bound]) -> Call:
        outputs = list(outputs)
        run, part = original(graph, inputs, outputs), PARTS[outputs[0][0]]

        def timed() -> None:
            begun_s = time.thread_time()
            run()
            spent_s[part] += time.thread_time() - begun_s

        return timed

    Graph.call = call  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Graph.call = original  # type: ignore[method-assign]


def measure(models: Path, weights: Width, steps: int, sessions: int) -> dict[str, float]:
    """The median seconds of each part of a decode step of so many sessions."""
    model = obtain(MODEL, models, weights)
    engine, last = stored_engine(model, threads=1), len(model.spec.blocks) - 1
    names = [f"session {number}" for number in range(sessions)]
    for name in names:
        engine.run(0, last, [SessionRows(name, 0, CAPACITY, token_ids([7] * PROMPT_TOKENS))])
    spent_s: Parts = defaultdict(float)
    found: defaultdict[str, list[float]] = defaultdict(list)
    with timed_graphs(spent_s):
        for step in range(WARM_STEPS + steps):
            # Every second step wants no logits: what it lacks outside of graphs is their copy.
            wanted = step % 2 == 0
            position, token = PROMPT_TOKENS + step, token_ids([5])
            batch = [SessionRows(name, position, CAPACITY, token, logits=wanted) for name in names]
            spent_s.clear()
            begun_s = time.thread_time()
            engine.run(0, last, batch)
            spent_s[OUTSIDE if wanted else COPY] = time.thread_time() - begun_s - sum(spent_s.values())
            if step >= WARM_STEPS:
                for part, seconds in spent_s.items():
                    found[part].append(seconds)
    medians = {part: statistics.median(each) for part, each in found.items()}
    with_copy_s, without_s = medians[OUTSIDE], medians[COPY]
    return medians | {OUTSIDE: without_s, COPY: max(0.0, with_copy_s - without_s)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.step_parts", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--weights", choices=["int4", "float32"], default="int4")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    found = [measure(arguments.models, arguments.weights, arguments.steps, each) for each in arguments.sessions]
    print(
        "| part of a decode step | "
        + " | ".join(f"{each} session{'s' * (each > 1)}" for each in arguments.sessions)
        + " |"
    )
    print("|" + " --- |" * (1 + len(found)))
    for part in (*PARTS.values(), OUTSIDE, COPY):
        print(f"| {part} | " + " | ".join(f"{each[part] / sum(each.values()):.1%}" for each in found) + " |")


if __name__ == "__main__":
    main()
