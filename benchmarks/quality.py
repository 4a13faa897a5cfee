"""What each width of weights costs in quality; `python -m benchmarks.quality` prints the table of docs/engines.md.

The text is the reference that every Python installation contains (`pydoc_data.topics`). Perplexity is over windows of
256 tokens; agreement is the share of positions at which the most likely next token is that of float32.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
from transformers import AutoTokenizer

from benchmarks.serving.clusters import MODEL
from resplit.model.activation import Activation, token_ids
from resplit.model.engines.base import SessionRows
from resplit.model.sampling import to_float32
from resplit.model.source import StoredModel, obtain
from resplit.types import Width
from tests.support.engines import stored_engine

WINDOW, CHUNK = 256, 64
WIDTHS: tuple[Width, ...] = ("float32", "int8", "int4")


def logits_of(model: StoredModel, windows: list[list[int]]) -> np.ndarray:
    """Logits (windows, positions, vocabulary) in float16, each position computed as a decode step computes it."""
    engine, last = stored_engine(model, threads=2), len(model.spec.blocks) - 1
    found = []
    for number, window in enumerate(windows):
        for first in range(0, WINDOW, CHUNK):
            ids = token_ids(window[first : first + CHUNK])
            rows = SessionRows(str(number), first, WINDOW, ids, stepwise=True, drafts=CHUNK - 1)
            (answer,) = engine.run(0, last, [rows])
            assert isinstance(answer, Activation)
            found.append(to_float32(answer).astype(np.float16))
        engine.close(str(number))
    return np.concatenate(found).reshape(len(windows), WINDOW, -1)


def perplexity(logits: np.ndarray, windows: list[list[int]]) -> float:
    """The exponential of the mean negative log likelihood of each next token."""
    total = 0.0
    for window, rows in zip(windows, logits, strict=True):
        scores = rows[:-1].astype(np.float32)
        scores -= scores.max(axis=1, keepdims=True)
        likely = scores[np.arange(WINDOW - 1), window[1:]] - np.log(np.exp(scores).sum(axis=1))
        total -= float(likely.mean())
    return math.exp(total / len(windows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    options = parser.parse_args()
    models = {width: obtain(MODEL, options.models, width) for width in WIDTHS}
    tokenizer = AutoTokenizer.from_pretrained(models["float32"].folder)
    ids = tokenizer("\n".join(topics.values()))["input_ids"][: options.windows * WINDOW]
    windows = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
    exact = None
    print(f"{'weights':10}{'MiB':>6}{'perplexity':>12}{'agreement':>11}")
    for width, model in models.items():
        logits = logits_of(model, windows)
        chosen = logits.argmax(axis=2)
        exact = chosen if exact is None else exact
        size = sum(block.weight_bytes for block in model.spec.blocks) / 2**20
        print(f"{width:10}{size:6.0f}{perplexity(logits, windows):12.2f}{(chosen == exact).mean():11.1%}", flush=True)


if __name__ == "__main__":
    main()
