"""The design matrix of the cost model: what one pass over one block asks of a node.

Knows blocks and token counts; knows no node and no measurement.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from resplit.types import BlockFeatures, FloatArray

__all__ = ["COLUMNS", "design"]

COLUMNS = ("pass", "tokens", "flops", "weight_bytes", "context_flops")


def design(feature: BlockFeatures, tokens: ArrayLike, context_tokens: ArrayLike) -> FloatArray:
    """Rows (P, 5) of passes that compute `tokens` new tokens on top of `context_tokens` cached ones, both (P,).

    The columns are a constant per pass, the new tokens, their matrix products, the weights read (once per pass; the
    embedding reads only the rows it looks up) and the attention to the cached tokens and to one another. The head
    computes the last position alone.
    """
    new, cached = np.broadcast_arrays(np.atleast_1d(np.asarray(tokens, float)), np.asarray(context_tokens, float))
    computed = np.ones_like(new) if feature.kind == "head" else new
    read = new * feature.activation_bytes_per_token if feature.kind == "embed" else feature.weight_bytes
    attended = new * cached + new * (new + 1) / 2
    columns = (1.0, new, computed * feature.flops_per_token, read, attended * feature.flops_per_context_token)
    return np.column_stack([np.broadcast_to(column, new.shape) for column in columns]).astype(float)  # (P, 5)
