"""A small cluster whose true times are known, and the telemetry that it would report."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resplit.telemetry.tables import Telemetry
from resplit.types import BlockFeatures

LAYERS = 4
WIDTH = 576


def _layer(index: int) -> BlockFeatures:
    return BlockFeatures(f"layer.{index}", "layer", 3_540_000, 7.08e6, 2304.0, 1.4e7, 3072.0, 2304.0, index == 0, 0.5)


def block_features() -> tuple[BlockFeatures, ...]:
    """Embed, four layers (the first private) and head, with the sizes of SmolLM2-135M in fp32."""
    vocabulary = 49152 * WIDTH
    embed = BlockFeatures("embed", "embed", vocabulary, 0.0, 0.0, 4.0 * vocabulary, 0.0, 2304.0, True, 1.0)
    head = BlockFeatures("head", "head", vocabulary, 2.0 * vocabulary, 0.0, 4.0 * vocabulary, 0.0, 4.0, True, 1.0)
    return (embed, *(_layer(k) for k in range(LAYERS)), head)


@dataclass(frozen=True)
class Machine:
    """True pass times: a constant, a time per token by kind, and in a layer one for each token of the cache."""

    speed: float
    constant_s: float = 1e-4
    cache_s: float = 2e-6
    per_token_s: tuple[float, float, float] = (5e-5, 2e-3, 6e-3)  # embed, layer, head

    def seconds(self, kind: str, tokens: int, context: int, sessions: int = 1) -> float:
        per_token = dict(zip(("embed", "layer", "head"), self.per_token_s, strict=True))[kind]
        new = sessions if kind == "head" else tokens
        cache = (sessions * context + tokens) * self.cache_s if kind == "layer" else 0.0
        return self.speed * (self.constant_s + new * per_token + cache)


MACHINES = {"home-a": Machine(1.0), "home-b": Machine(1.6), "edge": Machine(2.5), "cloud": Machine(0.4)}


def node_rows(machines: dict[str, Machine], times: list[float]) -> list[dict[str, object]]:
    return [
        {
            "time_s": time,
            "node": node,
            "cpu_utilization": 0.5,
            "own_utilization": 0.3,
            "memory_free_bytes": 1e8,
            "memory_held_bytes": 5e7,
            "gpu_utilization": float("nan"),
            "reference_s": machine.seconds("layer", 1, 64),
            "emulated": True,
        }
        for time in times
        for node, machine in machines.items()
    ]


def block_rows(
    machines: dict[str, Machine],
    features: tuple[BlockFeatures, ...],
    noise: float = 0.03,
    seed: int = 0,
    contexts: tuple[int, ...] = tuple(range(8, 200, 16)),
    prompts: tuple[int, ...] = (8, 16, 32, 64, 128),
    shared: tuple[int, ...] = (),
) -> list[dict[str, object]]:
    """Every block on every machine: one prefill per prompt, one decode step per context.

    Beside them one decode step for each number of sessions in `shared`, after 16 tokens each.
    """
    rng = np.random.default_rng(seed)
    passes = [("prefill", tokens, 0, 1) for tokens in prompts]
    passes += [("decode", 1, context, 1) for context in contexts]
    passes += [("decode", sessions, 16, sessions) for sessions in shared]
    return [
        {
            "time_s": float(index),
            "node": node,
            "block": feature.name,
            "kind": feature.kind,
            "phase": phase,
            "tokens": tokens,
            "context_tokens": context,
            "sessions": sessions,
            "seconds": machine.seconds(feature.kind, tokens, context, sessions)
            * float(np.exp(noise * rng.standard_normal())),
            "emulated": True,
        }
        for index, (phase, tokens, context, sessions) in enumerate(passes)
        for node, machine in machines.items()
        for feature in features
    ]


def link_rows(
    machines: dict[str, Machine], latency_s: float = 0.003, bandwidth: float = 2e7, noise: float = 0.03, seed: int = 0
) -> list[dict[str, object]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "time_s": float(index),
            "node": node,
            "peer": peer,
            "payload_bytes": payload,
            "seconds": (latency_s + payload / bandwidth) * float(np.exp(noise * rng.standard_normal())),
            "source": "active" if payload > 3000 else "passive",
            "emulated": True,
        }
        for index, payload in enumerate((256.0, 2304.0, 65536.0, 262144.0) * 5)
        for node in machines
        for peer in machines
        if node != peer
    ]


def telemetry_of(machines: dict[str, Machine], features: tuple[BlockFeatures, ...]) -> Telemetry:
    """All three tables, as the machines report them when idle."""
    return Telemetry.from_rows(
        {
            "nodes": node_rows(machines, [0.0, 1.0, 2.0]),
            "links": link_rows(machines),
            "blocks": block_rows(machines, features),
        }
    )
