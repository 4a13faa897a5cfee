"""The engine alone, and transformers, in a process of their own with one thread: `python -m benchmarks.serving.alone`.

Prints one JSON object with tokens a second.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

from benchmarks.serving.clusters import MODEL

PROMPT_TOKENS, NEW_TOKENS = 128, 64


def engine_rates(weights: str, models: Path, repeats: int) -> dict[str, float]:
    """Decode rates of the engine with 1 and with 8 sessions in a pass, and its processor time with 1."""
    from resplit.model.activation import token_ids
    from resplit.model.engines.base import SessionRows
    from resplit.model.source import obtain
    from tests.support.engines import stored_engine

    model = obtain(MODEL, models, weights)  # type: ignore[arg-type]
    engine, last = stored_engine(model, threads=1), len(model.spec.blocks) - 1

    def rate(sessions: int) -> float:
        names = [str(number) for number in range(sessions)]
        prompt = token_ids([7 * position % 1000 + 100 for position in range(PROMPT_TOKENS)])
        engine.run(0, last, [SessionRows(name, 0, 256, prompt) for name in names])
        used_s = time.process_time()
        begun_s = time.perf_counter()
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + NEW_TOKENS):
            engine.run(0, last, [SessionRows(name, position, 256, token_ids([5])) for name in names])
        seconds = time.perf_counter() - begun_s
        compute_ms[sessions] = (time.process_time() - used_s) / (sessions * NEW_TOKENS) * 1e3
        for name in names:
            engine.close(name)
        return sessions * NEW_TOKENS / seconds

    compute_ms: dict[int, float] = {}
    rates = {f"decode_{n}": statistics.median(rate(n) for _ in range(repeats)) for n in (1, 8)}
    return rates | {"compute_ms_per_token": compute_ms[1]}


def generate_rate(models: Path, repeats: int) -> float:
    """Decode rate of transformers' `generate` in float32."""
    import torch
    from safetensors.torch import load
    from transformers import AutoConfig, AutoModelForCausalLM

    from resplit.model.source import obtain

    torch.set_num_threads(1)
    stored = obtain(MODEL, models, engine="torch")
    plain = dict(stored.spec.config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(plain.pop("model_type"), **plain)).eval()
    from resplit.model.engines.torch.engine import chain_of

    chain = chain_of(stored.spec.config, "layer")
    state: dict[str, torch.Tensor] = {}
    for index, block in enumerate(chain.specs):
        tensors = load(stored.content(block.name))
        state |= {path: tensors[name] for name, path in chain.tensor_names(index).items()}
    model.load_state_dict(state)
    ids = torch.arange(100, 100 + PROMPT_TOKENS)[None]

    def seconds(tokens: int) -> float:
        begun_s = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens
            )
        return time.perf_counter() - begun_s

    return statistics.median((NEW_TOKENS - 1) / (seconds(NEW_TOKENS) - seconds(1)) for _ in range(repeats))


if __name__ == "__main__":
    what, folder, times = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    found = {"generate": generate_rate(folder, times)} if what == "generate" else engine_rates(what, folder, times)
    print(json.dumps(found))
