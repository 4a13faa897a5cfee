"""Whether float32 products would be faster if their weights were stored in 16 bits, and expanded tile by tile.

`python -m benchmarks.half_weights` prints two tables. The first has the share of the model's weights that 16 bits hold
exactly. The second has the speed of such products over that of today's, for tiles of several sizes. The weights of all
layers are random and have the shapes of SmolLM2-135M; one thread computes, and processor time is measured in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load

from benchmarks.serving.clusters import MODEL
from resplit.model.source import StoredModel, obtain

LAYERS, LAYER_SHAPES, HEAD_SHAPE = 30, ((576, 960), (576, 576), (576, 3072), (1536, 576)), (576, 49152)
INPUTS = (576, 1536)
ROWS, TILE_MB = (1, 2, 8, 64), (0.3, 0.6, 1.2, 2.4)
COLUMNS = 64  # a tile is a multiple of so many
Weights = np.ndarray[Any, np.dtype[np.float32]]
Step = list[onnxruntime.InferenceSession]


def _plain(weights: Weights, number: int) -> tuple[list[Any], list[Any]]:
    """The nodes and constants of one product as the engine computes it."""
    node = helper.make_node("MatMul", [f"x{weights.shape[0]}", f"w{number}"], [f"y{number}"])
    return [node], [numpy_helper.from_array(weights, f"w{number}")]


def _tiled(weights: Weights, number: int, tile_bytes: float) -> tuple[list[Any], list[Any]]:
    """The same from 16 bits: each tile is expanded to `tile_bytes` just before it is multiplied."""
    inputs, outputs = weights.shape
    width = max(1, int(tile_bytes / (4 * inputs * COLUMNS))) * COLUMNS
    nodes, constants, parts = [], [], []
    for first in range(0, outputs, width):
        name = f"{number}_{first}"
        half = np.ascontiguousarray(weights[:, first : first + width]).astype(np.float16)
        constants.append(numpy_helper.from_array(half, f"h{name}"))
        nodes.append(helper.make_node("Cast", [f"h{name}"], [f"w{name}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", [f"x{inputs}", f"w{name}"], [f"p{name}"]))
        parts.append(f"p{name}")
    return [*nodes, helper.make_node("Concat", parts, [f"y{number}"], axis=-1)], constants


def _session(matrices: list[Weights], tile_bytes: float | None) -> onnxruntime.InferenceSession:
    """The products of one layer, or of the head; without `tile_bytes` as the engine computes them."""
    built = [_plain(w, i) if tile_bytes is None else _tiled(w, i, tile_bytes) for i, w in enumerate(matrices)]
    used = sorted({w.shape[0] for w in matrices})
    inputs = [helper.make_tensor_value_info(f"x{k}", TensorProto.FLOAT, ["rows", k]) for k in used]
    outputs = [
        helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", w.shape[1]]) for i, w in enumerate(matrices)
    ]
    nodes, constants = ([item for pair in built for item in pair[part]] for part in (0, 1))
    graph = helper.make_graph(nodes, "products", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    # Otherwise the weights are expanded when the graph is loaded.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _seconds(step: Step, rows: dict[str, Weights]) -> float:
    """Processor time of all products of a decode step."""
    begun_s = time.thread_time()
    for session in step:
        session.run(None, {each.name: rows[each.name] for each in session.get_inputs()})
    return time.thread_time() - begun_s


def compare_products(repeats: int) -> None:
    """Print how fast each size of tile is, over today's products."""
    random = np.random.default_rng(0)
    shapes = [*[list(LAYER_SHAPES)] * LAYERS, [HEAD_SHAPE]]
    blocks = [
        [random.standard_normal(s, dtype=np.float32).astype(np.float16).astype(np.float32) for s in each]
        for each in shapes
    ]
    steps = {tile: [_session(each, tile and tile * 1e6) for each in blocks] for tile in (None, *TILE_MB)}
    print("| rows | " + " | ".join(f"tiles of {tile} MB" for tile in TILE_MB) + " |\n|" + " --- |" * (1 + len(TILE_MB)))
    for rows in ROWS:
        values = {f"x{k}": random.standard_normal((rows, k), dtype=np.float32) for k in INPUTS}
        times = [{tile: _seconds(step, values) for tile, step in steps.items()} for _ in range(repeats)]
        gains = [statistics.median(each[None] / each[tile] for each in times) for tile in TILE_MB]
        print(f"| {rows} | " + " | ".join(f"{gain:.2f}" for gain in gains) + " |", flush=True)


def _matrices(content: bytes) -> Iterator[Weights]:
    """The float32 matrices in the graphs of a packaged block."""
    for name, array in load(content).items():
        if name != "rotary":
            for constant in onnx.load_from_string(array.tobytes()).graph.initializer:
                if constant.data_type == TensorProto.FLOAT and len(constant.dims) == 2:
                    yield numpy_helper.to_array(constant)


def _held_exactly(matrix: Weights) -> tuple[int, int]:
    """How many weights float16 and bfloat16 hold exactly. A power of two for each output moves it into their range."""
    exponents = np.frexp(np.abs(matrix).max(axis=0))[1]  # (outputs)
    scaled = np.ldexp(matrix, 15 - exponents)
    as_half = np.count_nonzero(scaled.astype(np.float16).astype(np.float32) == scaled)
    return int(as_half), int(np.count_nonzero((matrix.view(np.uint32) & 0xFFFF) == 0))


def count_exact(model: StoredModel) -> None:
    """Print the share of the model's weights that 16 bits hold exactly."""
    print("| blocks | weights | float16 | bfloat16 |\n| --- | --- | --- | --- |")
    for kind in ("layer", "head"):
        counts = np.zeros(3)
        for block in model.spec.blocks:
            if block.kind == kind:
                for matrix in _matrices(model.content(block.name)):
                    counts += (matrix.size, *_held_exactly(matrix))
        weights, half, brain = counts
        print(f"| {kind} | {weights / 1e6:.0f} million | {half / weights:.1%} | {brain / weights:.1%} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half_weights", description=__doc__)
    parser.add_argument("--models", type=Path, default=Path(".resplit/bench/models"))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    count_exact(obtain(MODEL, arguments.models, "float32"))
    print()
    compare_products(arguments.repeats)


if __name__ == "__main__":
    main()
