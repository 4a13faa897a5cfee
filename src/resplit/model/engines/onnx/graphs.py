"""Builds the ONNX graphs of blocks, when a model is packaged. Nodes run the graphs and need no `onnx` package.

A layer becomes three graphs, so that sessions of any length share its products:

- `before`: normalisation and the product that gives queries, keys and values, for any number of rows;
- `attention`: grouped-query attention with rotary positions over each session's own cache. It has no weights;
- `after`: output projection, residual, normalisation and gated MLP, for any number of rows.

A row is one position of one session. Every layer begins with its normalisation and ends in a plain addition: so any
cut between layers gives the same bits, and a row gives the same bits alone and beside any other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from resplit.model.engines.onnx.families import Decoder
from resplit.model.engines.onnx.quantize import BLOCK_SIZE, quantise

_BITS = {"int8": 8, "int4": 4}
# The embedding stays in 8 bits: a pass reads few of its rows, so that fewer bits would not make it faster.
_EMBEDDING_WIDTHS = {"float32": "float32", "int8": "int8", "int4": "int8"}
_CONTRIB = "com.microsoft"
FloatArray = np.ndarray[Any, np.dtype[np.float32]]
Tensors = Mapping[str, FloatArray]


def before_graph(decoder: Decoder, width: str, tensors: Tensors, moments: Tensors) -> bytes:
    """`hidden` (rows, hidden) -> `qkv` (rows, query width + 2 key widths), from the tensors of one layer.

    `moments` are those of the inputs of products, as far as they are known, by the first product's name.
    """
    graph, tensors = _GraphBuilder(width), _with_scaled_queries(decoder, tensors)
    x = graph.norm("hidden", tensors["attention_norm.weight"], decoder.epsilon)
    projections = [f"attention.{part}_proj" for part in "qkv"]
    weight = np.concatenate([tensors[f"{name}.weight"] for name in projections])
    bias = np.concatenate([tensors[f"{name}.bias"] for name in projections]) if decoder.qkv_bias else None
    qkv = graph.product(x, weight, bias, moments.get(projections[0]))
    if decoder.qk_norm:
        queries, keys, values = graph.split(qkv, (decoder.query_width, decoder.kv_width, decoder.kv_width))
        queries = graph.head_norm(queries, decoder.heads, tensors["attention.q_norm.weight"], decoder.epsilon)
        keys = graph.head_norm(keys, decoder.kv_heads, tensors["attention.k_norm.weight"], decoder.epsilon)
        qkv = graph.op("Concat", [queries, keys, values], axis=-1)
    return graph.model({"hidden": decoder.hidden}, {"qkv": (qkv, decoder.query_width + 2 * decoder.kv_width)})


def attention_graph(decoder: Decoder, window: int, slots: int) -> bytes:
    """`qkv` (slots, positions, width) -> `attended` (slots, positions, query width), over `slots` separate caches.

    Slot i appends its keys and values to `keys{i}` and `values{i}`, (1, heads, capacity, head width) each, in place if
    the outputs of the same meaning are bound to the same memory. `last{i}` is the position of its last row, and
    `total{i}` one more. With one slot the number of positions is free, else it is 1.
    """
    graph = _GraphBuilder("float32")
    cache_shape: list[int | str | None] = [1, decoder.kv_heads, "capacity", decoder.head_width]
    positions: str | int = "positions" if slots == 1 else 1
    qkv_width = decoder.query_width + 2 * decoder.kv_width
    inputs = [helper.make_tensor_value_info("qkv", TensorProto.FLOAT, [slots, positions, qkv_width])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["table", decoder.head_width // 2]) for n in _ROTARY]
    outputs = [helper.make_tensor_value_info("attended", TensorProto.FLOAT, [slots, positions, decoder.query_width])]
    rows = graph.split("qkv", (1,) * slots, axis=0) if slots > 1 else ["qkv"]
    attended = []
    for slot, row in enumerate(rows):
        caches = [f"keys{slot}", f"values{slot}"]
        inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache_shape) for name in caches]
        inputs += [helper.make_tensor_value_info(f"{n}{slot}", TensorProto.INT32, [1]) for n in ("last", "total")]
        outputs += [helper.make_tensor_value_info(f"new_{name}", TensorProto.FLOAT, cache_shape) for name in caches]
        attended.append(f"attended{slot}")
        graph.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [row, "", "", *caches, f"last{slot}", f"total{slot}", *_ROTARY],
                [attended[-1], *(f"new_{name}" for name in caches)],
                domain=_CONTRIB,
                num_heads=decoder.heads,
                kv_num_heads=decoder.kv_heads,
                do_rotary=1,
                scale=1.0,
                local_window_size=window,
            )
        )
    graph.name_output("Concat", attended, "attended", axis=0)
    return graph.serialised(inputs, outputs)


def after_graph(decoder: Decoder, width: str, tensors: Tensors, moments: Tensors, mlp: bool) -> bytes:
    """`hidden` (rows, hidden) and `attended` (rows, query width) -> `output` (rows, hidden); `mlp`: the MLP too."""
    graph = _GraphBuilder(width)
    bias = tensors["attention.o_proj.bias"] if decoder.output_bias else None
    weight = tensors["attention.o_proj.weight"]
    projected = graph.product("attended", weight, bias, moments.get("attention.o_proj"))
    hidden = graph.op("Add", ["hidden", projected])
    if mlp:
        hidden = _mlp(graph, decoder, tensors, moments, hidden)
    inputs = {"hidden": decoder.hidden, "attended": decoder.query_width}
    return graph.model(inputs, {"output": (hidden, decoder.hidden)})


def mlp_graph(decoder: Decoder, width: str, tensors: Tensors, moments: Tensors) -> bytes:
    """`hidden` (rows, hidden) -> `output` (rows, hidden): the MLP of a layer, with its residual."""
    graph = _GraphBuilder(width)
    output = _mlp(graph, decoder, tensors, moments, "hidden")
    return graph.model({"hidden": decoder.hidden}, {"output": (output, decoder.hidden)})


def embed_graph(decoder: Decoder, width: str, tensors: Tensors) -> bytes:
    """`tokens` (rows) -> `hidden` (rows, hidden)."""
    graph = _GraphBuilder(_EMBEDDING_WIDTHS[width])
    graph.lookup("tokens", tensors["tokens.weight"], "hidden")
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows"])
    hidden = helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["rows", decoder.hidden])
    return graph.serialised([tokens], [hidden])


def head_graph(decoder: Decoder, width: str, tensors: Tensors, moments: Tensors) -> bytes:
    """`hidden` (rows, hidden) -> `logits` (rows, vocabulary)."""
    graph = _GraphBuilder(width)
    x = graph.norm("hidden", tensors["norm.weight"], decoder.epsilon)
    logits = graph.product(x, tensors["projection.weight"], None, moments.get("projection"))
    return graph.model({"hidden": decoder.hidden}, {"logits": (logits, decoder.vocabulary)})


_ROTARY = ("cos", "sin")


def _with_scaled_queries(decoder: Decoder, tensors: Tensors) -> Tensors:
    """The tensors of a layer, with queries divided by the root of the head width, so that attention need not do it.

    For one position the runtime has a faster product if the scores need no scale.
    """
    scaled = ("attention.q_norm.weight",) if decoder.qk_norm else ("attention.q_proj.weight", "attention.q_proj.bias")
    scale = np.float32(decoder.head_width**-0.5)
    return {name: tensor * scale if name in scaled else tensor for name, tensor in tensors.items()}


def _mlp(graph: _GraphBuilder, decoder: Decoder, tensors: Tensors, moments: Tensors, hidden: str) -> str:
    def bias(*names: str) -> FloatArray | None:
        return np.concatenate([tensors[f"mlp.{name}.bias"] for name in names]) if decoder.mlp_bias else None

    x = graph.norm(hidden, tensors["mlp_norm.weight"], decoder.epsilon)
    weight = np.concatenate([tensors["mlp.gate_proj.weight"], tensors["mlp.up_proj.weight"]])
    both = graph.product(x, weight, bias("gate_proj", "up_proj"), moments.get("mlp.gate_proj"))
    gate, up = graph.split(both, (decoder.inner, decoder.inner))
    silu = graph.op("QuickGelu", [gate], domain=_CONTRIB, alpha=1.0)
    inner = graph.op("Mul", [silu, up])
    weight = tensors["mlp.down_proj.weight"]
    return graph.op("Add", [hidden, graph.product(inner, weight, bias("down_proj"), moments.get("mlp.down_proj"))])


class _GraphBuilder:
    """A graph under construction. Methods add nodes, and return the name of the result."""

    def __init__(self, width: str) -> None:
        self.nodes: list[NodeProto] = []
        self._width = width
        self._constants: list[TensorProto] = []

    def op(self, kind: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Add a node with one output."""
        return self.name_output(kind, inputs, f"t{len(self.nodes)}", domain, **attributes)

    def name_output(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output of this name."""
        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def constant(self, value: Any) -> str:
        """Add a constant."""
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        """Cut `x` into parts of these sizes."""
        outputs = [f"t{len(self.nodes)}_{part}" for part in range(len(sizes))]
        sizes_name = self.constant(np.asarray(sizes, dtype=np.int64))
        self.nodes.append(helper.make_node("Split", [x, sizes_name], outputs, axis=axis))
        return outputs

    def norm(self, x: str, weight: FloatArray, epsilon: float) -> str:
        """RMS normalisation over the last axis."""
        return self.op("SimplifiedLayerNormalization", [x, self.constant(weight)], axis=-1, epsilon=epsilon)

    def head_norm(self, x: str, heads: int, weight: FloatArray, epsilon: float) -> str:
        """RMS normalisation of each head by itself; `x` is (rows, heads * head width)."""
        by_head = self.op("Reshape", [x, self.constant(np.asarray([-1, heads, weight.size], dtype=np.int64))])
        normed = self.norm(by_head, weight, epsilon)
        return self.op("Reshape", [normed, self.constant(np.asarray([-1, heads * weight.size], dtype=np.int64))])

    def lookup(self, tokens: str, table: FloatArray, output: str) -> None:
        """The rows of `table` (vocabulary, hidden) for these tokens, in the width of this graph."""
        bits = _BITS.get(self._width)
        if bits is None:
            self.name_output("Gather", [self.constant(table), tokens], output, axis=0)
            return
        matrix = quantise(table, bits)
        arrays = matrix.packed.reshape(matrix.columns, -1), matrix.scales, matrix.zero_points
        data, scales, zero_points = map(self.constant, arrays)
        inputs = [data, tokens, scales, zero_points]
        options = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK_SIZE, "bits": bits}
        self.name_output("GatherBlockQuantized", inputs, output, _CONTRIB, **options)

    def product(self, x: str, weight: FloatArray, bias: FloatArray | None, moments: FloatArray | None) -> str:
        """`x` times the transpose of `weight` (outputs, inputs), in the width of this graph, plus `bias`."""
        bits = _BITS.get(self._width)
        if bits is None:
            y = self.op("MatMul", [x, self.constant(weight.T)])
        else:
            matrix = quantise(weight, bits, moments)
            y = self.op(
                "MatMulNBits",
                [x, *map(self.constant, (matrix.packed, matrix.scales, matrix.zero_points))],
                domain=_CONTRIB,
                K=matrix.rows,
                N=matrix.columns,
                bits=bits,
                block_size=BLOCK_SIZE,
                accuracy_level=4,  # activations in 8 bit, by block: rows do not depend on the batch
            )
        return y if bias is None else self.op("Add", [y, self.constant(bias)])

    def model(self, inputs: Mapping[str, int], outputs: Mapping[str, tuple[str, int]]) -> bytes:
        """The graph; all inputs and outputs are (rows, width), and `outputs` says which result each one is."""
        for name, (result, _) in outputs.items():
            self.name_output("Identity", [result], name)
        return self.serialised(
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width]) for name, width in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", width]) for n, (_, width) in outputs.items()],
        )

    def serialised(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> bytes:
        """The graph with these inputs and outputs, as ONNX Runtime loads it."""
        graph = helper.make_graph(self.nodes, "block", inputs, outputs, self._constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid(_CONTRIB, 1)]
        serialised: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return serialised
