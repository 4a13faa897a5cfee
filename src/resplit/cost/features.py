"""The design matrix of the cost model: what one pass over one block asks of a node.

Knows blocks and token counts; knows no node and no measurement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from resplit.types import BlockFeatures, FloatArray

__all__ = ["COLUMNS", "design"]

COLUMNS = ("pass", "tokens", "flops", "weight_bytes", "cache_bytes")


def design(feature: BlockFeatures, tokens: ArrayLike, context_tokens: ArrayLike) -> FloatArray:
    """Rows (P, 5) of passes that compute `tokens` new tokens on top of `context_tokens` cached ones, both (P,).

    The columns are those of a roofline: a constant per pass, the new tokens, all operations (matrix products and the
    attention of each new token to those before it), the weights read (once per pass; the embedding reads only the rows
    it looks up) and the cache read. The head computes the last position alone.
    """
    new, cached = np.broadcast_arrays(np.atleast_1d(np.asarray(tokens, float)), np.asarray(context_tokens, float))
    computed = np.ones_like(new) if feature.kind == "head" else new
    attended = new * cached + new * (new + 1) / 2
    flops = computed * feature.flops_per_token + attended * feature.flops_per_context_token
    weights = new * feature.activation_bytes_per_token if feature.kind == "embed" else feature.weight_bytes
    columns = (1.0, new, flops, weights, (cached + new) * feature.kv_bytes_per_token)
    return np.column_stack([np.broadcast_to(column, new.shape) for column in columns]).astype(float)  # (P, 5)
