"""What a chunk of a prompt costs a stream that decodes in the same pass, by the chunk's position in the prompt.

`python -m benchmarks.serving.chunks` runs the engine alone, in one thread, and prints a table. It measures processor
time, so other work on the machine matters less. In the last column the chunk takes two passes, each through one half of
the blocks: it has the longer one.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.serving.clusters import MODEL
from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import CHUNK_TOKENS, Engine, SessionRows
from resplit.model.source import obtain
from resplit.node.batching import Batch, Half, Part, SegmentPass, Waiting
from resplit.node.computing import computed
from tests.support.engines import stored_engine

PROMPT_TOKENS, CAPACITY, EACH = 1024, 2048, 256
CHUNKS = (CHUNK_TOKENS, 2 * CHUNK_TOKENS)


class Passes:
    """One stream that decodes, and one prompt that is computed in chunks beside it."""

    def __init__(self, engine: Engine[Any], last: int) -> None:
        self._engine = engine
        self._last = last
        self._positions = itertools.count(64)
        self.done = 0  # tokens of the prompt
        self._run(SessionRows("stream", 0, CAPACITY, token_ids([7] * 64)))

    def with_chunk(self, tokens: int) -> float:
        """Seconds of processor time of a decode step, with so many tokens of the prompt in the same pass."""
        step = SessionRows("stream", next(self._positions), CAPACITY, token_ids([5]))
        if not tokens:
            return self._run(step)
        chunk = SessionRows("prompt", self.done, CAPACITY, token_ids([7] * tokens), logits=False)
        self.done += tokens
        return self._run(step, chunk)

    def with_halves(self, tokens: int) -> tuple[float, float]:
        """Seconds of processor time of two decode steps, each with one half of the blocks for a chunk of a prompt."""
        values = token_ids([7] * tokens)
        chunk = Waiting(SegmentPass("prompt", 0, self._last, self.done, CAPACITY, values, None, more=True))
        self.done += tokens
        return self._with_half(Part(chunk, tokens, Half.FIRST)), self._with_half(Part(chunk, tokens, Half.SECOND))

    def _with_half(self, part: Part) -> float:
        step = SegmentPass("stream", 0, self._last, next(self._positions), CAPACITY, token_ids([5]), None)
        batch, begun_s = Batch(0, self._last, [Part(Waiting(step), 1), part]), time.thread_time()
        _, answer = computed(self._engine, batch, lambda block: None)
        assert isinstance(answer, Activation)
        part.waiting.halfway = answer
        return time.thread_time() - begun_s

    def close(self) -> None:
        """Free the caches."""
        self._engine.close("stream")
        self._engine.close("prompt")

    def _run(self, *rows: SessionRows) -> float:
        begun_s = time.thread_time()
        self._engine.run(0, self._last, list(rows))
        return time.thread_time() - begun_s


def measure(models: Path, repeats: int) -> None:
    """Measure, in turns, and print a row for each part of the prompt."""
    model = obtain(MODEL, models, "int4")
    engine, last = stored_engine(model, threads=1), len(model.spec.blocks) - 1
    found: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    halves: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for _ in range(repeats):
        passes = Passes(engine, last)
        while passes.done < PROMPT_TOKENS:
            part = passes.done // EACH
            for tokens in (0, *CHUNKS):
                found[part, tokens].append(passes.with_chunk(tokens))
            halves[part].append(passes.with_halves(CHUNK_TOKENS))
        passes.close()
    heads = " | ".join(f"with {tokens} tokens of a prompt" for tokens in CHUNKS)
    print(f"| position in the prompt | {heads} | with {CHUNK_TOKENS}, in halves |\n|" + " --- |" * (2 + len(CHUNKS)))
    for part in range(PROMPT_TOKENS // EACH):
        alone_s = statistics.median(found[part, 0])
        ratios = [f"{statistics.median(found[part, tokens]) / alone_s:.1f}" for tokens in CHUNKS]
        ratios.append(f"{max(map(statistics.median, zip(*halves[part], strict=True))) / alone_s:.1f}")
        print(f"| {part * EACH} to {(part + 1) * EACH - 1} | " + " | ".join(ratios) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.chunks", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    measure(given.models, given.repeats)


if __name__ == "__main__":
    main()
