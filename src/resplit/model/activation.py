"""Tensors as they travel between nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from resplit.errors import DataError

_MAX_DIMENSIONS = 4  # a part of a cache has most
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}


@dataclass(frozen=True)
class Activation:
    """A tensor as it travels between nodes: `data` is the items of `dtype` in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def ensure_valid(self) -> None:
        """DataError unless the dtype is known, and `data` has the length that the shape says."""
        item_bytes = _ITEM_BYTES.get(self.dtype)
        if item_bytes is None:
            raise DataError(f"unknown dtype {self.dtype[:20]!r}")
        is_valid = 1 <= len(self.shape) <= _MAX_DIMENSIONS and min(self.shape) > 0
        # Computed with Python's integers: 64-bit products of huge shapes can overflow to small numbers.
        if not is_valid or math.prod(self.shape) * item_bytes != len(self.data):
            raise DataError(f"{len(self.data)} bytes are not {self.dtype} {self.shape[:_MAX_DIMENSIONS]}")


def of_array(array: np.ndarray[Any, Any]) -> Activation:
    """An array as it travels."""
    return Activation(str(array.dtype), array.shape, array.tobytes())


def token_ids(ids: list[int] | tuple[int, ...]) -> Activation:
    """Token ids as the embedding takes them, (1, tokens)."""
    return of_array(np.asarray(ids, dtype=np.int64)[None])
