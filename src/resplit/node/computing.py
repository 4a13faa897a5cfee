"""Runs a batch on the engine. Rows do not depend on the batch, so a chunk of a prompt may take two for one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from resplit.errors import ResplitError
from resplit.model.activation import Activation
from resplit.model.engines.base import Engine
from resplit.node.batching import Batch, Half

_Answers = list[Activation | ResplitError]


def computed(engine: Engine[Any], batch: Batch, after_block: Callable[[int], None]) -> _Answers:
    """The answers of the engine to the parts of a batch, as `Engine.run` gives them.

    Decode steps run through the whole segment. Where a prompt runs through a half of it, its answer is of that half.
    """
    rows = [part.rows() for part in batch.parts]
    if not batch.prompt_half:
        return engine.run(batch.first, batch.last, rows, after_block)

    def run(first: int, last: int, places: Sequence[int]) -> dict[int, Activation | ResplitError]:
        some = [rows[place] for place in places]
        return dict(zip(places, engine.run(first, last, some, after_block) if some else [], strict=True))

    places = range(len(rows))
    early = [place for place in places if batch.parts[place].half is not Half.SECOND]
    answers = run(batch.first, batch.second_half - 1, early)
    for place, answer in answers.items():
        if isinstance(answer, Activation):
            rows[place] = replace(rows[place], values=answer)
    late = [place for place in places if batch.parts[place].half is not Half.FIRST]
    late = [place for place in late if not isinstance(answers.get(place), ResplitError)]
    answers |= run(batch.second_half, batch.last, late)
    return [answers[place] for place in places]
