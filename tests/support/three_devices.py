"""The content of a cluster file whose nodes are those of `tests.support.decisions`."""

from __future__ import annotations

from tests.support.decisions import FAR, FAST, SLOW

TIMES = {"embed": "1 ms", "layer": "1 ms", "head": "1 ms"}
HARDWARE = {"decode_per_token": TIMES, "prefill_per_token": TIMES}
THREE_DEVICES = {
    "name": "three",
    "source": FAST,
    "trusted": [FAST],
    "nodes": [{"name": name, "memory": "1 GiB", "emulate": HARDWARE} for name in (FAST, SLOW, FAR)],
    "links": {"default": {"latency": "2 ms", "bandwidth": "160 Mbit/s"}},
    "classes": [{"name": "chat", "rate_rps": 0.5, "prompt_tokens": 64, "new_tokens": 32}],
    "kv_tokens": 500,
}
