"""Generates placement problems: real models on mixed edge hardware, fixed by a specification with a seed.

They are drawn from the same distribution as the examples in tests/data/problems. The command
`python -m benchmarks.planner_instances FOLDER` writes the suite as problem files.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# name: (layers, hidden size, bytes of a layer, bytes of embedding or head, KV cache bytes per token and layer)
MODELS = {
    "smollm2-135m": (30, 576, 7.08e6, 5.66e7, 768),
    "llama3.2-1b": (16, 2048, 1.216e8, 5.25e8, 2048),
    "llama3.2-3b": (28, 3072, 2.014e8, 7.88e8, 4096),
    "llama2-7b": (32, 4096, 4.048e8, 2.62e8, 16384),
    "llama2-13b": (40, 5120, 6.344e8, 3.28e8, 20480),
    "llama3-70b": (80, 8192, 1.712e9, 2.1e9, 4096),
}
# kind: (Tflop/s, memory bandwidth in GB/s, memory in GB, frequency); a random factor per node scales the speeds
DEVICES = {
    "rpi5": (0.028, 13, 7, 1),
    "orin-nano": (1.3, 62, 6, 2),
    "orin-agx": (5.5, 180, 32, 2),
    "xeon": (1.5, 170, 60, 2),
    "m2": (6.5, 100, 17, 2),
    "rtx3060": (28, 370, 10, 2),
    "l4": (60, 290, 21, 2),
    "rtx4090": (85, 1000, 21, 2),
    "a100": (200, 1500, 78, 1),
}
# (latency in s, bandwidth in bytes/s) of local networks and of wide-area links
LANS = ((0.3e-3, 125e6), (0.3e-3, 125e6), (1e-3, 12.5e6), (1e-3, 60e6), (2e-3, 40e6))
WANS = ((6e-3, 12.5e6), (12e-3, 12.5e6), (12e-3, 40e6), (20e-3, 2.5e6))


@dataclass(frozen=True)
class Spec:
    """One generated problem.

    `memory_ratio` is the total memory over the memory needed; None if memory is ample. With `nulls`, some links and
    times are missing. With `sub`, attention and mlp are separate blocks. `cuts` is the number of allowed cuts, if
    limited.
    """

    seed: int
    nodes: int
    model: str
    classes: int = 1
    memory_ratio: float | None = None
    nulls: bool = False
    sub: bool = False
    cuts: int | None = None

    @property
    def name(self) -> str:
        marks = [f"tight{self.memory_ratio}"] if self.memory_ratio else []
        marks += [word for word, there in (("nulls", self.nulls), ("sub", self.sub), ("cuts", self.cuts)) if there]
        return "-".join([f"n{self.nodes:03d}", self.model, f"c{self.classes}", *marks, str(self.seed)])


def suite() -> list[Spec]:
    """The published benchmark: two fifths have scarce memory, and some lack links and times."""
    specs = []
    models = ["llama3.2-1b", "llama3.2-3b", "llama2-7b", "llama2-13b", "smollm2-135m"]
    for size_index, nodes in enumerate((8, 12, 16, 24, 32)):
        for k in range(10):
            seed = 1000 * (size_index + 1) + k
            memory_ratio = (None, 1.05, None, 1.2, None, 1.6, None, 1.4, None, 1.8)[k]
            model = models[k % 5] if memory_ratio is None else ("llama2-7b", "llama2-13b", "llama2-7b")[k % 3]
            specs.append(
                Spec(seed, nodes, model, 1 + k % 4, memory_ratio, nulls=k in (3, 4, 7), sub=k in (6, 9) and nodes <= 12,
                     cuts=6 if k == 8 else None)
            )  # fmt: skip
    for k, memory_ratio in enumerate((None, 1.3, None, 1.6)):
        specs.append(Spec(6000 + k, 64, "llama3-70b", 1 + k % 3, memory_ratio, nulls=k == 1))
        # With more nodes than blocks, each node needs memory for a block. Memory is scarce if no node holds many.
        large_ratio = None if memory_ratio is None else 8.0
        specs.append(Spec(7000 + k, 128, "llama2-7b", 1 + k % 3, large_ratio, nulls=k == 3))
    specs += [Spec(8000, 512, "llama3-70b", 2), Spec(8001, 512, "llama3-70b", 2, memory_ratio=16.0)]
    return specs


def generate(spec: Spec) -> dict[str, Any]:
    """The problem of `spec` as the JSON object of docs/problem.md."""
    rng = np.random.default_rng(spec.seed)
    blocks = _blocks(spec, rng)
    kinds = _kinds(spec, rng)
    kv_tokens = int(rng.integers(1500, 8000))
    need = sum(b["weight_bytes"] + b["kv_bytes_per_token"] * kv_tokens for b in blocks)
    nodes = _nodes(spec, kinds, need, rng)
    prefill, decode = _times(blocks, kinds, rng)
    classes = [
        {
            "name": f"class-{r}", "source": f"node-{rng.integers(spec.nodes)}", "rate_rps": float(rng.uniform(0.2, 1)),
            "prompt_tokens": int(np.clip(rng.lognormal(5.2, 0.9), 8, 1500)),
            "new_tokens": int(np.clip(rng.lognormal(4.2, 0.7), 4, 300)),
        }
        for r in range(spec.classes)
    ]  # fmt: skip
    _scale_rates(classes, prefill, decode, nodes, spec, rng)
    latency, bandwidth = _links(spec, rng)
    runs = np.ones_like(prefill, dtype=bool)
    linked = np.ones_like(latency, dtype=bool)
    if spec.nulls:
        runs = rng.random(prefill.shape) > 0.03
        linked = rng.random(latency.shape) > 0.15
        linked &= linked.T
    problem = {
        "version": 1,
        "blocks": blocks,
        "nodes": nodes,
        "classes": classes,
        "prefill_s_per_token": _nullable(prefill, runs),
        "decode_s_per_token": _nullable(decode, runs),
        "link_latency_s": _nullable(latency, linked),
        "link_bandwidth_bytes_per_s": _nullable(bandwidth, linked),
        "kv_tokens": kv_tokens,
        "token_bytes": 4,
        "weights": {
            "latency": 1.0, "balance": float(rng.choice([0, 0, 0.2, 1])), "privacy": float(rng.choice([0, 0.5, 2])),
        },
    }  # fmt: skip
    if spec.cuts:
        problem["allowed_cuts"] = sorted(int(c) for c in rng.choice(np.arange(1, len(blocks)), spec.cuts, False))
    return problem


def drifted(problem: dict[str, Any], seed: int, size: float = 0.15) -> dict[str, Any]:
    """The same problem after a drift: background load, rates, times and links change by about `size` (relative)."""
    rng = np.random.default_rng(seed)
    new: dict[str, Any] = json.loads(json.dumps(problem))
    for node in new["nodes"]:
        node["background_utilization"] = float(
            np.clip(node["background_utilization"] + rng.normal(0, size / 2), 0, 0.9)
        )
    for request_class in new["classes"]:
        request_class["rate_rps"] *= float(np.exp(rng.normal(0, size)))
    for key in ("prefill_s_per_token", "decode_s_per_token"):
        factors = np.exp(rng.normal(0, size / 3, len(new["nodes"])))
        new[key] = [[v if v is None else v * f for v, f in zip(row, factors, strict=True)] for row in new[key]]
    for key in ("link_latency_s", "link_bandwidth_bytes_per_s"):
        new[key] = [[v if v is None else v * float(np.exp(rng.normal(0, size))) for v in row] for row in new[key]]
    return new


def _blocks(spec: Spec, rng: np.random.Generator) -> list[dict[str, Any]]:
    layers, hidden, layer_bytes, end_bytes, kv = MODELS[spec.model]
    parts = [("embed", end_bytes, 0.0)]
    for n in range(layers):
        whole = [(f"layer.{n}", layer_bytes, float(kv))]
        halves = [(f"layer.{n}.attention", layer_bytes / 3, float(kv)), (f"layer.{n}.mlp", layer_bytes * 2 / 3, 0.0)]
        parts += halves if spec.sub else whole
    parts.append(("head", end_bytes, 0.0))
    private = {0, len(parts) - 1, *range(1, 1 + int(rng.integers(0, 3)))}
    depth = np.linspace(0, 1, len(parts))
    return [
        {
            "name": name, "weight_bytes": float(size), "kv_bytes_per_token": cache,
            "activation_bytes_per_token": 2.0 * hidden, "private": j in private,
            "sensitivity": 1.0 if j in (0, len(parts) - 1) else float((1 - depth[j]) ** 2),
        }
        for j, (name, size, cache) in enumerate(parts)
    ]  # fmt: skip


def _kinds(spec: Spec, rng: np.random.Generator) -> list[str]:
    frequency = np.array([device[3] for device in DEVICES.values()], dtype=float)
    return [str(kind) for kind in rng.choice(list(DEVICES), spec.nodes, p=frequency / frequency.sum())]


def _nodes(spec: Spec, kinds: list[str], need: float, rng: np.random.Generator) -> list[dict[str, Any]]:
    memory = np.array([DEVICES[kind][2] * 1e9 for kind in kinds]) * rng.uniform(0.5, 1, spec.nodes)
    if spec.memory_ratio:
        memory = rng.uniform(0.5, 1.6, spec.nodes)
        memory *= spec.memory_ratio * need / memory.sum()
    trusted = rng.random(spec.nodes) < 0.6
    trusted[rng.choice(spec.nodes, max(1, spec.nodes // 4), False)] = True
    return [
        {
            "name": f"node-{i}", "memory_bytes": float(memory[i]),
            "background_utilization": float(rng.uniform(0, 0.5) if rng.random() < 0.6 else rng.uniform(0, 0.15)),
            "max_utilization": 0.95, "trusted": bool(trusted[i]),
        }
        for i in range(spec.nodes)
    ]  # fmt: skip


def _times(blocks: list[dict[str, Any]], kinds: list[str], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Seconds per token (J, N). Prefill is bound by compute, decode by memory bandwidth; the embedding is a lookup."""
    weights = np.array([block["weight_bytes"] for block in blocks])
    flops = np.array([DEVICES[kind][0] * 1e12 for kind in kinds]) * rng.uniform(0.7, 1.25, len(kinds))
    bandwidth = np.array([DEVICES[kind][1] * 1e9 for kind in kinds]) * rng.uniform(0.7, 1.2, len(kinds))
    prefill, decode = np.outer(weights, 1 / flops), np.outer(weights, 1 / bandwidth)
    prefill[0] = decode[0] = 2e-6
    return prefill, decode


