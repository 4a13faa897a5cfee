"""Turns the tensors of a checkpoint into the packaged blocks of the ONNX engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors.numpy import save

from resplit.model.engines.onnx import graphs
from resplit.model.engines.onnx.contents import ATTENTION_SLOTS
from resplit.model.engines.onnx.families import Decoder

FloatArray = np.ndarray[Any, np.dtype[np.float32]]


def package_block(
    decoder: Decoder,
    width: str,
    kind: str,
    layer: int | None,
    tensors: Mapping[str, FloatArray],
    moments: Mapping[str, FloatArray],
    rotary: FloatArray,
) -> bytes:
    """The content of one block, from its tensors by their names within it.

    `moments` are those of the inputs of its products, by name; weights of products without them are quantised alone.
    `rotary` are the inverse frequencies of the rotary embedding (head width / 2), and its scale last.
    """
    if kind == "embed":
        arrays = {"embed": graphs.embed_graph(decoder, width, tensors)}
    elif kind == "head":
        arrays = {"head": graphs.head_graph(decoder, width, tensors, moments)}
    elif kind == "mlp":
        arrays = {"mlp": graphs.mlp_graph(decoder, width, tensors, moments)}
    else:
        assert layer is not None
        arrays = {
            "before": graphs.before_graph(decoder, width, tensors, moments),
            "after": graphs.after_graph(decoder, width, tensors, moments, mlp=kind == "layer"),
        }
        for slots in ATTENTION_SLOTS:
            arrays[f"attention.{slots}"] = graphs.attention_graph(decoder, decoder.windows[layer], slots)
    content = {name: np.frombuffer(graph, dtype=np.uint8) for name, graph in arrays.items()}
    return bytes(save(content if layer is None or kind == "mlp" else content | {"rotary": rotary}))
