"""Engines that hold blocks of a given model, without storing it first."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from resplit.errors import ResplitError
from resplit.model.activation import Activation, token_ids
from resplit.model.engines import open_engine
from resplit.model.engines.base import Engine, SessionRows
from resplit.model.packaging import packager_for
from resplit.model.sampling import sample
from resplit.model.source import StoredModel
from resplit.model.spec import ModelSpec
from resplit.types import Device, EngineChoice, Sampling, Split, Width


def engine_with(
    model: torch.nn.Module,
    blocks: list[int] | None = None,
    split: Split = "layer",
    engine: EngineChoice = "torch",
    weights: Width = "float32",
    device: Device = "auto",
) -> Engine[Any]:
    """An engine that holds these blocks of the model (all by default)."""
    spec, contents = _packaged(model, split, engine, weights)
    opened = open_engine(spec, device=device)
    for index in range(len(contents)) if blocks is None else blocks:
        opened.load(index, contents[index])
    return opened


@functools.lru_cache(maxsize=8)  # packaging takes longer than most tests of an engine
def _packaged(
    model: torch.nn.Module, split: Split, engine: EngineChoice, weights: Width
) -> tuple[ModelSpec, tuple[bytes, ...]]:
    """The description of a packaged model, and the content of each of its blocks."""
    packager, state = packager_for(model.config, weights, split, engine), model.state_dict()
    contents = tuple(
        packager.content(index, {name: state[path] for name, path in packager.chain.tensor_names(index).items()})
        for index in range(len(packager.chain.specs))
    )
    return packager.spec([float(len(content)) for content in contents]), contents


def stored_engine(model: StoredModel, threads: int = 1) -> Engine[Any]:
    """An engine that holds all blocks of a stored model."""
    engine = open_engine(model.spec, threads)
    for index, block in enumerate(model.spec.blocks):
        engine.load(index, model.content(block.name))
    return engine


def tokens_of_one_engine(
    model: StoredModel, prompt: Sequence[int], new_tokens: int, sampling: Sampling | None = None
) -> list[int]:
    """The tokens of the unsplit model in its own engine and width, one pass after another."""
    engine, position = stored_engine(model), 0
    tokens, step = [], list(prompt)
    for _ in range(new_tokens):
        logits = run_rows(engine, "s", (0, len(engine.kinds) - 1), position, token_ids(step), 1024)
        position += len(step)
        step = list(sample(logits, sampling or Sampling(), position - 1))
        tokens += step
    return tokens


def run_rows(
    engine: Engine[Any], session: str, blocks: tuple[int, int], start: int, values: Activation, capacity: int = 64
) -> Activation:
    """One pass of one session through the blocks `first..last`; raises the error that the engine answers."""
    (result,) = engine.run(*blocks, [SessionRows(session, start, capacity, values)])
    if isinstance(result, ResplitError):
        raise result
    return result