def _scale_rates(
    classes: list[dict[str, Any]], prefill: np.ndarray, decode: np.ndarray, nodes: list[dict[str, Any]], spec: Spec,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Scale the rates so that the whole model loads a good node (ample memory) or the mean node to a random share."""
    load = sum(
        c["rate_rps"] * (c["prompt_tokens"] * prefill.sum(axis=0) + c["new_tokens"] * decode.sum(axis=0))
        for c in classes
    )
    free = np.array([1 - node["background_utilization"] for node in nodes])
    if spec.memory_ratio:
        share = np.array([node["memory_bytes"] for node in nodes])
        factor = rng.uniform(0.3, 0.85) / np.quantile(load * share / share.sum() / free, 0.9)
    else:
        factor = rng.uniform(0.4, 1.6) / np.quantile(load / free, 1.5 / len(nodes))
    for request_class in classes:
        request_class["rate_rps"] = float(request_class["rate_rps"] * factor)


def _links(spec: Spec, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Latency and bandwidth (N, N) of sites with local networks and wide-area links over random distances."""
    sites = max(2, spec.nodes // 4)
    site = rng.integers(sites, size=spec.nodes)
    lan = [LANS[int(k)] for k in rng.integers(len(LANS), size=sites)]
    place = rng.uniform(0, 1, (sites, 2))
    latency = np.zeros((spec.nodes, spec.nodes))
    bandwidth = np.ones((spec.nodes, spec.nodes))
    for a in range(sites):
        for b in range(a, sites):
            delay, rate = lan[a] if a == b else WANS[int(rng.integers(len(WANS)))]
            delay += 0.02 * float(np.hypot(*(place[a] - place[b])))
            pair = np.ix_(site == a, site == b)
            back = np.ix_(site == b, site == a)
            latency[pair], bandwidth[pair] = delay, rate
            latency[back], bandwidth[back] = delay, rate
    return latency, bandwidth


def _nullable(matrix: np.ndarray, kept: np.ndarray) -> list[list[float | None]]:
    return [
        [float(v) if keep else None for v, keep in zip(row, mask, strict=True)]
        for row, mask in zip(matrix, kept, strict=True)
    ]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for spec in suite():
        (folder / f"{spec.name}.json").write_text(json.dumps(generate(spec)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
