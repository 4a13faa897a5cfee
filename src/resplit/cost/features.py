"""The design matrix of the cost model: the work of one pass over one block."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from resplit.types import BlockFeatures, FloatArray

__all__ = ["COLUMNS", "design"]

COLUMNS = ("pass", "tokens", "flops", "weight_bytes", "cache_bytes")


def design(
    feature: BlockFeatures, tokens: ArrayLike, context_tokens: ArrayLike, sessions: ArrayLike = 1.0
) -> FloatArray:
    """Rows (P, 5) of passes that compute `tokens` new tokens, of `sessions` sessions together, all (P,).

    Each session computes the same share of `tokens`, after `context_tokens` cached ones.

    The columns are those of a roofline model: a constant, the new tokens, the operations (matrix products, and the
    attention of each new token to the tokens before it), the weights read (once for each pass; the embedding reads
    only the rows of its tokens) and the caches read. The head computes the last position of each session only.
    """
    new, cached, shared = np.broadcast_arrays(
        np.atleast_1d(np.asarray(tokens, float)), np.asarray(context_tokens, float), np.asarray(sessions, float)
    )
    computed = shared if feature.kind == "head" else new
    attended = new * cached + new * (new / shared + 1) / 2
    flops = computed * feature.flops_per_token + attended * feature.flops_per_context_token
    weights = new * feature.activation_bytes_per_token if feature.kind == "embed" else feature.weight_bytes
    columns = (1.0, new, flops, weights, (shared * cached + new) * feature.kv_bytes_per_token)
    return np.column_stack([np.broadcast_to(column, new.shape) for column in columns]).astype(float)  # (P, 5)
