"""A packaged model, described without its weights: what every node must know to compute its part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from resplit.types import BlockFeatures, EngineName, Split, Width


@dataclass(frozen=True)
class ModelSpec:
    """A packaged model without its weights.

    `config` is its Hugging Face config. `weights` is the width in which the blocks were packaged, and `activations` the
    dtype of hidden states and caches. `vocabulary` counts
    the tokens that the embedding knows. `blocks` are the features of the chain embed, layer.0 .. layer.n-1, head, none
    marked as private: a cluster decides that. A cache has `kv_heads` heads of `head_width` items.
    """

    engine: EngineName
    weights: Width
    split: Split
    config: dict[str, Any]
    blocks: tuple[BlockFeatures, ...]
    vocabulary: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_width: int

    @property
    def activations(self) -> str:
        """The dtype of hidden states, logits and caches."""
        return "float32" if self.engine == "onnx" else self.weights


def parse_spec(content: object) -> ModelSpec:
    """The inverse of `dataclasses.asdict`."""
    return _SPEC.validate_python(content)


_SPEC = TypeAdapter(ModelSpec)
