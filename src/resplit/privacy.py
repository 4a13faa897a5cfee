"""The privacy rule: a private block runs on trusted nodes only."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Protocol

from resplit.types import BlockFeatures


class _MarkedBlock(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def private(self) -> bool: ...


def exposed_blocks(placement: Sequence[str], blocks: Sequence[_MarkedBlock], trusted: Collection[str]) -> list[int]:
    """Indices, in model order, of the private blocks that `placement` puts on a node that is not trusted.

    `placement` names one node for each of `blocks`; ValueError if their numbers differ. `trusted` names the
    trusted nodes.
    """
    return [
        index
        for index, (node, block) in enumerate(zip(placement, blocks, strict=True))
        if block.private and node not in trusted
    ]


def privacy_violation(placement: Sequence[str], blocks: Sequence[_MarkedBlock], trusted: Collection[str]) -> str | None:
    """The first of the `exposed_blocks`, in words; None if there is none."""
    exposed = exposed_blocks(placement, blocks, trusted)
    return f"block {blocks[exposed[0]].name} is private and {placement[exposed[0]]} is not trusted" if exposed else None


def sensitivity(layer: int | None, layers: int) -> float:
    """How much of the input and output tokens a block sees: (1 - depth)^2.

    The depth is 0 at embed and at head (`layer` is None), and (k + 1) / (layers + 1) at layer k.
    """
    depth = 0.0 if layer is None else (layer + 1) / (layers + 1)
    return (1.0 - depth) ** 2


def with_private_layers(blocks: Sequence[BlockFeatures], private_layers: int) -> tuple[BlockFeatures, ...]:
    """The same blocks with embed, the first `private_layers` layers and head marked as private."""

    def private(name: str) -> bool:
        kind, _, rest = name.partition(".")
        return kind != "layer" or int(rest.partition(".")[0]) < private_layers

    return tuple(replace(block, private=private(block.name)) for block in blocks)
